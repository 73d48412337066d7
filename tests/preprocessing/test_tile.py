"""Stage tile: the grid, the record, and slides that fail."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from preprocessing.tile import Outputs, TilingSettings, patch_grid, tile_slide
from tests.slides import WHITE, blob, plain, write_aperio

SMALL = TilingSettings(patch_px=64)


def outputs_in(folder: Path) -> Outputs:
    return Outputs(folder / "S1.npy", folder / "S1.json", folder / "S1.thumbnail.jpg", folder / "S1.mask.png")


def tile(path: Path, settings: TilingSettings = SMALL, **given: Any) -> tuple[np.ndarray, dict[str, Any]]:
    outputs = outputs_in(path.parent / "tiles")
    returned = tile_slide(path, "S1", "a", settings, outputs, **given)
    record = json.loads(outputs.record.read_text())
    assert record == returned
    assert cv2.imread(str(outputs.thumbnail)) is not None
    assert cv2.imread(str(outputs.mask)) is not None
    assert not list(outputs.record.parent.glob(".*"))
    coords = np.load(outputs.coords)
    assert coords.dtype == np.int32
    assert record["counts"]["kept"] == len(coords)
    assert record["counts"]["grid"] == sum(record["counts"][n] for n in ("kept", "little_tissue", "outside"))
    return coords, record


@pytest.mark.parametrize("patch", [224.0, 361.29, 448.0, 100.5])
def test_the_grid_does_not_drift_and_stays_inside(patch: float) -> None:
    width, height = 9013, 5021
    coords, counts = patch_grid(np.ones((70, 90), bool), (width, height), patch, 0.5)
    columns = np.unique(coords[:, 0])
    assert np.abs(columns - np.arange(len(columns)) * patch).max() <= 0.5
    assert (coords + round(patch) <= (width, height)).all()
    assert len(columns) in (int(width / patch), int(width / patch) - 1)
    np.testing.assert_array_equal(coords, coords[np.lexsort((coords[:, 0], coords[:, 1]))])  # row-major
    assert counts["little_tissue"] == 0


def test_patches_are_kept_by_their_exact_share_of_tissue() -> None:
    """Mask pixels of 10 level-0 px, patches of 25: 2.5 mask pixels, so shares fall between mask pixels."""
    mask = np.zeros((20, 20), bool)
    mask[:, :6] = True  # tissue up to x = 60: patch 0 whole, patch 1 whole, patch 2 (50-75) 10 / 25
    for share, columns in [(0.39, 3), (0.41, 2), (1.0, 2)]:
        coords, counts = patch_grid(mask, (200, 200), 25.0, share)
        assert sorted(set(coords[:, 0])) == [0, 25, 50][:columns]
        assert counts == {"grid": 64, "kept": 8 * columns, "little_tissue": 64 - 8 * columns, "outside": 0}


def test_a_slide_smaller_than_a_patch_has_an_empty_grid() -> None:
    coords, counts = patch_grid(np.ones((10, 10), bool), (100, 100), 224.0, 0.5)
    assert coords.shape == (0, 2)
    assert counts == {"grid": 1, "kept": 0, "little_tissue": 0, "outside": 1}


@pytest.mark.parametrize("mpp", [0.25, 0.31, 0.5])
def test_patches_cover_the_tissue_whatever_the_scanner(tmp_path: Path, mpp: float) -> None:
    """The same tissue scanned at three scales: same area, as many patches, in the same place."""
    extent_um, radius_um = 700, 250
    image = blob(round(extent_um / mpp), round(extent_um / mpp), round(radius_um / mpp))
    coords, record = tile(write_aperio(tmp_path / "a.svs", image, mpp))
    area_um2 = np.pi * radius_um**2
    assert record["status"] == "ok"
    assert record["patch_px_level0"] == pytest.approx(64 * 0.5 / mpp)
    assert record["magnification"] == 20
    assert record["tissue_mm2"] == pytest.approx(area_um2 / 1e6, rel=0.1)
    assert len(coords) == pytest.approx(area_um2 / 32**2, rel=0.1)
    centres_um = (coords + record["patch_px_level0"] / 2) * mpp
    np.testing.assert_allclose(centres_um.mean(axis=0), extent_um / 2, atol=16)
    assert np.hypot(*(centres_um - extent_um / 2).T).max() < radius_um + 32


def test_equal_runs_give_equal_files(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300))
    written = []
    for folder in ("1", "2"):
        tile_slide(path, "S1", "a", SMALL, outputs_in(tmp_path / folder))
        written.append({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()})
    assert len(written[0]) == 4
    assert written[0] == written[1]


def test_the_hash_follows_the_patches(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300))
    hashes = [
        tile(path, settings)[1]["tiling_hash"]
        for settings in (SMALL, TilingSettings(patch_px=64, min_tissue_share=0.9), TilingSettings(patch_px=32, mpp=1.0))
    ]
    assert len(set(hashes)) == 3


def test_a_slide_without_tissue_fails_with_a_reason(tmp_path: Path) -> None:
    coords, record = tile(write_aperio(tmp_path / "a.svs", plain(800, 800, WHITE), quality=60))
    assert len(coords) == 0
    assert record["status"] == "failed"
    assert "has no patch with at least 50% tissue" in record["reason"]


def test_a_slide_without_scale_fails_and_works_once_it_is_given(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300), None)
    coords, record = tile(path)
    assert (len(coords), record["status"]) == (0, "failed")
    assert "has no mpp: add an 'mpp' column" in record["reason"]
    assert record["source"]["size"] == path.stat().st_size
    coords, record = tile(path, mpp=0.5, mpp_source="sheet")
    assert (record["status"], record["mpp_source"]) == ("ok", "sheet")
    assert len(coords) > 50


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.98])
def test_a_truncated_slide_fails_and_does_not_crash(tmp_path: Path, share: float) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300), downsamples=(1, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    _, record = tile(path)
    assert record["status"] == "failed"
    assert "slide S1" in record["reason"]
    assert "copy it anew" in record["reason"]


def test_enlarged_patches_are_said(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300), 1.0)
    assert tile(path)[1]["warnings"] == ["patches are enlarged: the slide has 1 µm/px, asked for 0.5"]


def test_the_command(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300), None)
    command = [sys.executable, "-m", "preprocessing", "tile", "--slide", str(path), "--slide-id", "S1", "--cohort", "a"]
    command += ["--mpp", "0.5", "--settings", '{"patch_px": 64}']
    for name in ("coords", "record", "thumbnail", "mask"):
        command += [f"--{name}", str(getattr(outputs_in(tmp_path), name))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("S1: ok, ")
    misspelt = subprocess.run(
        [*command, "--settings", '{"patchpx": 64}'], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert misspelt.returncode != 0
    assert "tiling settings: unknown key 'patchpx'; did you mean 'patch_px'?" in misspelt.stderr
