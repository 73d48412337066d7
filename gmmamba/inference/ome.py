"""A heat map as a pyramidal OME-TIFF with its physical pixel size, to lay beside the slide in QuPath or napari."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from slidestore.atomic import replace_when_whole

PER_PATCH = 4  # pixels along the side of a patch
SMALLEST = 256  # the pyramid ends when both sides are below
TILE = 256


def raster(
    coords: NDArray[np.int32], side: float, slide_size: tuple[int, int], values: NDArray[np.float64]
) -> tuple[NDArray[np.float32], float]:
    """The map (H, W) float32 of one value (N,) a patch, over the whole slide, and the level-0 pixels a pixel is wide.

    coords (N, 2), side, slide_size (width, height): level-0 pixels. A pixel belongs to the patches that hold its
    centre; it has the mean of theirs, 0 outside.
    """
    pixel = side / PER_PATCH
    width, height = (int(np.ceil(extent / pixel)) for extent in slide_size)
    total, count = np.zeros((height, width)), np.zeros((height, width))
    first = np.ceil(coords / pixel - 0.5).astype(int)
    last = np.ceil((coords + side) / pixel - 0.5).astype(int)
    for (left, top), (right, bottom), value in zip(first, last, values, strict=True):
        total[top:bottom, left:right] += value
        count[top:bottom, left:right] += 1
    return (total / np.maximum(count, 1)).astype(np.float32), pixel


def write_ome(path: Path, channels: Mapping[str, NDArray[np.float32]], pixel_um: float) -> None:
    """Write maps (H, W), by name, as the channels of one image; pixel_um: µm that a pixel is wide."""
    levels = [np.stack(list(channels.values()))]
    while max(levels[-1].shape[1:]) >= SMALLEST:
        levels.append(_halved(levels[-1]))
    metadata = {
        "axes": "CYX",
        "Name": path.name.split(".")[0],
        "PhysicalSizeX": pixel_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": pixel_um,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": list(channels)},
    }
    how: dict[str, Any] = {"photometric": "minisblack", "tile": (TILE, TILE), "compression": "zlib"}
    with replace_when_whole(path) as part, tifffile.TiffWriter(part, ome=True) as tiff:
        tiff.write(levels[0], subifds=len(levels) - 1, metadata=metadata, software=False, **how)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, software=False, **how)


def _halved(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, H, W) to (C, ceil(H/2), ceil(W/2)): means of 2 x 2 pixels, edges repeated."""
    padded = np.pad(maps, [(0, 0), (0, maps.shape[1] % 2), (0, maps.shape[2] % 2)], mode="edge")
    c, height, width = padded.shape
    return padded.reshape(c, height // 2, 2, width // 2, 2).mean(axis=(2, 4), dtype=np.float32)
