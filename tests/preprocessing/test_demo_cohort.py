"""The demo cohort: what OpenSlide reads of it, its oddities, its truth, and that the seed decides every pixel."""

import csv
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from preprocessing.demo_cohort import make_demo_cohort, paint_slide, place_discs, plan_cohort

SLIDES = 6


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_demo_cohort(folder, SLIDES, seed=3)
    return folder


@pytest.fixture(scope="module")
def sheet(cohort: Path) -> dict[str, dict[str, str]]:
    """Rows of the sheet by oddity; "" is one of the plain slides."""
    rows = read_csv(cohort / "slides.csv")
    assert len(rows) == SLIDES
    return {slide.oddity: row for slide, row in zip(plan_cohort(SLIDES, 3), rows, strict=True)}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def saturation(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[..., 1])


@pytest.mark.parametrize("oddity", ["", "pen", "sliver", "no_mpp"])
def test_openslide_reads_scale_and_levels(cohort: Path, sheet: dict[str, dict[str, str]], oddity: str) -> None:
    row = sheet[oddity]
    with openslide.OpenSlide(cohort / row["path"]) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.properties["openslide.objective-power"] == "20"
        assert slide.properties.get("openslide.mpp-x") == (None if oddity == "no_mpp" else "0.5")
        assert slide.properties.get("openslide.mpp-y") == slide.properties.get("openslide.mpp-x")
        assert row["mpp"] == ("0.5" if oddity == "no_mpp" else "")
        assert slide.level_downsamples == (1, 4)
        assert all(2304 <= side <= 2816 for side in slide.dimensions)
        assert set(slide.associated_images) == {"thumbnail"}


def test_the_truncated_file_cannot_be_opened(cohort: Path, sheet: dict[str, dict[str, str]]) -> None:
    path = cohort / sheet["truncated"]["path"]
    assert 100_000 < path.stat().st_size < (cohort / sheet[""]["path"]).stat().st_size
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(path)


def test_ink_sliver_and_plain_tissue(cohort: Path, sheet: dict[str, dict[str, str]]) -> None:
    shares = {}
    for oddity in ("", "pen", "sliver"):
        with openslide.OpenSlide(cohort / sheet[oddity]["path"]) as slide:
            pixels = np.asarray(slide.read_region((0, 0), 1, slide.level_dimensions[1]).convert("RGB"))
        blue = pixels[..., 2].astype(int) - pixels[..., 0] > 80
        shares[oddity] = (saturation(pixels) > 30).mean(), blue.mean()
    assert 0.4 < shares[""][0] < 0.75
    assert 0.001 < shares["sliver"][0] < 0.03
    assert shares["pen"][1] > 0.01
    assert shares[""][1] == shares["sliver"][1] == 0


def test_foci_are_dark_and_inside_the_tissue_of_tumour_slides(cohort: Path) -> None:
    rows = {row["slide_id"]: row for row in read_csv(cohort / "slides.csv")}
    foci = read_csv(cohort / "foci.csv")
    assert {focus["slide_id"] for focus in foci} == {s for s, row in rows.items() if row["label"] == "tumour"}
    for focus in foci:
        x, y, radius = (int(focus[key]) for key in ("x", "y", "radius_px"))
        with openslide.OpenSlide(cohort / rows[focus["slide_id"]]["path"]) as slide:
            region = np.asarray(slide.read_region((x - radius, y - radius), 0, (2 * radius, 2 * radius)).convert("RGB"))
            whole = np.asarray(slide.get_thumbnail((600, 600)))
        assert (saturation(region) > 30).mean() > 0.8
        assert region.mean() < whole[saturation(whole) > 30].mean() - 15


def test_the_seed_decides_every_pixel_and_the_label_nothing_but_the_foci() -> None:
    slide = next(slide for slide in plan_cohort(SLIDES, 3) if slide.label == "tumour" and not slide.oddity)
    (tumour, foci), (again, foci_again) = paint_slide(slide), paint_slide(slide)
    assert foci == foci_again
    assert 2 <= len(foci) <= 3
    assert np.array_equal(tumour, again)

    normal, none = paint_slide(replace(slide, label="normal"))
    assert none == []
    elsewhere = np.ones(tumour.shape[:2], np.uint8)
    for x, y, radius in foci:
        cv2.circle(elsewhere, (round(x), round(y)), round(1.4 * radius) + 30, 0, -1)
    # The scanner's noise is another, so it is blurred away.
    smooth = [cv2.GaussianBlur(image.astype(np.float32), (0, 0), 4) for image in (tumour, normal)]
    assert np.abs(smooth[0] - smooth[1])[elsewhere > 0].max() < 12


def test_discs_lie_within_the_slide_and_apart() -> None:
    # Tissue up to every edge: glands that overhang the slide cannot be painted (seen with seeds 1 and 3).
    taken = [(300.0, 400.0, 100.0)]
    placed = place_discs(np.random.default_rng(0), np.ones((800, 600), np.float32), taken, 30, (40, 60), gap=10)
    assert len(placed) > 10
    assert len(taken) == len(placed) + 1
    for x, y, radius in placed:
        assert radius + 6 < x < 600 - radius
        assert radius + 6 < y < 800 - radius
    for i, (x, y, radius) in enumerate(taken):
        assert all(np.hypot(x - a, y - b) > radius + c + 10 for a, b, c in taken[:i])
    assert place_discs(np.random.default_rng(0), np.ones((800, 600), np.float32), [], 0, (40, 60), gap=10) == []


def test_patients_labels_and_oddities_of_the_whole_plan() -> None:
    plan = plan_cohort(30, 0)
    assert plan == plan_cohort(30, 0) != plan_cohort(30, 1)
    labels = [slide.label for slide in plan]
    assert 12 <= labels.count("tumour") <= 18
    of_patient: dict[str, list[str]] = {}
    for slide in plan:
        of_patient.setdefault(slide.patient_id, []).append(slide.label)
    assert sorted({len(slides) for slides in of_patient.values()}) == [1, 2]
    assert all(len(set(slides)) == 1 for slides in of_patient.values())
    assert sorted(slide.oddity for slide in plan if slide.oddity) == ["no_mpp", "pen", "sliver", "truncated"]


def test_an_interrupted_cohort_has_no_sheet(tmp_path: Path) -> None:
    (tmp_path / "slides.csv").write_text("of an earlier cohort")
    (tmp_path / "slides").write_text("a file where the slides' folder should be")
    with pytest.raises(FileExistsError):
        make_demo_cohort(tmp_path, SLIDES)
    assert not (tmp_path / "slides.csv").exists()


def test_too_few_slides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slides=5: the demo cohort needs 6 or more"):
        make_demo_cohort(tmp_path, 5)
