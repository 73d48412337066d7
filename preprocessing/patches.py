"""The pixels of patches, read ahead of whoever uses them. Never imports torch.

Each patch is read at the coarsest level that is at least as fine as the target mpp and brought to exactly patch_px by
area averaging. How the level is read is its `reader`:

  exact      from the slide's own JPEG or JPEG 2000 tiles where it has them: OpenSlide's pixels, bit for bit
  scaled     the same, but where the target is half as fine or less the decoder itself shrinks by 2, 4 or 8
  nvjpeg     the same, decoded and shrunk on an NVIDIA GPU (preprocessing.nvjpeg): nearly OpenSlide's pixels
  openslide  by OpenSlide, which also reads what has no such tiles

The tiles are trusted where they agree with OpenSlide on a seeded sample of the slide's patches, else OpenSlide reads
it. A patch that cannot be decoded costs itself, not the slide.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from preprocessing.errors import SlideError
from preprocessing.jpeg_tiles import DamagedTileError, JpegTiles, MissingTileError, jpeg_tiles
from preprocessing.slide import LEVEL_TOLERANCE, Slide, resize

if TYPE_CHECKING:
    from preprocessing.regions import PlannedRegions

Reader = Literal["exact", "scaled", "nvjpeg", "openslide"]
Result = TypeVar("Result")
SAMPLE = 8  # patches of a slide that are read both ways
OPENED_AHEAD = 2  # slides
STRIP_PX = 8192  # of the level: patches are read strip by strip, so that the tiles of a row of patches stay in memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadingSettings:
    """How patches are read; the keys of `reading` in the config."""

    reader: Reader = "exact"
    max_damaged_share: float = 0.05  # of a slide's patches that may be unreadable before the slide fails


@dataclass(frozen=True)
class Batch:
    """Patches as they come: pixels (B, P, P, 3) uint8 RGB of the patches `rows` (B,) of the coordinates.

    pixels: an array, or, by nvjpeg, a tensor on the GPU. damaged: rows that were tried with these and could not be
    decoded.
    """

    rows: np.ndarray
    pixels: Any
    damaged: np.ndarray


def in_order(tasks: Iterable[Callable[[], Result]], threads: int) -> Iterator[Result]:
    """What the tasks return, in their order; `threads` of them run ahead, so that threads + 1 results are held at most.

    Tasks are taken from their iterable as late as can be; those that have not begun are dropped with the iterator.
    """
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                ahead.append(pool.submit(task))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


class PatchReader:
    """Reads the patches of one slide; threads may share it. Each patch is read once.

    route: "jpeg tiles" or "openslide". warnings: in words, for the record.
    """

    def __init__(
        self, slide: Slide, coords: np.ndarray, patch_px: int, mpp: float, settings: ReadingSettings | None = None
    ) -> None:
        """coords: (N, 2), level-0 pixels; mpp: µm per pixel of the patches, P = patch_px."""
        self.slide, self.coords, self.patch_px = slide, coords, patch_px
        self.settings = settings or ReadingSettings()
        self.warnings: list[str] = []
        self.level = slide.best_level(mpp)
        self.downsample = slide.level_downsamples[self.level]
        # A patch is a whole number of pixels of the level: the error, below half such a pixel, does not add up.
        self.side = max(1, round(patch_px * mpp / slide.level0_mpp / self.downsample))
        self._reopening = threading.Lock()
        self.regions = self._plan(mpp)

    @property
    def route(self) -> str:
        return "openslide" if self.regions is None else "jpeg tiles"

    def read(self, row: int) -> np.ndarray:
        """(P, P, 3) uint8 RGB. Raises SlideError where the patch cannot be decoded."""
        pixels = np.empty((1, self.patch_px, self.patch_px, 3), np.uint8)
        for error in self._read(np.array([row]), pixels).values():
            raise error
        return np.asarray(pixels[0])

    def batches(self, batch_size: int, threads: int) -> Iterator[Batch]:
        """All patches, in the order in which they are read; `threads` work ahead, one batch each.

        At most threads + 1 batches are held. Raises SlideError as soon as more than max_damaged_share are damaged.
        """
        damaged = 0
        for batch in in_order((partial(self.read_batch, rows) for rows in self.chunks(batch_size)), threads):
            damaged += len(batch.damaged)
            self.check_share(damaged)
            yield batch

    def chunks(self, batch_size: int) -> list[np.ndarray]:
        """The rows of every batch, in the order in which they are best read."""
        strip = self.coords[:, 0] / self.downsample // self._strip_px(batch_size)
        order = np.lexsort((self.coords[:, 0], self.coords[:, 1], strip))
        return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]

    def _strip_px(self, batch_size: int) -> int:
        return STRIP_PX

    def read_batch(self, rows: np.ndarray, empty: Callable[..., np.ndarray] = np.empty) -> Batch:
        """The patches of these rows; `empty(shape, dtype)` gives the memory for their pixels."""
        pixels = empty((len(rows), self.patch_px, self.patch_px, 3), np.uint8)
        errors = self._read(rows, pixels)
        if not errors:
            return Batch(rows, pixels, rows[:0])
        readable = np.ones(len(rows), bool)
        for i, error in errors.items():
            readable[i] = False
            log.warning("patch at (%d, %d): %s", *self.coords[rows[i]], error)
        return Batch(rows[readable], pixels[readable], rows[~readable])

    def _read(self, rows: np.ndarray, pixels: np.ndarray) -> dict[int, SlideError]:
        """The patches of these rows into pixels (B, P, P, 3); what is wrong with some, by their place in `rows`."""
        errors: dict[int, SlideError] = {}
        by_openslide = range(len(rows)) if self.regions is None else []
        for i, error in (self.regions.read(rows, pixels) if self.regions is not None else {}).items():
            if isinstance(error, MissingTileError):
                by_openslide = [*by_openslide, i]  # which fills it from other levels
            else:
                errors[i] = self.slide.damaged(error)
        for i in by_openslide:
            try:
                pixels[i] = resize(self._read_by_openslide(int(rows[i])), (self.patch_px, self.patch_px))
            except SlideError as error:
                errors[i] = error
        return errors

    def check_share(self, damaged: int) -> None:
        """SlideError where so many damaged patches are more than max_damaged_share of all."""
        allowed = self.settings.max_damaged_share
        if damaged > allowed * len(self.coords):
            raise SlideError(
                f"slide {self.slide.slide_id} ({self.slide.path}): {damaged} of {len(self.coords)} patches or"
                f" more cannot be decoded, reading.max_damaged_share allows {allowed:g}: the file is damaged; copy it"
                " anew from its source, or set exclude in the sheet"
            )

    def _read_by_openslide(self, row: int) -> np.ndarray:
        """(side, side, 3) uint8 RGB. After an error OpenSlide refuses all reads: a second opening tells whether it is
        this patch that is damaged, and serves the others."""
        x, y = self.coords[row].tolist()
        try:
            return self.slide.read_region(x, y, self.level, self.side, self.side)
        except SlideError:
            with self._reopening:
                self.slide.reopen()
                return self.slide.read_region(x, y, self.level, self.side, self.side)

    def _plan(self, mpp: float) -> "PlannedRegions | None":
        """The slide's own tiles if they are wanted, there, and right."""
        from preprocessing.regions import PlannedRegions  # numba, which tiling by the defaults does without

        if self.settings.reader == "openslide" or not len(self.coords):
            return None
        tiles = jpeg_tiles(self.slide, self.level)
        if tiles is None:
            return None
        corners = self.coords / self.downsample
        if (problem := self._compare(tiles, corners)) is not None:
            self.warnings.append(f"read by OpenSlide, not from the slide's own JPEG tiles: {problem}")
            return None
        scale = 1
        if self.settings.reader == "scaled":
            finest = mpp * LEVEL_TOLERANCE / (self.slide.level0_mpp * self.downsample)
            scale = max(k for k in tiles.scales if k <= max(1, finest))
        return PlannedRegions(tiles, corners, self.side, scale, self.patch_px)

    def _compare(self, tiles: JpegTiles, corners: np.ndarray) -> str | None:
        """What speaks against the tiles, where a sample of patches is read both ways; None where nothing does.

        A tile that the JPEG decoder finds faulty is damage, where OpenSlide may show noise; if most are, they are of
        a kind that OpenSlide knows better.
        """
        sample = np.random.default_rng(0).permutation(len(corners))[:SAMPLE]
        from preprocessing.regions import PlannedRegions

        found, faulty = np.empty((1, self.side, self.side, 3), np.uint8), []
        regions = PlannedRegions(tiles, corners[sample], self.side)
        for i, row in enumerate(sample.tolist()):
            try:
                expected = self._read_by_openslide(row)
            except SlideError:
                continue
            if (error := regions.read(np.array([i]), found).get(0)) is not None:
                if isinstance(error, DamagedTileError):
                    faulty.append(str(error))
            elif not np.array_equal(found[0], expected):
                largest = np.abs(found[0].astype(int) - expected).max()
                return f"at {tuple(self.coords[row].tolist())} they differ by up to {largest} grey levels"
        return faulty[0] if len(faulty) > len(sample) / 2 else None


@dataclass
class Opened:
    """A slide on its way through the readers."""

    reader: PatchReader | None = None  # None where nothing is to be read
    error: Exception | None = None  # why it is given up: what is not yet read of it is left out

    def read(self, rows: np.ndarray, empty: Callable[..., np.ndarray]) -> Batch:
        """An empty batch where the slide is given up."""
        if self.error is None and self.reader is not None:
            try:
                return self.reader.read_batch(rows, empty)
            except OSError as error:  # of the file system
                self.error = error
        return Batch(rows[:0], np.empty((0, 0, 0, 3), np.uint8), rows[:0])


OpenedSlide = TypeVar("OpenedSlide", bound=Opened)


def read_ahead(
    openings: Iterable[Callable[[], OpenedSlide]],
    batch_size: int,
    threads: int,
    empty: Callable[..., np.ndarray] = np.empty,
) -> Generator[tuple[OpenedSlide, Batch | None], None, None]:
    """All batches of all slides, slide after slide, and a None at the end of each.

    `threads` read ahead, into the next slides, which one more thread opens; threads + 1 batches are held at most.
    """

    def read(slide: OpenedSlide, rows: np.ndarray | None) -> tuple[OpenedSlide, Batch | None]:
        return slide, None if rows is None else slide.read(rows, empty)

    def tasks(opener: ThreadPoolExecutor) -> Iterator[Callable[[], tuple[OpenedSlide, Batch | None]]]:
        waiting = iter(openings)
        opening = deque(opener.submit(task) for task in islice(waiting, OPENED_AHEAD))
        while opening:
            slide = opening.popleft().result()
            opening.extend(opener.submit(task) for task in islice(waiting, 1))
            for rows in slide.reader.chunks(batch_size) if slide.reader is not None else ():
                yield partial(read, slide, rows)
            yield partial(read, slide, None)

    with ThreadPoolExecutor(1) as opener:
        yield from in_order(tasks(opener), threads)
