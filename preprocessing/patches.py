"""The pixels of patches, read ahead of whoever uses them. Never imports torch.

Each patch is read at the coarsest level that is at least as fine as the target mpp and brought to exactly patch_px by
area averaging. How the level is read is its `reader`:

  exact      from the slide's own JPEG or JPEG 2000 tiles where it has them: OpenSlide's pixels, bit for bit
  scaled     the same, but where the target is half as fine or less the decoder itself shrinks by 2, 4 or 8
  openslide  by OpenSlide, which also reads what has no such tiles

The tiles are trusted where they agree with OpenSlide on a seeded sample of the slide's patches, else OpenSlide reads
it. A patch that cannot be decoded costs itself, not the slide.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import openslide

from preprocessing.errors import SlideError
from preprocessing.jpeg_tiles import DamagedTileError, JpegTiles, MissingTileError, PlannedRegions, jpeg_tiles
from preprocessing.slide import LEVEL_TOLERANCE, Slide, resize

Reader = Literal["exact", "scaled", "openslide"]
SAMPLE = 8  # patches of a slide that are read both ways
STRIP_PX = 16_384  # of the level: patches are read strip by strip, so that the tiles of a row of patches stay in memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadingSettings:
    """How patches are read; the keys of `reading` in the config."""

    reader: Reader = "exact"
    max_damaged_share: float = 0.05  # of a slide's patches that may be unreadable before the slide fails


@dataclass(frozen=True)
class Batch:
    """Patches as they come: pixels (B, P, P, 3) uint8 RGB of the patches `rows` (B,) of the coordinates.

    damaged: rows that were tried with these and could not be decoded.
    """

    rows: np.ndarray
    pixels: np.ndarray
    damaged: np.ndarray


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
        self.downsample = slide.handle.level_downsamples[self.level]  # once: a handle that met an error says nothing
        # A patch is a whole number of pixels of the level: the error, below half such a pixel, does not add up.
        self.side = max(1, round(patch_px * mpp / slide.level0_mpp / self.downsample))
        self._reopening = threading.Lock()
        self.regions = self._plan(mpp)

    @property
    def route(self) -> str:
        return "openslide" if self.regions is None else "jpeg tiles"

    def read(self, row: int) -> np.ndarray:
        """(P, P, 3) uint8 RGB. Raises SlideError where the patch cannot be decoded."""
        region = None
        if self.regions is not None:
            try:
                region = self.regions.read(row)
            except MissingTileError:
                pass  # OpenSlide fills it from other levels
            except DamagedTileError as error:
                raise self.slide.damaged(error) from error
        if region is None:
            region = self._read_by_openslide(row)
        return resize(region, (self.patch_px, self.patch_px))

    def batches(self, batch_size: int, threads: int) -> Iterator[Batch]:
        """All patches, in the order in which they are read; `threads` work ahead, one batch each.

        At most threads + 1 batches are held. Raises SlideError as soon as more than max_damaged_share are damaged.
        """
        strip = self.coords[:, 0] / self.downsample // STRIP_PX
        order = np.lexsort((self.coords[:, 0], self.coords[:, 1], strip))
        chunks = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[Future[Batch]] = deque()
            damaged = 0
            try:
                for chunk in [*chunks, *[None] * threads]:
                    if chunk is not None:
                        ahead.append(pool.submit(self._read_batch, chunk))
                    if len(ahead) > threads or (chunk is None and ahead):
                        batch = ahead.popleft().result()
                        damaged += len(batch.damaged)
                        self._check_share(damaged)
                        yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def _read_batch(self, rows: np.ndarray) -> Batch:
        pixels = np.empty((len(rows), self.patch_px, self.patch_px, 3), np.uint8)
        readable = np.ones(len(rows), bool)
        for i, row in enumerate(rows.tolist()):
            try:
                pixels[i] = self.read(row)
            except SlideError as error:
                readable[i] = False
                log.warning("patch at (%d, %d): %s", *self.coords[row], error)
        if readable.all():
            return Batch(rows, pixels, rows[:0])
        return Batch(rows[readable], pixels[readable], rows[~readable])

    def _check_share(self, damaged: int) -> None:
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
                self.slide = replace(self.slide, handle=openslide.OpenSlide(self.slide.path))
                return self.slide.read_region(x, y, self.level, self.side, self.side)

    def _plan(self, mpp: float) -> PlannedRegions | None:
        """The slide's own tiles if they are wanted, there, and right."""
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
        return PlannedRegions(tiles, corners, self.side, scale)

    def _compare(self, tiles: JpegTiles, corners: np.ndarray) -> str | None:
        """What speaks against the tiles, where a sample of patches is read both ways; None where nothing does.

        A tile that the JPEG decoder finds faulty is damage, where OpenSlide may show noise; if most are, they are of
        a kind that OpenSlide knows better.
        """
        sample = np.random.default_rng(0).permutation(len(corners))[:SAMPLE]
        regions, faulty = PlannedRegions(tiles, corners[sample], self.side), []
        for i, row in enumerate(sample.tolist()):
            try:
                expected = self._read_by_openslide(row)
                found = regions.read(i)
            except (SlideError, MissingTileError):
                continue
            except DamagedTileError as error:
                faulty.append(str(error))
                continue
            if not np.array_equal(found, expected):
                largest = np.abs(found.astype(int) - expected).max()
                return f"at {tuple(self.coords[row].tolist())} they differ by up to {largest} grey levels"
        return faulty[0] if len(faulty) > len(sample) / 2 else None
