"""Patches a second of every way to read a slide: ``python -m benchmarks.reading``.

One 40x slide of 16384 x 16384 px (JPEG quality 80, tiles of 256 px, levels 1, 4 and 16) is made on the spot. All its
patches of 224 px are read at 20x and 10x, with one thread and with two, by ours and by three ways that people use:

  OpenSlide + PIL     a region a patch, resized by Pillow, as CLAM and TRIDENT read
  supertiles          OpenSlide, regions of 2048 px that are cut into patches, resized by OpenCV
  fastslide           fastslide, a region a patch, resized by OpenCV
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import tifffile

from benchmarks.measure import Clock, Step, cpu_name, interleaved_medians, markdown_table, write_section
from preprocessing.demo_cohort import PlannedSlide, paint_slide
from preprocessing.grid import whole_grid
from preprocessing.jpeg_tiles import jpeg_tiles
from preprocessing.patches import PatchReader, Reader, ReadingSettings
from preprocessing.slide import Slide, open_slide, resize

MPP, TILE, PATCH_PX, BATCH = 0.25, 256, 224, 64
PERIOD = 2048  # the painted pixels are repeated, mirrored, so that neighbours fit
LEVELS = (1, 4, 16)
SUPERTILE = 2048


def make_slide(path: Path, size: int, quality: int = 80, levels: tuple[int, ...] = LEVELS) -> Path:
    """A tissue-filled slide of size x size px in Aperio's form; each different tile stands in the file once."""
    painted, _ = paint_slide(PlannedSlide("bench", "bench", "normal", "", (0, 1), (0, 2)))
    middle = [(length - PERIOD // 2) // 2 for length in painted.shape[:2]]
    quarter = painted[middle[0] :, middle[1] :][: PERIOD // 2, : PERIOD // 2]
    period = np.pad(quarter, ((0, PERIOD // 2), (0, PERIOD // 2), (0, 0)), mode="symmetric")
    with tifffile.TiffWriter(path) as tif:
        for downsample in levels:
            length = PERIOD // downsample
            shrunk = cv2.resize(period, (length, length), interpolation=cv2.INTER_AREA)
            repeats = max(1, TILE // length)
            block = np.tile(shrunk, (repeats, repeats, 1))
            across = block.shape[0] // TILE
            streams = [
                imagecodecs.jpeg8_encode(
                    np.ascontiguousarray(block[y * TILE :, x * TILE :][:TILE, :TILE]), level=quality
                )
                for y in range(across)
                for x in range(across)
            ]
            grid = size // downsample // TILE
            tif.write(
                (streams[y * across + x] if max(x, y) < across else b"\0" for y in range(grid) for x in range(grid)),
                shape=(grid * TILE, grid * TILE, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="ycbcr",
                compression="jpeg", subsampling=(2, 2), metadata=None,
                description=f"Aperio Image Library, drawn by gmmamba\r\n{size}x{size}|AppMag = 40|MPP = {MPP}",
            )  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tif:
        for page, downsample in zip(tif.pages, levels, strict=True):
            assert isinstance(page, tifffile.TiffPage)
            grid, across = size // downsample // TILE, max(1, PERIOD // downsample // TILE)
            same = [y % across * grid + x % across for y in range(grid) for x in range(grid)]
            for tag in (page.tags["TileOffsets"], page.tags["TileByteCounts"]):
                values = tag.value if isinstance(tag.value, tuple) else (tag.value,)
                tag.overwrite([values[i] for i in same])
    return path


Read = Callable[[int, int], np.ndarray]


def each(read: Read, coords: np.ndarray, threads: int) -> Step:
    """A step that reads every patch by `read(x, y)`, level-0 pixels, batch after batch as a loader does."""

    def read_batch(first: int) -> np.ndarray:
        return np.stack([read(int(x), int(y)) for x, y in coords[first : first + BATCH]])

    def step() -> None:
        with ThreadPoolExecutor(threads) as pool:
            consume(pool.map(read_batch, range(0, len(coords), BATCH)), len(coords))

    return step


def consume(batches: Iterable[np.ndarray], expected: int) -> None:
    if (found := sum(len(batch) for batch in batches)) != expected:
        raise RuntimeError(f"{found} patches were read, {expected} were asked for")


def by_pillow(slide: Slide, level: int, side: int) -> Read:
    def read(x: int, y: int) -> np.ndarray:
        region = slide.handle.read_region((x, y), level, (side, side)).convert("RGB")
        return np.asarray(region.resize((PATCH_PX, PATCH_PX)))

    return read


def by_fastslide(path: Path, level: int, side: int) -> Read:
    import fastslide  # which benchmarks.encoding, in need of our slide only, does without

    handle = fastslide.FastSlide.from_file_path(str(path))

    def read(x: int, y: int) -> np.ndarray:
        region = handle.read_region((x // LEVELS[level], y // LEVELS[level]), level, (side, side))
        return resize(region.numpy(), (PATCH_PX, PATCH_PX))

    return read


def by_supertiles(slide: Slide, coords: np.ndarray, level: int, side: int, threads: int) -> Step:
    edge = SUPERTILE // side * side
    blocks: dict[tuple[int, int], int] = {}
    for x, y in (coords // LEVELS[level] // edge).tolist():
        blocks[x, y] = blocks.get((x, y), 0) + 1

    def read_block(block: tuple[int, int]) -> np.ndarray:
        corner = (block[0] * edge * LEVELS[level], block[1] * edge * LEVELS[level])
        region = np.asarray(slide.handle.read_region(corner, level, (edge, edge)))[..., :3]
        width, height = (
            min(edge, length - at * edge) // side
            for length, at in zip(slide.handle.level_dimensions[level], block, strict=True)
        )
        return np.stack(
            [
                resize(region[i * side : (i + 1) * side, j * side : (j + 1) * side], (PATCH_PX, PATCH_PX))
                for i in range(height)
                for j in range(width)
            ]
        )

    def step() -> None:
        with ThreadPoolExecutor(threads) as pool:
            consume(pool.map(read_block, blocks), len(coords))

    return step


def by_ours(slide: Slide, coords: np.ndarray, mpp: float, reader: Reader, threads: int) -> Step:
    def pixels() -> Iterator[np.ndarray]:
        planned = PatchReader(slide, coords, PATCH_PX, mpp, ReadingSettings(reader))
        if (planned.route == "openslide") != (reader == "openslide"):
            raise RuntimeError(f"{reader}: read by {planned.route}: {planned.warnings}")
        for batch in planned.batches(BATCH, threads):
            yield batch.pixels

    return lambda: consume(pixels(), len(coords))


def decoder_alone(slide: Slide, level: int, scale: int, threads: int) -> Step:
    """Every tile of the level decoded once, and nothing else: no way of reading can be faster."""
    tiles = jpeg_tiles(slide, level)
    if tiles is None:
        raise RuntimeError("the slide's tiles cannot be read directly")

    def decode_row(row: int) -> None:
        for column in range(tiles.columns):
            tiles.decode(row, column, scale)

    def step() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode_row, range(tiles.rows)))

    return step


def measure(path: Path, mpp: float, threads: int, repeats: int, clock: Clock) -> list[list[str]]:
    slide = open_slide(path, "bench", "bench")
    level = slide.best_level(mpp)
    side = round(PATCH_PX * mpp / MPP / LEVELS[level])
    coords = whole_grid((slide.width, slide.height), PATCH_PX * mpp / MPP)
    # A slide each with a cache of its own, so that none finds what another has decoded.
    own = {
        name: open_slide(path, "bench", "bench") for name in ("pillow", "supertiles", "exact", "scaled", "openslide")
    }
    steps: dict[str, Step] = {
        "OpenSlide + PIL": each(by_pillow(own["pillow"], level, side), coords, threads),
        "supertiles": by_supertiles(own["supertiles"], coords, level, side, threads),
        "fastslide": each(by_fastslide(path, level, side), coords, threads),
        "ours, openslide": by_ours(own["openslide"], coords, mpp, "openslide", threads),
        "ours, exact": by_ours(own["exact"], coords, mpp, "exact", threads),
        "ours, scaled": by_ours(own["scaled"], coords, mpp, "scaled", threads),
    }
    if mpp == 2 * MPP:
        steps["the decoder alone"] = decoder_alone(own["exact"], level, 1, threads)
        steps["the decoder alone, scaled"] = decoder_alone(own["scaled"], level, 2, threads)
    medians = interleaved_medians(steps, repeats, budget=10_000, clock=clock)
    first = medians["OpenSlide + PIL"]
    return [
        [f"{10 / mpp:g}x", str(threads), name, f"{len(coords) / taken:.0f}", f"{first / taken:.1f}"]
        for name, taken in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=16384, help="side of the slide in pixels, a multiple of 4096")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--to", type=float, nargs="+", default=[0.5, 1.0], help="mpp of the patches; default: 0.5 1.0")
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds: for a machine that others use too")
    parser.add_argument("--write", type=Path, help="the Markdown page to put the table into")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    clock = time.process_time if options.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        path = make_slide(Path(folder) / "slide.svs", options.size)
        rows = [
            row
            for mpp in options.to
            for threads in options.threads
            for row in measure(path, mpp, threads, options.repeats, clock)
        ]
    unit = "patches/CPU s" if options.cpu else "patches/s"
    text = f"""**{cpu_name()}**, OpenSlide {openslide.__library_version__}, {time.strftime("%Y-%m-%d")}; a 40x \
slide of {options.size} x {options.size} px, patches of {PATCH_PX} px; medians of {options.repeats} interleaved passes \
after one to warm up. `python -m benchmarks.reading {" ".join(sys.argv[1:])}`

{markdown_table(["to", "threads", "read by", unit, "÷ OpenSlide + PIL"], rows)}"""
    print(text)
    if options.write:
        write_section(options.write, "reading", text)


if __name__ == "__main__":
    main()
