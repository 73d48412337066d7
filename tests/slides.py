"""Small slides made on the fly, that OpenSlide opens."""

from pathlib import Path

import cv2
import numpy as np
import tifffile


def tissue_image(width: int, height: int, seed: int = 0, dark: bool = False) -> np.ndarray:
    """(height, width, 3) uint8 RGB: a pink disc with texture on white; `dark` adds dark nuclei."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 245, np.uint8)
    cv2.ellipse(image, (width // 2, height // 2), (width * 2 // 5, height * 2 // 5), 0, 0, 360, (205, 130, 175), -1)
    inside = image[..., 1] < 200
    image[inside] = np.clip(image[inside] + rng.normal(0, 12, (inside.sum(), 1)), 0, 255).astype(np.uint8)
    if dark:
        for x, y in rng.integers((width // 4, height // 4), (3 * width // 4, 3 * height // 4), (60, 2)):
            cv2.circle(image, (int(x), int(y)), 6, (70, 30, 110), -1, cv2.LINE_AA)
    return image


def write_slide(
    path: Path, width: int, height: int, seed: int = 0, dark: bool = False, mpp: float | None = 0.5
) -> None:
    """A JPEG-tiled TIFF with its resolution in the tags, unless `mpp` is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        path, tissue_image(width, height, seed, dark), tile=(256, 256), photometric="rgb", compression="jpeg",
        compressionargs={"level": 90}, metadata=None, **scale,
    )  # fmt: skip
