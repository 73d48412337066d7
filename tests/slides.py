"""Small pyramidal slides made on the fly, in Aperio's manner, so that OpenSlide reads mpp and objective power."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import imagecodecs
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


def write_tiled(
    path: Path,
    image: np.ndarray,
    tile: tuple[int, int] = (256, 256),
    downsamples: tuple[float, ...] = (1,),
    colours: str = "ycbcr",
    subsampling: str = "420",
    shared_tables: bool = False,
    aperio: bool = False,
    quality: int = 90,
) -> Path:
    """Write (H, W, 3) uint8 RGB as a pyramid of JPEG tiles, (width, height) `tile`, whose colours are stored as "ycbcr"
    or "rgb"; with `shared_tables` the quantisation and Huffman tables stand once a level, as Aperio's scanners do."""
    facts = {"description": "Aperio Image Library v12.0.15\r\n|MPP = 0.25|AppMag = 40"} if aperio else {}
    with tifffile.TiffWriter(path) as tif:
        for i, downsample in enumerate(downsamples):
            width, height = (round(length / downsample) for length in image.shape[1::-1])
            level = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            padded = np.pad(level, ((0, -height % tile[1]), (0, -width % tile[0]), (0, 0)), mode="edge")
            streams = [
                imagecodecs.jpeg8_encode(
                    np.ascontiguousarray(padded[y : y + tile[1], x : x + tile[0]]),
                    level=quality, colorspace="rgb", outcolorspace=colours, subsampling=subsampling,
                )
                for y in range(0, height, tile[1])
                for x in range(0, width, tile[0])
            ]  # fmt: skip
            tags = []
            if shared_tables:
                tables = b"".join(s for marker, s in segments(streams[0]) if marker in (0xDB, 0xC4))
                streams = [
                    b"\xff\xd8" + b"".join(s for marker, s in segments(stream) if marker not in (0xDB, 0xC4))
                    for stream in streams
                ]
                tags = [(347, 7, len(tables) + 4, b"\xff\xd8" + tables + b"\xff\xd9", True)]
            tif.write(
                iter(streams), shape=level.shape, dtype=np.uint8, tile=tile[::-1], photometric=colours,
                compression="jpeg", compressionargs={"outcolorspace": colours},
                subsampling={"420": (2, 2), "422": (2, 1)}.get(subsampling),
                extratags=tags, subfiletype=int(i > 0), metadata=None, software=False, **facts,
            )  # fmt: skip
    return path


def segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker segments of a JPEG stream after its SOI; the last, from SOS on, holds the rest."""
    at = 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield stream[at + 1], stream[at:end]
        at = end
    yield 0xDA, stream[at:]


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
