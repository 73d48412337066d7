"""Stage tile: the grid, the record, and slides that fail."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from preprocessing.tile import REASONS, Outputs, TilingSettings, tile_slide
from tests.slides import WHITE, blob, plain, write_aperio

SMALL = TilingSettings(patch_px=64)


def outputs_in(folder: Path) -> Outputs:
    return Outputs(*(folder / f"S1{end}" for end in (".npy", ".json", ".thumbnail.jpg", ".mask.png", ".geojson")))


def tile(path: Path, settings: TilingSettings = SMALL, **given: Any) -> tuple[np.ndarray, dict[str, Any]]:
    outputs = outputs_in(path.parent / "tiles")
    returned = tile_slide(path, "S1", "a", settings, outputs, **given)
    record = json.loads(outputs.record.read_text())
    assert record == returned
    assert cv2.imread(str(outputs.thumbnail)) is not None
    assert cv2.imread(str(outputs.mask)) is not None
    assert json.loads(outputs.contours.read_text())["type"] == "FeatureCollection"
    assert not list(outputs.record.parent.glob(".*"))
    coords = np.load(outputs.coords)
    assert coords.dtype == np.int32
    assert record["counts"]["kept"] == len(coords)
    assert record["counts"]["grid"] == sum(record["counts"][n] for n in ("kept", *REASONS))
    return coords, record


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
    assert len(written[0]) == 5
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


def test_an_outline_or_a_picture_says_where_tissue_is(tmp_path: Path) -> None:
    """The contours that tiling wrote give the same patches again; a picture of the left half gives those of it."""
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300))
    found, record = tile(path)
    given = tmp_path / "own.geojson"
    given.write_bytes(outputs_in(tmp_path / "tiles").contours.read_bytes())
    again, same = tile(path, tissue_mask=given)
    assert abs(len(again) - len(found)) <= 5  # outlines are simplified, and a patch is four pixels of the mask wide
    assert same["tissue_mm2"] == pytest.approx(record["tissue_mm2"], rel=0.06)
    assert (same["tissue_mask"], same["saturation_threshold"]) == ("own.geojson", None)

    left = np.zeros((90, 90), np.uint8)
    left[:, :45] = 1
    cv2.imwrite(str(tmp_path / "left.png"), left)
    coords, record = tile(path, tissue_mask=tmp_path / "left.png")
    assert (record["status"], record["tissue_mm2"]) == ("ok", pytest.approx(0.45**2 / 2, rel=0.02))
    assert set(coords[:, 0]) == {0, 64, 128, 192, 256, 320, 384}

    (tmp_path / "broken.geojson").write_text('{"type": "Polyg')
    coords, record = tile(path, tissue_mask=tmp_path / "broken.geojson")
    assert (len(coords), record["status"]) == (0, "failed")
    assert "export it anew from QuPath" in record["reason"]


def test_what_spoils_patches_is_counted(tmp_path: Path) -> None:
    """A slide full of tissue with an area out of focus, a black corner and a pale strip, at thresholds that look."""
    image = np.full((1280, 1280, 3), (200, 120, 170), np.uint8)
    noise = np.random.default_rng(0).normal(0, 25, (2, 1280, 1280, 1))
    noise[1] = np.kron(noise[1, ::32, ::32, 0], np.ones((32, 32)))[..., None]
    image = np.clip(image + noise.sum(axis=0), 0, 255).astype(np.uint8)
    image[:256, :256] = cv2.GaussianBlur(image, (0, 0), 8)[:256, :256]
    image[:256, 1024:] = 5
    image[1024:, :512] = (248, 236, 242)
    path = write_aperio(tmp_path / "a.svs", image)
    given = tmp_path / "all.png"
    cv2.imwrite(str(given), np.ones((10, 10), np.uint8))
    looking = TilingSettings(patch_px=128, min_sharpness=15, max_white_share=0.9, max_black_share=0.5)
    _, record = tile(path, looking, tissue_mask=given)
    counts = {reason: count for reason, count in record["counts"].items() if count}
    assert counts == {"grid": 100, "kept": 84, "white": 8, "black": 4, "blurred": 4}
    _, record = tile(path, TilingSettings(patch_px=128, max_patches=30), tissue_mask=given)
    counts = {reason: count for reason, count in record["counts"].items() if count}
    assert counts == {"grid": 100, "kept": 30, "over_cap": 70}


def test_enlarged_patches_are_said(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300), 1.0)
    assert tile(path)[1]["warnings"] == ["patches are enlarged: the slide has 1 µm/px, asked for 0.5"]


def test_the_command(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 900, 300), None)
    command = [sys.executable, "-m", "preprocessing", "tile", "--slide", str(path), "--slide-id", "S1", "--cohort", "a"]
    command += ["--mpp", "0.5", "--settings", '{"patch_px": 64}']
    for name in ("coords", "record", "thumbnail", "mask", "contours"):
        command += [f"--{name}", str(getattr(outputs_in(tmp_path), name))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("S1: ok, ")
    misspelt = subprocess.run(
        [*command, "--settings", '{"patchpx": 64}'], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert misspelt.returncode != 0
    assert "tiling settings: unknown key 'patchpx'; did you mean 'patch_px'?" in misspelt.stderr
