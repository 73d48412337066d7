"""Small pyramidal slides made on the fly, in Aperio's manner, so that OpenSlide reads mpp and objective power."""

from pathlib import Path

import cv2
import numpy as np
import tifffile

PINK, WHITE = (200, 120, 170), (243, 243, 243)


def write_aperio(
    path: Path,
    image: np.ndarray,
    mpp: float | None = 0.5,
    power: float | None = None,
    downsamples: tuple[int, ...] = (1,),
    quality: int = 95,
) -> Path:
    """Write (H, W, 3) uint8 RGB as levels of 256 px JPEG tiles; level i is `image` shrunk by downsamples[i]."""
    facts = {"AppMag": power, "MPP": mpp}
    description = (
        "Aperio Image Library v12.0.15\r\n" + f"{image.shape[1]}x{image.shape[0]} (256x256) JPEG/RGB Q={quality}"
    )
    description += "".join(f"|{name} = {value:g}" for name, value in facts.items() if value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tif:
        for downsample in downsamples:
            size = (image.shape[1] // downsample, image.shape[0] // downsample)
            tif.write(
                cv2.resize(image, size, interpolation=cv2.INTER_AREA),
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": quality},
                description=description,
                metadata=None,
                software=False,
            )
    return path


def plain(width: int, height: int, colour: tuple[int, int, int] = PINK) -> np.ndarray:
    """(height, width, 3) uint8 RGB of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def blob(width: int, height: int, radius: int, seed: int = 0) -> np.ndarray:
    """A disc of textured pink in the middle of white glass."""
    image = plain(width, height, WHITE)
    cv2.circle(image, (width // 2, height // 2), radius, PINK, -1)
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 1))
    inside = (image == PINK).all(axis=2, keepdims=True)
    return np.clip(image + noise * inside, 0, 255).astype(np.uint8)


def tissue(width: int, height: int, seed: int = 0, dark: bool = False) -> np.ndarray:
    """An ellipse of coarsely textured pink on white glass; `dark` strews dark nuclei over it."""
    rng = np.random.default_rng(seed)
    image = plain(width, height, WHITE)
    cv2.ellipse(image, (width // 2, height // 2), (width * 2 // 5, height * 2 // 5), 0, 0, 360, PINK, -1)
    inside = (image == PINK).all(axis=2)
    texture = cv2.resize(rng.normal(0, 20, (height // 16, width // 16)), (width, height), interpolation=cv2.INTER_CUBIC)
    image[inside] = np.clip(image[inside] + texture[inside][:, None], 0, 255).astype(np.uint8)
    if dark:
        for x, y in rng.integers((width // 4, height // 4), (3 * width // 4, 3 * height // 4), (60, 2)):
            cv2.circle(image, (int(x), int(y)), 6, (70, 30, 110), -1, cv2.LINE_AA)
    return image
