"""The pixels of patches: the right places, OpenSlide's values, and what damage costs."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import jpeg_tiles, regions
from preprocessing.errors import SlideError
from preprocessing.grid import whole_grid
from preprocessing.patches import Batch, Opened, PatchReader, Reader, ReadingSettings, read_ahead
from preprocessing.slide import open_slide
from tests.slides import PINK, blob, tissue, write_aperio, write_tiled

COLOURS = [("ycbcr", "420"), ("ycbcr", "422"), ("ycbcr", "444"), ("rgb", "444")]
LINES_UM = 10  # distance of the painted lines


@pytest.mark.parametrize("reader", get_args(Reader))
@pytest.mark.parametrize(
    ("level0_mpp", "target_mpp", "downsamples"),
    [
        (0.5, 0.5, (1,)),
        (0.25, 0.5, (1,)),
        (0.25, 0.5, (1, 2, 4)),
        (0.31, 0.5, (1, 4)),
        (0.31, 1.0, (1, 2)),
        (0.2425, 1.0, (1, 4, 16)),
    ],
)
def test_a_painted_grid_lands_where_it_should(
    tmp_path: Path, level0_mpp: float, target_mpp: float, downsamples: tuple[int, ...], reader: Reader
) -> None:
    """Dark lines every 10 µm, painted at level 0: in every patch their centres are off by under a pixel."""
    width, height, patch_px = 2300, 1400, 96
    at_um = [(np.arange(n) + 0.5) * level0_mpp for n in (width, height)]
    dark = [np.abs((um - LINES_UM / 2) % LINES_UM - LINES_UM / 2) < 1 for um in at_um]  # lines 2 µm wide
    image = np.full((height, width, 3), PINK, np.uint8)
    image[dark[1][:, None] | dark[0][None]] = (60, 20, 60)
    path = write_aperio(tmp_path / "a.svs", image, level0_mpp, downsamples=downsamples)

    slide = open_slide(path, "S1", "a")
    patch_px_level0 = patch_px * target_mpp / level0_mpp
    coords = whole_grid((width, height), patch_px_level0)
    patches = np.empty((len(coords), patch_px, patch_px, 3), np.uint8)
    for batch in PatchReader(slide, coords, patch_px, target_mpp, ReadingSettings(reader)).batches(16, 2):
        patches[batch.rows] = batch.pixels

    centres_um = (np.arange(patch_px) + 0.5) * target_mpp
    for (x, y), patch in zip(coords, patches, strict=True):
        for start, profile in ((x, patch[..., 1].mean(axis=0)), (y, patch[..., 1].mean(axis=1))):
            darkness = profile.max() - profile
            seen = start * level0_mpp + centres_um
            for line in np.arange(0, seen[-1], LINES_UM):
                near = np.abs(seen - line) < 3
                if line - 3 > seen[0] and line + 3 < seen[-1]:
                    centre = np.average(seen[near], weights=darkness[near])
                    assert abs(centre - line) < target_mpp, (x, y, line)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_slides_own_tiles_give_the_pixels_of_openslide(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any size, tile, levels, colours, target mpp and place, those between pixels and over the edge included."""
    width, height = data.draw(st.tuples(*[st.integers(200, 700)] * 2), "size")
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    colours, subsampling = data.draw(st.sampled_from(COLOURS), "colours")
    path = write_tiled(
        tmp_path_factory.mktemp("slide") / "a.tif",
        noise // 2 + tissue(width, height) // 2,
        tile=data.draw(st.tuples(*[st.sampled_from([64, 112, 240, 256])] * 2), "tile"),
        downsamples=data.draw(st.sampled_from([(1,), (1, 2, 4), (1, 4), (1, 3.97)]), "downsamples"),
        colours=colours,
        subsampling=subsampling,
        shared_tables=data.draw(st.booleans(), "shared_tables"),
        aperio=data.draw(st.booleans(), "aperio"),
    )
    slide = open_slide(path, "S1", "a", mpp=0.25)
    step = data.draw(st.sampled_from([1, 1, 4]), "step")
    places = st.tuples(st.integers(0, (width - 1) // step), st.integers(0, (height - 1) // step))
    coords = np.array(data.draw(st.lists(places, min_size=1, max_size=12), "coords"), np.int32) * step
    mpp = data.draw(st.sampled_from([0.25, 0.31, 0.5, 0.9, 1.0, 1.31]), "mpp")
    own, openslide = (PatchReader(slide, coords, 48, mpp, ReadingSettings(reader)) for reader in ("exact", "openslide"))
    assert own.warnings == []
    assert own.route == "jpeg tiles"
    for row in range(len(coords)):
        np.testing.assert_array_equal(own.read(row), openslide.read(row))


def test_scaled_pixels_are_nearly_the_exact_ones(tmp_path: Path) -> None:
    path = write_tiled(tmp_path / "a.tif", tissue(1500, 1500, dark=True))
    slide = open_slide(path, "S1", "a", mpp=0.25)
    coords = whole_grid((1500, 1500), 224 * 4)
    for mpp, scale in ((0.5, 2), (1.0, 4), (0.7, 2)):
        exact, scaled = (PatchReader(slide, coords, 112, mpp, ReadingSettings(r)) for r in ("exact", "scaled"))
        assert scaled.regions is not None
        assert scaled.regions.scale == scale
        for row in range(len(coords)):
            assert np.abs(exact.read(row).astype(int) - scaled.read(row)).mean() < 1


def test_each_tile_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(write_tiled(tmp_path / "a.tif", tissue(1000, 900)), "S1", "a", mpp=0.25)
    coords = whole_grid((1000, 900), 100)
    reader = PatchReader(slide, coords, 100, 0.25)
    decoded: list[tuple[int, int]] = []
    decode = jpeg_tiles.JpegTiles.decode
    monkeypatch.setattr(
        jpeg_tiles.JpegTiles, "decode", lambda self, r, c, *rest: decoded.append((r, c)) or decode(self, r, c, *rest)
    )
    rows = np.concatenate([batch.rows for batch in reader.batches(7, 3)])
    assert sorted(rows.tolist()) == list(range(len(coords)))
    assert len(decoded) == len(set(decoded)) == 16
    assert reader.regions is not None
    assert not reader.regions.ready.any()
    assert len(reader.regions.free) == reader.regions.room


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.31])
def test_a_small_cache_and_many_readers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mpp: float
) -> None:
    monkeypatch.setattr(regions, "CACHE_BYTES", 6 * 64 * 64 * 3)  # a few tiles: batches wait for room and are halved
    path = write_tiled(tmp_path / "a.tif", tissue(700, 600, dark=True), tile=(64, 64))
    slide = open_slide(path, "S1", "a", mpp=0.25)
    coords = whole_grid((700, 600), 40 * mpp / 0.25)
    own, openslide = (PatchReader(slide, coords, 40, mpp, ReadingSettings(r)) for r in ("exact", "openslide"))
    assert own.regions is not None
    assert own.regions.room < 30 < len(own.regions.uses)
    rows = []
    for batch in own.batches(16, 4):
        rows += batch.rows.tolist()
        for row, pixels in zip(batch.rows.tolist(), batch.pixels, strict=True):
            np.testing.assert_array_equal(pixels, openslide.read(row))
    assert sorted(rows) == list(range(len(coords)))


def test_an_error_of_the_file_system_reaches_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a tile that will not come."""
    slide = open_slide(write_tiled(tmp_path / "a.tif", tissue(700, 600)), "S1", "a", mpp=0.25)
    reader = PatchReader(slide, whole_grid((700, 600), 50), 50, 0.25)

    def fetch(*_: object) -> bytes:
        raise OSError("the server is gone")

    monkeypatch.setattr(jpeg_tiles.JpegTiles, "_fetch", fetch)
    with ThreadPoolExecutor(3) as pool:
        readings = [pool.submit(reader.read_batch, rows) for rows in reader.chunks(20)]
        for reading in readings:
            with pytest.raises(OSError, match="the server is gone"):
                reading.result(timeout=60)


def test_tiles_that_differ_from_openslide_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(write_aperio(tmp_path / "a.svs", blob(900, 700, 250)), "S1", "a")
    decode = jpeg_tiles.JpegTiles.decode

    def decode_wrongly(*given: Any) -> np.ndarray:
        pixels = decode(*given)
        pixels ^= 1
        return pixels

    monkeypatch.setattr(jpeg_tiles.JpegTiles, "decode", decode_wrongly)
    reader = PatchReader(slide, np.array([[300, 300]]), 64, 0.5)
    assert reader.route == "openslide"
    assert "at (300, 300) they differ by up to 1 grey levels" in reader.warnings[0]
    np.testing.assert_array_equal(reader.read(0), slide.read_region(300, 300, 0, 64, 64))


def test_too_many_damaged_patches_stop_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(write_aperio(tmp_path / "a.svs", blob(900, 700, 250)), "S1", "a")
    reader = PatchReader(slide, np.zeros((100, 2), np.int32), 64, 0.5, ReadingSettings("openslide"))
    read: list[int] = []
    monkeypatch.setattr(
        type(slide), "read_region", lambda *_: read.append(1) or (_ for _ in ()).throw(SlideError("broken"))
    )
    with pytest.raises(SlideError, match="8 of 100 patches or more cannot be decoded"):
        list(reader.batches(8, 2))
    assert len(read) < 100


def test_readers_run_into_the_next_slides(tmp_path: Path) -> None:
    """While the first slide's first batch is looked at, the second one is being read and the third one is open."""
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250))
    seen: list[str] = []
    second_is_read, third_is_open = threading.Event(), threading.Event()

    class Slow(Opened):
        def __init__(self, name: str) -> None:
            super().__init__(PatchReader(open_slide(path, "S1", "a"), np.full((8, 2), 300), 64, 0.5))
            self.name = name
            if name == "third":
                third_is_open.set()

        def read(self, rows: np.ndarray, empty: Callable[..., np.ndarray]) -> Batch:
            seen.append(f"read {self.name}")
            if self.name == "second":
                second_is_read.set()
            return super().read(rows, empty)

    pieces = read_ahead([partial(Slow, name) for name in ("first", "second", "third", "fourth")], 8, 2)
    slide, batch = next(pieces)
    assert second_is_read.wait(10)
    assert third_is_open.wait(10)
    assert slide.name == "first"
    assert batch is not None
    assert len(batch.rows) == 8
    assert "read third" not in seen
    rest = [(slide.name, batch is None) for slide, batch in pieces]
    assert rest == [("first", True), *[(n, last) for n in ("second", "third", "fourth") for last in (False, True)]]


def test_a_slide_that_is_given_up_is_not_read_on(tmp_path: Path) -> None:
    path = write_aperio(tmp_path / "a.svs", blob(900, 700, 250))
    slides = [Opened(PatchReader(open_slide(path, "S1", "a"), np.full((40, 2), 300), 64, 0.5)) for _ in range(2)]
    found: dict[int, int] = {0: 0, 1: 0}
    for slide, batch in read_ahead([lambda s=s: s for s in slides], 1, 1):
        found[slides.index(slide)] += 0 if batch is None else len(batch.rows)
        slides[0].error = SlideError("enough")
    assert found[0] <= 3
    assert found[1] == 40
