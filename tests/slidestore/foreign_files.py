"""Files as TRIDENT and CLAM write them: the names are those of their published code."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

TRIDENT = {  # 20x patches of 256 px from a 40x slide
    "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20, "overlap": 0,
    "name": "S1", "savetodir": "job/20x_256px_0px_overlap/patches", "level0_width": 10240, "level0_height": 8192,
}  # fmt: skip
CLAM = {
    "patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0), "downsampled_level_dim": (2560, 2048),
    "level_dim": (2560, 2048), "name": "S1", "save_path": "RESULTS/patches",
}  # fmt: skip


def grid(patches: int = 12, step: int = 512) -> np.ndarray:
    """(N, 2) int64 level-0 pixels, column after column, as both tools walk over a slide."""
    return np.array([(x * step, y * step) for x in range(4) for y in range(3)][:patches])


def bag(patches: int = 12, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((patches, width)).astype(np.float32)


def write_h5(path: Path, attributes: dict[str, Any] | None = None, **arrays: np.ndarray) -> Path:
    """Datasets; `attributes` are those of `coords`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        if attributes:
            file["coords"].attrs.update(attributes)
    return path


def write_trident(folder: Path, slide: str, coords: np.ndarray, features: np.ndarray, **attributes: Any) -> Path:
    facts = TRIDENT | {"name": slide} | attributes
    write_h5(folder / "patches" / f"{slide}_patches.h5", facts, coords=coords)
    return write_h5(folder / "features_uni_v1" / f"{slide}.h5", facts, features=features, coords=coords)


def write_clam(folder: Path, slide: str, coords: np.ndarray, features: np.ndarray) -> Path:
    write_h5(folder / "patches" / f"{slide}.h5", CLAM | {"name": slide}, coords=coords)
    (folder / "pt_files").mkdir(exist_ok=True)
    torch.save(torch.from_numpy(features), folder / "pt_files" / f"{slide}.pt")
    return write_h5(folder / "h5_files" / f"{slide}.h5", features=features, coords=coords.astype(np.int32))
