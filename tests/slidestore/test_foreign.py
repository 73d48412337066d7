"""Features of TRIDENT and CLAM become stores, stores become their files, and what does not fit is named."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from slidestore import StoreError, open_store, write_store
from slidestore.export import export_store
from slidestore.foreign import ForeignFiles, import_store, read_features, read_patches
from tests.slidestore.foreign_files import CLAM, TRIDENT, bag, grid, write_clam, write_h5, write_trident
from tests.slidestore.test_store import ATTRIBUTES

ROOT = Path(__file__).parents[2]


def imported(files: ForeignFiles, folder: Path, mpp: float | None = None) -> Any:
    import_store(files, folder / "S1.zarr.zip", "S1", "a", "uni", mpp, "tests")
    return open_store(folder / "S1.zarr.zip", "uni")


def rows(coords: np.ndarray, features: np.ndarray) -> dict[tuple[int, ...], bytes]:
    return {tuple(xy): row.astype(np.float16).tobytes() for xy, row in zip(coords.tolist(), features, strict=True)}


def test_trident(tmp_path: Path) -> None:
    path = write_trident(tmp_path, "S1", grid(), bag())
    store = imported(ForeignFiles("trident-h5", path), tmp_path)
    facts = store.attributes
    assert (facts.patch_px, facts.patch_px_level0, facts.mpp, facts.level0_mpp) == (256, 512, 0.5, 0.25)
    assert (facts.level0_width, facts.level0_height, facts.magnification) == (10240, 8192, 20)
    assert (facts.encoder, facts.source["name"], facts.failure) == ("uni", "S1.h5", None)
    assert rows(store.coords, store.features) == rows(grid(), bag())
    order = np.lexsort((store.coords[:, 0], store.coords[:, 1]))
    assert np.array_equal(order, np.arange(len(order))), "rows are in row-major order"
    # A slide of 0.2325 µm/px that TRIDENT calls 40x: the true scale wins, the pixels are what they are.
    true = imported(ForeignFiles("trident-h5", path), tmp_path, mpp=0.2325).attributes
    assert (true.level0_mpp, true.mpp, true.patch_px_level0) == (0.2325, 0.465, 512)


def test_trident_s_older_files_and_published_ones(tmp_path: Path) -> None:
    """Features whose coords have no attributes, with a leading axis; a slide whose size nobody wrote down."""
    facts = {name: value for name, value in TRIDENT.items() if not name.startswith("level0_w")}
    patches = write_h5(tmp_path / "p.h5", facts, coords=grid())
    path = write_h5(tmp_path / "f.h5", features=bag()[None], coords=grid()[None])
    store = imported(ForeignFiles("trident-h5", path, patches), tmp_path)
    assert rows(store.coords, store.features) == rows(grid(), bag())
    assert (store.attributes.level0_width, store.attributes.level0_height) == (2048, 1536)
    assert store.attributes.source["level0_size"] == "extent of the patches"


@pytest.mark.parametrize("form", ["clam-h5", "pt"])
def test_clam(tmp_path: Path, form: str) -> None:
    path = write_clam(tmp_path, "S1", grid(step=1024), bag())
    path = path if form == "clam-h5" else tmp_path / "pt_files/S1.pt"
    files = ForeignFiles(form, path, tmp_path / "patches/S1.h5")
    store = imported(files, tmp_path, mpp=0.25)
    facts = store.attributes
    assert (facts.patch_px, facts.patch_px_level0, facts.mpp, facts.level0_mpp) == (256, 1024, 1.0, 0.25)
    assert (facts.level0_width, facts.level0_height) == (10240, 8192)
    assert rows(store.coords, store.features) == rows(grid(step=1024), bag())
    with pytest.raises(StoreError, match=r"S1.h5: CLAM records no mpp: add the slide's 'mpp'"):
        read_patches(files)


NAN = bag()
NAN[3, 1] = np.nan
CONTRADICTION = TRIDENT | {"patch_size_level0": 256}


@pytest.mark.parametrize(
    ("attributes", "arrays", "message"),
    [
        (None, {"features": bag()}, "no dataset 'coords', it has features"),
        (TRIDENT, {"coords": grid()}, "no dataset 'features', it has coords: is this the file of the features"),
        (None, {"features": bag(), "coords": grid()}, "'coords' has no attribute patch_size, .* as `patches`"),
        (TRIDENT, {"features": bag(11), "coords": grid()}, r"misaligned rows, features \(11, 8\) float32 for 12"),
        (TRIDENT, {"features": bag()[0], "coords": grid()}, r"misaligned rows, features \(8,\)"),
        (TRIDENT, {"features": NAN, "coords": grid()}, r"1 of 12 patches are not finite \(first: row 3\)"),
        (TRIDENT, {"features": bag() * 1e6, "coords": grid()}, "beyond float16"),
        (TRIDENT, {"features": bag(0), "coords": grid(0).reshape(0, 2)}, "at least one patch"),
        (TRIDENT, {"features": bag(), "coords": grid() + 0.5}, "not all whole level-0 pixels"),
        (TRIDENT, {"features": bag(), "coords": grid() - 1}, "not all whole level-0 pixels"),
        (TRIDENT, {"features": bag(), "coords": 9 * grid()}, "x = 13824, outside the slide .level0_width 10240"),
        (CONTRADICTION, {"features": bag(), "coords": grid()}, "attributes of 'coords' contradict each other"),
        (TRIDENT | {"patch_size": 0}, {"features": bag(), "coords": grid()}, "patch_size of 'coords' is 0"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, attributes: dict[str, Any] | None, arrays: dict[str, np.ndarray], message: str
) -> None:
    files = ForeignFiles("trident-h5", write_h5(tmp_path / "S1.h5", attributes, **arrays))
    with pytest.raises(StoreError, match=f"S1.h5.*{message}"):
        read_features(files, read_patches(files))


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    path = write_trident(tmp_path, "S1", grid(), bag())
    with pytest.raises(StoreError, match=r"by the tool's magnifications, the sheet or the config says 0\.5"):
        read_patches(ForeignFiles("trident-h5", path), level0_mpp=0.5)
    other = write_h5(tmp_path / "other.h5", CLAM, coords=grid()[::-1])
    with pytest.raises(StoreError, match=r"S1.h5 and .*other.h5 do not have the same coordinates in the same order"):
        read_patches(ForeignFiles("clam-h5", path, other), 0.25)
    with pytest.raises(ValueError, match="keeps no scale: give the tool's h5 of coordinates as `patches`"):
        ForeignFiles("pt", path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(StoreError, match=r"S1.h5: (no whole HDF5 file|'.*' cannot be read)"):
        read_patches(ForeignFiles("trident-h5", path))
    torch.save({"features": torch.zeros(3)}, tmp_path / "S1.pt")
    patches = read_patches(ForeignFiles("pt", tmp_path / "S1.pt", tmp_path / "patches/S1_patches.h5"))
    with pytest.raises(StoreError, match=r"S1.pt holds a dict, expected one tensor"):
        read_features(ForeignFiles("pt", tmp_path / "S1.pt", tmp_path / "patches/S1_patches.h5"), patches)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with sizes that no other tool can hold: patches of 361.29 px at level 0."""
    write_store(tmp_path / "S1.zarr.zip", grid()[np.lexsort(grid().T)], bag(), ATTRIBUTES)
    return tmp_path / "S1.zarr.zip"


@pytest.mark.parametrize(
    ("form", "features", "patches", "back"),
    [
        ("trident-h5", "features_resnet18/S1.h5", None, "trident-h5"),
        ("trident-h5", "features_resnet18/S1.h5", "patches/S1_patches.h5", "trident-h5"),
        ("clam", "h5_files/S1.h5", "patches/S1.h5", "clam-h5"),
        ("clam", "pt_files/S1.pt", "patches/S1.h5", "pt"),
    ],
)
def test_there_and_back(store: Path, tmp_path: Path, form: str, features: str, patches: str | None, back: str) -> None:
    written = export_store(store, form, tmp_path / "out")
    assert sorted(written) == sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    files = ForeignFiles(back, tmp_path / "out" / features, patches and tmp_path / "out" / patches)
    import_store(files, tmp_path / "again.zarr.zip", "S1", "a", "resnet18", None, "somebody else")
    assert (tmp_path / "again.zarr.zip").read_bytes() == store.read_bytes()


def test_exports_have_the_tools_own_names(store: Path, tmp_path: Path) -> None:
    for form in ("trident-h5", "clam"):
        for path in export_store(store, form, tmp_path / form):
            if path.suffix != ".h5":
                assert torch.load(path, weights_only=True).dtype == torch.float32
                continue
            with h5py.File(path) as file:
                names = {"coords", "features"} if "patches" not in path.parts else {"coords"}
                attributes = set(file["coords"].attrs) - {"slidestore"}
                assert (path, set(file)) == (path, names)
                assert attributes == set({"trident-h5": TRIDENT, "clam": {} if len(names) == 2 else CLAM}[form])
                if "patch_size_level0" in attributes:
                    assert file["coords"].attrs["patch_size_level0"] == 361


def test_pt_is_the_features_alone(store: Path, tmp_path: Path) -> None:
    [path] = export_store(store, "pt", tmp_path)
    assert path == tmp_path / "S1.pt"
    np.testing.assert_array_equal(torch.load(path, weights_only=True).numpy(), open_store(store).features)


def test_anndata(store: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="needs gmmamba[anndata], which needs a pandas below 3")
    [path] = export_store(store, "h5ad", tmp_path)
    data, opened = anndata.read_h5ad(path), open_store(store)
    np.testing.assert_array_equal(data.X, opened.features)
    np.testing.assert_array_equal(data.obsm["spatial"], opened.coords)
    assert data.uns["slidestore"]["patch_px_level0"] == 361.29
    assert data.uns["slidestore"]["source"]["name"] == "S1.svs"


def test_a_failed_slide_is_not_exported(tmp_path: Path) -> None:
    failed = replace(ATTRIBUTES, failure={"stage": "tile", "reason": "truncated"})
    write_store(tmp_path / "s.zarr.zip", np.empty((0, 2)), np.empty((0, 0)), failed)
    with pytest.raises(StoreError, match=r"failed \(tile: truncated\): nothing to export"):
        export_store(tmp_path / "s.zarr.zip", "pt", tmp_path)


def test_the_command_line(store: Path, tmp_path: Path) -> None:
    def slidestore(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "slidestore", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    run = slidestore("export", "--format", "trident-h5", "--output", f"{tmp_path}/out", str(store))
    assert (run.returncode, len(run.stdout.splitlines())) == (0, 2), run.stderr
    options = ["import", "--format", "trident-h5", "--cohort", "a", "--encoder", "resnet18", "--output"]
    run = slidestore(*options, f"{tmp_path}/back", f"{tmp_path}/out/features_resnet18/S1.h5")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "back/S1.zarr.zip").read_bytes() == store.read_bytes()
    run = slidestore(*options, f"{tmp_path}/back", str(store))
    assert run.returncode == 1
    assert "no whole HDF5 file" in run.stderr
    assert "Traceback" not in run.stderr
