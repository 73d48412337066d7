"""One file of groups a cohort and grouping (`groups/{grouping}.npz`; by features `groups/{encoder}/{grouping}.npz`):
the group of every patch of every slide.

| array       | shape, dtype   | meaning                                                                    |
|-------------|----------------|----------------------------------------------------------------------------|
| `slide_ids` | (S,) str       | slides with at least one patch                                             |
| `offsets`   | (S + 1,) int64 | slide i has the rows offsets[i] … offsets[i + 1] - 1 of the other two      |
| `coords`    | (M, 2) int32   | (x, y) of the patch's top-left corner, level-0 pixels, as in its store     |
| `labels`    | (M,) int16     | group of the patch, 0 … G - 1                                              |
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidestore.atomic import replace_when_whole

SlideGroups = tuple[NDArray[np.int32], NDArray[np.int16]]


def write_groups(path: Path, groups: Mapping[str, SlideGroups]) -> None:
    """Write the coordinates (N, 2) and labels (N,) of each slide, whole or not at all."""
    coords, labels = [pair[0] for pair in groups.values()], [pair[1] for pair in groups.values()]
    with replace_when_whole(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            slide_ids=np.array(list(groups), dtype=np.str_),
            offsets=np.cumsum([0, *map(len, labels)], dtype=np.int64),
            coords=np.concatenate([np.empty((0, 2)), *coords]).astype(np.int32),
            labels=np.concatenate([np.empty(0), *labels]).astype(np.int16),
        )


def read_groups(path: Path) -> dict[str, SlideGroups]:
    """Coordinates (N, 2) and labels (N,) of each slide of a groups file."""
    with np.load(path) as file:
        ids, offsets, coords, labels = (file[name] for name in ("slide_ids", "offsets", "coords", "labels"))
    bounds = zip(ids.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return {slide: (coords[start:end], labels[start:end]) for slide, start, end in bounds}
