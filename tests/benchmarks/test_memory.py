"""What a slide may cost in memory: what the page on performance promises."""

import pytest

from benchmarks.steps import Cell, peak_memory


@pytest.mark.slow
@pytest.mark.parametrize(("N", "train", "most"), [(100_000, False, 3e9), (30_000, True, 11e9)])
def test_a_large_slide_fits(N: int, train: bool, most: float) -> None:
    """Beyond torch, the model and the slide, which stay below 1 GB."""
    assert 1e8 < peak_memory(Cell("numba", N, 10, train, "cpu", threads=1)) < most
