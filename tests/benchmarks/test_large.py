"""Peak memory of tiling and encoding does not grow with the slide: what the page on performance promises."""

from pathlib import Path

import pytest

from benchmarks.large import LEVELS, tile_and_encode
from benchmarks.measure import peak_rss
from benchmarks.reading import make_slide


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """From 8k² to 64k² px at 10x; ± 20 %, as all that grows are coordinates, features and the small picture."""
    peaks = []
    for size in (8192, 65536):
        (tmp_path / str(size)).mkdir()
        path = make_slide(tmp_path / str(size) / "slide.svs", size, levels=LEVELS)
        peaks.append(peak_rss(tile_and_encode, path, 1.0, 2))
    assert peaks[1] < 1.2 * peaks[0], peaks
