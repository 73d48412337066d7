"""Slide stores in the files of other tools, below a folder:

trident-h5  patches/{slide}_patches.h5 (coords), features_{encoder}/{slide}.h5 (features, coords)
clam        patches/{slide}.h5 (coords), h5_files/{slide}.h5 (features, coords), pt_files/{slide}.pt (features)
pt          {slide}.pt: the features alone
h5ad        {slide}.h5ad: AnnData, features in X, coords in obsm["spatial"], attributes in uns; needs anndata

Datasets and attributes have the tools' own names. Features are float32, which the tools' models take; every float16 is
one. Coordinates are level-0 pixels in all. What the tools hold as whole numbers is rounded (the side of a patch at
level 0, magnifications); the exact attributes stand beside, see `slidestore.foreign`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from slidestore.atomic import replace_when_whole
from slidestore.foreign import OWN, own_attributes
from slidestore.store import SlideStore, StoreError, open_store

# h5py, torch and anndata are imported where they are used: only what is written needs them.


def export_store(path: Path, form: str, folder: Path) -> list[Path]:
    """Write one store in the format `form` below `folder`; returns the files written.

    Raises StoreError for a store that is damaged or of a failed slide, ValueError for an unknown format.
    """
    if form not in WRITERS:
        raise ValueError(f"format {form!r} is none of {', '.join(WRITERS)}")
    store = open_store(path)
    if store.attributes.failure:
        failure = store.attributes.failure
        raise StoreError(
            f"{path} is of a slide that failed ({failure['stage']}: {failure['reason']}): nothing to export"
        )
    return WRITERS[form](store, folder)


def write_trident(store: SlideStore, folder: Path) -> list[Path]:
    """TRIDENT's patches and features, as below one of its folders such as 20x_256px_0px_overlap."""
    facts = store.attributes
    patches = folder / "patches" / f"{facts.slide_id}_patches.h5"
    features = folder / f"features_{facts.encoder}" / f"{facts.slide_id}.h5"
    attributes = {
        "patch_size": facts.patch_px,
        "patch_size_level0": round(known(facts.patch_px_level0)),
        "level0_magnification": round(10 / known(facts.level0_mpp)),
        "target_magnification": round(facts.magnification),
        "overlap": 0,
        "name": facts.slide_id,
        "savetodir": str(patches.parent),
        "level0_width": facts.level0_width,
        "level0_height": facts.level0_height,
        OWN: own_attributes(facts),
    }
    write_h5(patches, {"coords": store.coords}, {"coords": attributes})
    named = {"name": facts.slide_id, "savetodir": str(features.parent)}
    arrays = {"features": store.features.astype(np.float32), "coords": store.coords}
    write_h5(features, arrays, {"features": named, "coords": attributes})
    return [patches, features]


def write_clam(store: SlideStore, folder: Path) -> list[Path]:
    """CLAM's patches, as cut from level 0, and its two files of features."""
    facts = store.attributes
    patches = folder / "patches" / f"{facts.slide_id}.h5"
    h5, pt = folder / "h5_files" / f"{facts.slide_id}.h5", folder / "pt_files" / f"{facts.slide_id}.pt"
    size = (known(facts.level0_width), known(facts.level0_height))
    attributes = {
        "patch_size": round(known(facts.patch_px_level0)),
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": facts.slide_id,
        "save_path": str(patches.parent),
        OWN: own_attributes(facts),
    }
    write_h5(patches, {"coords": store.coords}, {"coords": attributes})
    write_h5(h5, {"features": store.features.astype(np.float32), "coords": store.coords}, {})
    write_tensor(pt, store.features)
    return [patches, h5, pt]


def write_pt(store: SlideStore, folder: Path) -> list[Path]:
    """The features alone."""
    path = folder / f"{store.attributes.slide_id}.pt"
    write_tensor(path, store.features)
    return [path]


def write_anndata(store: SlideStore, folder: Path) -> list[Path]:
    """X (N, D) float32; obsm["spatial"] (N, 2), the patches' top-left corners, level-0 pixels; uns["slidestore"], the
    attributes."""
    try:
        from anndata import AnnData
    except ModuleNotFoundError as error:
        raise StoreError("h5ad needs the package anndata: pip install anndata, or gmmamba[anndata]") from error
    facts = store.attributes
    path = folder / f"{facts.slide_id}.h5ad"
    data = AnnData(
        X=store.features.astype(np.float32),
        obsm={"spatial": store.coords},
        uns={OWN: {name: value for name, value in asdict(facts).items() if value is not None}},
    )
    data.obs_names = [f"{facts.slide_id}_{i}" for i in range(len(store.coords))]
    with replace_when_whole(path) as part:
        data.write_h5ad(part)
    return [path]


WRITERS: dict[str, Callable[[SlideStore, Path], list[Path]]] = {
    "trident-h5": write_trident,
    "clam": write_clam,
    "pt": write_pt,
    "h5ad": write_anndata,
}


def known(value: Any) -> Any:
    assert value is not None, "a slide that did not fail has its scale and size"
    return value


def write_h5(path: Path, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Datasets and the attributes of each, whole or not at all."""
    import h5py

    with replace_when_whole(path) as part, h5py.File(part, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array).attrs.update(attributes.get(name, {}))


def write_tensor(path: Path, features: np.ndarray) -> None:
    import torch

    with replace_when_whole(path) as part:
        torch.save(torch.from_numpy(features.astype(np.float32)), part)
