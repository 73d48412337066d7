"""Opening slides: scale and where it comes from, levels, pixels, damage."""

from pathlib import Path

import numpy as np
import pytest

from preprocessing.errors import SlideError
from preprocessing.slide import open_slide
from tests.slides import PINK, blob, plain, write_aperio


def test_the_file_gives_the_scale(tmp_path: Path) -> None:
    slide = open_slide(write_aperio(tmp_path / "a.svs", plain(600, 500), 0.25, 40), "S1", "a")
    assert (slide.level0_mpp, slide.mpp_source, slide.objective_power) == (0.25, "file", 40)
    assert (slide.width, slide.height) == (600, 500)
    source = slide.source()
    assert source["name"] == "a.svs"
    assert source["size"] == (tmp_path / "a.svs").stat().st_size
    assert len(source["quickhash"]) == 64


def test_no_scale_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", plain(600, 500), None)
    message = r"slide S12 \(.*a.svs\) has no mpp: add an 'mpp' column to the sheet, or set cohorts.biobank.mpp"
    with pytest.raises(SlideError, match=message):
        open_slide(path, "S12", "biobank")
    assert open_slide(path, "S12", "biobank", 0.4, "config").level0_mpp == 0.4


@pytest.mark.parametrize("mpp", [0.04, 5.5, 1000])
def test_an_absurd_scale_is_refused(tmp_path: Path, mpp: float) -> None:
    path = write_aperio(tmp_path / "a.svs", plain(600, 500), mpp)
    with pytest.raises(SlideError, match=f"absurd mpp, {mpp} µm/px .from the file; 0.05 to 5.0.*'mpp' column"):
        open_slide(path, "S1", "a")
    assert open_slide(write_aperio(tmp_path / "b.svs", plain(600, 500), None), "S1", "a", 0.5).level0_mpp == 0.5


def test_a_contradiction_is_refused_unless_the_sheet_has_spoken(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", plain(600, 500), 0.5, 40)
    with pytest.raises(SlideError, match=r"mpp 0.5 of the file contradicts 0.25, the objective power: add an 'mpp'"):
        open_slide(path, "S1", "a")
    with pytest.raises(SlideError, match=r"mpp 0.5 of the config contradicts 0.25"):
        open_slide(path, "S1", "a", 0.5, "config")
    assert open_slide(path, "S1", "a", 0.5, "sheet").warnings == [
        "mpp 0.5 of the sheet contradicts 0.25, the objective power"
    ]
    within_tolerance = write_aperio(tmp_path / "b.svs", plain(600, 500), 0.31, 40)
    assert open_slide(within_tolerance, "S1", "a").warnings == []


def test_levels_are_chosen_finer_or_equal(tmp_path: Path) -> None:
    # 2001 / 1000 is how pyramids are in the wild: a level that is coarser by rounding is still the level.
    slide = open_slide(write_aperio(tmp_path / "a.svs", plain(2001, 2001), 0.25, downsamples=(1, 2, 4)), "S1", "a")
    assert [slide.best_level(mpp) for mpp in (0.1, 0.25, 0.4, 0.5, 0.9, 1.0, 8.0)] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("downsamples", [(1,), (1, 4)])
@pytest.mark.parametrize("mpp", [0.5, 1.3, 2.0, 8.0])
def test_the_whole_slide_in_blocks_is_the_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downsamples: tuple[int, ...], mpp: float
) -> None:
    monkeypatch.setattr("preprocessing.slide.BLOCK_PX", 256)
    image = blob(1500, 1100, 400)
    slide = open_slide(write_aperio(tmp_path / "a.svs", image, 0.5, downsamples=downsamples), "S1", "a")
    whole = slide.read_whole(mpp)
    assert whole.shape == (round(1100 * 0.5 / mpp), round(1500 * 0.5 / mpp), 3)
    pink = np.abs(whole.astype(int) - PINK).max(axis=2) < 60
    ys, xs = np.nonzero(pink)
    assert xs.mean() * mpp == pytest.approx(750 * 0.5, abs=mpp)
    assert ys.mean() * mpp == pytest.approx(550 * 0.5, abs=mpp)
    assert pink.sum() * mpp**2 == pytest.approx(np.pi * 200**2, rel=0.05)


def test_beyond_the_edge_is_white(tmp_path: Path) -> None:
    slide = open_slide(write_aperio(tmp_path / "a.svs", plain(300, 300)), "S1", "a")
    region = slide.read_region(200, 0, 0, 200, 10)
    assert (region[:, 101:] == 255).all()
    assert np.abs(region[:, :99].astype(int) - PINK).max() < 6


def test_files_that_are_no_slides_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.svs").write_bytes(b"")
    (tmp_path / "text.svs").write_text("no slide")
    for name in ("empty.svs", "text.svs"):
        with pytest.raises(SlideError, match=rf"slide S1 \(.*{name}\) cannot be opened.*copy it anew"):
            open_slide(tmp_path / name, "S1", "a", 0.5)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SlideError, match=r"folder without .dcm files"):
        open_slide(tmp_path / "folder", "S1", "a", 0.5)


def test_a_missing_file_is_no_failed_slide(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_slide(tmp_path / "nowhere.svs", "S1", "a", 0.5)
