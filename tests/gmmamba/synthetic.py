"""A tiny dataset on disk, in the form that the stages before training leave: stores, slide table, groups, thumbnails.

Two classes; in a slide of the second class a few patches have a shifted first feature, so that it can be learnt.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from slidestore import StoreAttributes, write_store

CLASSES = ["normal", "tumour"]
ENCODER = "tiny"
PATCH_PX, GRID_W, GRID_H = 224, 12, 8
DIM = 16


def make_dataset(
    folder: Path, patients: int = 15, seed: int = 0, cohort: str = "synthetic", weights_sha256: str = "ab" * 32
) -> tuple[dict[str, Path], dict[str, Path]]:
    """The slide tables and the groups (location-4), cohort -> file. Every third patient has two slides; besides
    the ready slides there is a failed and an excluded one."""
    rng = np.random.default_rng(seed)
    rows, grouped = [], []
    for patient in range(patients):
        label = CLASSES[patient % 2]
        for number in range(2 if patient % 3 == 0 else 1):
            slide_id = f"{cohort}-{patient:02d}-{number}"
            coords, features, labels = make_slide(rng, label == CLASSES[1])
            store = folder / f"{slide_id}.zarr.zip"
            write_store(store, coords, features, attributes_of(slide_id, cohort, weights_sha256))
            thumbnail = folder / f"{slide_id}.thumbnail.jpg"
            tint = rng.integers(150, 255, (GRID_H, GRID_W, 3)).astype(np.uint8)
            Image.fromarray(tint).resize((480, 320)).save(thumbnail)
            grouped.append((slide_id, coords, labels))
            rows.append((slide_id, f"P{patient:02d}", label, "ready", "", len(coords), store, thumbnail))
    rows.append((f"{cohort}-broken", "P90", CLASSES[0], "failed", "tile: the file ends early", 0, "", ""))
    rows.append((f"{cohort}-other", "P91", CLASSES[1], "excluded", "not of this organ", 0, "", ""))
    table = folder / f"{cohort}.csv"
    columns = ["slide_id", "patient_id", "label", "status", "reason", "n_patches", "store", "thumbnail"]
    pd.DataFrame(rows, columns=columns).to_csv(table, index=False)
    groups = folder / f"{cohort}-location-4.npz"
    np.savez(
        groups,
        slide_ids=np.array([slide_id for slide_id, _, _ in grouped]),
        offsets=np.cumsum([0] + [len(coords) for _, coords, _ in grouped]),
        coords=np.concatenate([coords for _, coords, _ in grouped]),
        labels=np.concatenate([labels for _, _, labels in grouped]),
    )
    return {cohort: table}, {cohort: groups}


def make_slide(rng: np.random.Generator, positive: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """coords (N, 2) int32 level-0 px, features (N, DIM) float16, group labels (N,) int16."""
    y, x = np.divmod(np.flatnonzero(rng.random(GRID_W * GRID_H) < 0.6), GRID_W)
    features = rng.normal(size=(len(x), DIM))
    if positive:
        features[rng.choice(len(x), 5, replace=False), 0] += 4
    labels = (x >= GRID_W // 2) + 2 * (y >= GRID_H // 2)
    coords = np.stack([x, y], axis=1) * PATCH_PX
    return coords.astype(np.int32), features.astype(np.float16), labels.astype(np.int16)


def attributes_of(slide_id: str, cohort: str, weights_sha256: str) -> StoreAttributes:
    return StoreAttributes(
        slide_id=slide_id, cohort=cohort, patch_px=224, patch_px_level0=float(PATCH_PX), mpp=0.5, level0_mpp=0.5,
        level0_width=GRID_W * PATCH_PX, level0_height=GRID_H * PATCH_PX, magnification=20.0, encoder=ENCODER,
        encoder_weights_sha256=weights_sha256, tiling_hash="t", source={"name": f"{slide_id}.svs"},
        created_by="tests",
    )  # fmt: skip


def experiment(name: str, **training: object) -> dict[str, object]:
    """An experiment as the config resolves it; `name` is a method."""
    return {
        "name": name,
        "method": name,
        "model": {},
        "grouping": "location-4" if name == "gmmamba" else None,
        "training": {"epochs": 3, "select_after": 1, "learning_rate": 1e-3} | training,
        "encoder": ENCODER,
        "classes": CLASSES,
    }
