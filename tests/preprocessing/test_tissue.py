"""The tissue mask on painted pictures, where the right answer is known."""

from dataclasses import asdict
from typing import Any

import cv2
import numpy as np
import pytest

from preprocessing.quality import find_folds
from preprocessing.tile import TilingSettings
from preprocessing.tissue import Tissue, find_tissue

MPP = 8.0
PINK = (205, 140, 180)


def tissue_of(image: np.ndarray, **changes: Any) -> Tissue:
    settings = asdict(TilingSettings()) | changes
    names = ("saturation_threshold", "median_blur_um", "closing_um", "min_tissue_um2", "min_hole_um2")
    return find_tissue(image, MPP, **{name: settings[name] for name in names})


def glass(colour: tuple[int, int, int] = (243, 243, 243), size: int = 300) -> np.ndarray:
    """Glass with the noise of a camera, after a JPEG of middling quality."""
    noisy = np.array(colour) + np.random.default_rng(0).normal(0, 2, (size, size, 3))
    return through_jpeg(np.clip(noisy, 0, 255).astype(np.uint8))


def through_jpeg(image: np.ndarray, quality: int = 50) -> np.ndarray:
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])


THRESHOLDS = pytest.mark.parametrize("threshold", [8.0, "otsu"])


@THRESHOLDS
@pytest.mark.parametrize("colour", [(243, 243, 243), (255, 255, 255), (240, 232, 215), (225, 230, 240)])
def test_glass_is_no_tissue_whatever_its_tint(colour: tuple[int, int, int], threshold: float | str) -> None:
    assert not tissue_of(glass(colour), saturation_threshold=threshold).mask.any()


@THRESHOLDS
def test_a_slide_full_of_tissue_is_all_tissue(threshold: float | str) -> None:
    """Also where it is half pale and half dark, which Otsu alone would split."""
    image = np.full((300, 300, 3), (222, 190, 210), np.uint8)
    image[:, 150:] = (150, 70, 130)
    image = np.clip(image + np.random.default_rng(0).normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    assert tissue_of(image, saturation_threshold=threshold).mask.mean() > 0.99


@THRESHOLDS
@pytest.mark.parametrize("radius", [12, 60, 120])
def test_the_area_of_a_disc(radius: int, threshold: float | str) -> None:
    image = glass()
    cv2.circle(image, (150, 150), radius, PINK, -1)
    mask = tissue_of(through_jpeg(image, 80), saturation_threshold=threshold).mask
    assert mask.sum() == pytest.approx(np.pi * radius**2, rel=0.15)


def test_specks_and_holes_go_by_their_area() -> None:
    image = glass()
    cv2.rectangle(image, (50, 50), (200, 200), PINK, -1)
    cv2.circle(image, (90, 90), 5, (243, 243, 243), -1)  # hole of 5 000 µm²
    cv2.circle(image, (150, 150), 15, (243, 243, 243), -1)  # hole of 45 000 µm²
    cv2.circle(image, (250, 250), 7, PINK, -1)  # speck of 9 900 µm²
    mask = tissue_of(image, min_hole_um2=20_000, min_tissue_um2=20_000).mask
    assert mask[90, 90]
    assert not mask[150, 150]
    assert not mask[250, 250]
    kept = tissue_of(image, min_hole_um2=2_000, min_tissue_um2=2_000).mask
    assert not kept[90, 90]
    assert kept[250, 250]


@pytest.mark.parametrize("ink", [(30, 140, 60), (40, 70, 190), (200, 25, 25), (25, 25, 28)], ids=str)
def test_pen_marks_are_no_tissue(ink: tuple[int, int, int]) -> None:
    image = glass()
    cv2.circle(image, (100, 150), 40, PINK, -1)
    cv2.line(image, (220, 20), (260, 280), ink, 10)
    mask = tissue_of(image).mask
    assert mask[150, 100]
    assert mask[:, 180:].sum() < 0.05 * 10 * 260


@pytest.mark.parametrize("ink", [(30, 140, 60), (40, 70, 190), (200, 25, 25), (25, 25, 28)], ids=str)
def test_a_stroke_on_tissue_is_cut_out_and_nothing_else(ink: tuple[int, int, int]) -> None:
    """A ring of pen around tissue, as wide as a thin felt tip; the tissue is pale outside it."""
    image = glass()
    cv2.rectangle(image, (20, 20), (280, 280), (228, 208, 220), -1)
    cv2.circle(image, (150, 150), 60, PINK, -1)
    image[20:281, 20:281] = np.clip(
        image[20:281, 20:281] + np.random.default_rng(0).normal(0, 8, (261, 261, 1)), 0, 255
    )
    cv2.circle(image, (150, 150), 90, ink, 6)
    found = tissue_of(through_jpeg(image, 80))
    ring = (image == ink).all(axis=2)
    assert not found.mask[ring].any()
    assert found.ink[ring].mean() > 0.97
    assert not (found.mask & found.ink).any()
    far = cv2.dilate(ring.astype(np.uint8), np.ones((7, 7), np.uint8)) == 0
    assert found.mask[30:270, 30:270][far[30:270, 30:270]].all()
    assert not found.ink[far].any()


def test_folds_are_where_tissue_is_twice_as_dense() -> None:
    image = np.full((300, 300, 3), 255, np.uint8)
    light, dense = np.array(PINK) / 255, (np.array(PINK) / 255) ** 2
    cv2.rectangle(image, (20, 20), (280, 280), (light * 255).tolist(), -1)
    cv2.line(image, (60, 250), (250, 60), (dense * 255).tolist(), 20)
    image = np.clip(image * np.random.default_rng(0).normal(1, 0.1, (300, 300, 1)), 0, 255).astype(np.uint8)
    fold = cv2.line(np.zeros((300, 300), np.uint8), (60, 250), (250, 60), 1, 20) > 0
    found = tissue_of(image)
    folds = find_folds(found.balanced, found.mask, MPP, 1.6)
    assert (folds & fold).sum() > 0.8 * folds.sum()
    assert (folds & fold).sum() > 0.7 * fold.sum()
    assert not find_folds(found.balanced, found.mask, MPP, 2.5).any()


def test_colours_out_of_place_are_said_and_the_mask_still_holds() -> None:
    """YCbCr shown as RGB, as the DICOM sample decodes: the glass is bright red."""
    image = np.full((300, 300, 3), 243, np.uint8)
    cv2.circle(image, (150, 150), 60, (190, 110, 160), -1)
    false_colours = np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
    tissue = tissue_of(false_colours)
    assert tissue.warnings == [
        "implausible colours: the background is RGB (243, 128, 128), not white; check the slide's decoding"
    ]
    assert tissue.mask.sum() == pytest.approx(np.pi * 60**2, rel=0.1)
    assert tissue_of(image).warnings == []
