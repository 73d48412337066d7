"""The grid: where its patches lie and what becomes of each, whatever the scale, the overlap and the slide."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preprocessing.grid import lay_grid
from preprocessing.slide import Slide
from preprocessing.tile import REASONS, TilingSettings, choose_patches
from preprocessing.tissue import Tissue

LENGTH = st.integers(20, 2000)


def choose(size: tuple[int, int], mpp: float, settings: TilingSettings, mask: np.ndarray, ink: np.ndarray) -> Any:
    slide = SimpleNamespace(width=size[0], height=size[1], level0_mpp=mpp)
    tissue = Tissue(mask, ink, np.zeros((*mask.shape, 3), np.uint8), 8.0, (255, 255, 255), [])
    return choose_patches(cast(Slide, slide), mask, tissue, 8.0, settings)


@settings(deadline=None)
@given(
    size=st.tuples(LENGTH, LENGTH),
    mpp=st.floats(0.1, 1.0),
    target=st.floats(0.25, 2.0),
    patch_px=st.integers(32, 300),
    overlap=st.floats(0, 0.6),
    cap=st.integers(1, 40),
    seed=st.integers(0, 9),
)
@example((20, 375), 0.5410741447321209, 0.5410741447321209, 32, 0.53125, 1, 0)
def test_whatever_the_slide(
    size: tuple[int, int], mpp: float, target: float, patch_px: int, overlap: float, cap: int, seed: int
) -> None:
    """Inside the slide, evenly spaced, in order, every patch counted once, the cap kept, always the same."""
    ink, mask = np.random.default_rng(seed).random((2, 30, 40)) < [[[0.1]], [[0.7]]]
    plain = TilingSettings(patch_px=patch_px, mpp=target, overlap_px=int(overlap * patch_px), max_ink_share=0.1)
    capped = TilingSettings(**{**vars(plain), "max_patches": cap, "sampling_seed": 3})
    coords, counts = choose(size, mpp, plain, mask & ~ink, ink)
    few, few_counts = choose(size, mpp, capped, mask & ~ink, ink)

    step = (patch_px - plain.overlap_px) * target / mpp
    assert coords.dtype == np.int32
    assert (coords >= 0).all()
    assert (coords + round(patch_px * target / mpp) <= size).all()
    assert np.abs(coords - np.rint(coords / step) * step).max(initial=0) <= 0.5 + 1e-6
    for found, number in ((coords, counts), (few, few_counts)):
        np.testing.assert_array_equal(found, found[np.lexsort((found[:, 0], found[:, 1]))])  # row-major
        assert number["kept"] == len(found)
        assert number["grid"] == len(found) + sum(number[reason] for reason in REASONS)
        # Where a length is a multiple of the step, a rounding error decides whether one more begins at its very end.
        fewest, most = (np.prod([np.ceil(length / step / k) for length in size]) for k in (1 + 1e-9, 1 - 1e-9))
        assert fewest <= number["grid"] <= most
    assert len(few) == min(cap, len(coords))
    assert set(map(tuple, few)) <= set(map(tuple, coords))
    np.testing.assert_array_equal(few, choose(size, mpp, capped, mask & ~ink, ink)[0])


def test_another_seed_draws_others() -> None:
    everything, nothing = np.ones((10, 10), bool), np.zeros((10, 10), bool)
    drawn = [
        choose((2000, 2000), 0.5, TilingSettings(patch_px=50, max_patches=20, sampling_seed=seed), everything, nothing)
        for seed in (0, 1)
    ]
    assert {tuple(c) for c in drawn[0][0]} != {tuple(c) for c in drawn[1][0]}


@pytest.mark.parametrize("patch", [224.0, 361.29, 448.0, 100.5])
def test_the_grid_does_not_drift(patch: float) -> None:
    grid = lay_grid((9013, 5021), patch, patch)
    assert np.abs(grid.xs - np.arange(len(grid.xs)) * patch).max() <= 0.5
    assert len(grid.xs) in (int(9013 / patch), int(9013 / patch) - 1)


def test_shares_are_exact_between_the_pixels_of_the_mask() -> None:
    """Mask pixels of 10 level-0 px, patches of 25: 2.5 mask pixels, so shares fall between mask pixels."""
    mask = np.zeros((20, 20), bool)
    mask[:, :6] = True  # tissue up to x = 60: patch 0 whole, patch 1 whole, patch 2 (50-75) 10 / 25
    shares = lay_grid((200, 200), 25.0, 25.0).shares(mask)
    np.testing.assert_allclose(shares, np.tile([1, 1, 0.4, 0, 0, 0, 0, 0], (8, 1)), atol=1e-12)


def test_a_slide_smaller_than_a_patch_has_an_empty_grid() -> None:
    coords, counts = choose((100, 100), 0.5, TilingSettings(), np.ones((10, 10), bool), np.zeros((10, 10), bool))
    assert coords.shape == (0, 2)
    assert {name: count for name, count in counts.items() if count} == {"grid": 1, "outside": 1}
