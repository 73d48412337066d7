"""A level's own JPEG tiles, found with tifffile, decoded with libjpeg-turbo: OpenSlide's pixels ten times as fast.

Only for what is known to be stored as it is shown: tiled TIFF that OpenSlide calls aperio or generic-tiff, JPEG of
8 bits, RGB or YCbCr. Whether the pixels are OpenSlide's is checked on every slide (see preprocessing.patches).
"""

import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np
import openslide
import simplejpeg
import tifffile

from preprocessing.slide import Slide

VENDORS = ("aperio", "generic-tiff")
CACHE_BYTES = 128 * 1024**2
FRACTIONS = 65536  # Pixman's places are multiples of 1/65536 of a pixel
# Adobe's marker says what the three channels are (0 RGB, 1 YCbCr); TIFF says it outside the JPEG stream.
ADOBE = bytes.fromhex("ffee000e 41646f6265 0064 0000 0000")


class DamagedTileError(Exception):
    """A tile that cannot be decoded; the message says which and why."""


class MissingTileError(Exception):
    """A tile that the file leaves out; OpenSlide knows what to show there."""


class JpegTiles:
    """The tiles of one level: `width` x `height` pixels in tiles of `tile_width` x `tile_height`."""

    def __init__(self, page: tifffile.TiffPage, file: int) -> None:
        self.width, self.height = page.imagewidth, page.imagelength
        self.tile_width, self.tile_height = page.tilewidth, page.tilelength
        self.columns, self.rows = -(-self.width // self.tile_width), -(-self.height // self.tile_height)
        self._offsets = np.array(page.dataoffsets, np.int64)
        self._sizes = np.array(page.databytecounts, np.int64)
        transform = b"\1" if page.photometric == tifffile.PHOTOMETRIC.YCBCR else b"\0"
        self._header = b"\xff\xd8" + ADOBE + transform + (page.jpegtables or b"\xff\xd8\xff\xd9")[2:-2]
        self._file = file

    def decode(self, row: int, column: int, scale: int = 1) -> np.ndarray:
        """(tile_height / scale, tile_width / scale, 3) uint8 RGB; scale 2, 4 or 8 is done by the inverse DCT.

        Raises DamagedTileError, MissingTileError.
        """
        tile = row * self.columns + column
        if self._sizes[tile] == 0:
            raise MissingTileError(f"tile {tile} is not in the file")
        stream = os.pread(self._file, int(self._sizes[tile]), int(self._offsets[tile]))
        shape = (self.tile_height // scale, self.tile_width // scale, 3)
        body = stream[2:]
        while body[:1] == b"\xff" and 0xE0 <= body[1] <= 0xEF:  # JFIF's or another Adobe marker would overrule ours
            body = body[2 + int.from_bytes(body[2:4], "big") :]
        try:
            if len(stream) < self._sizes[tile] or stream[:2] != b"\xff\xd8":
                raise ValueError("the file ends before it" if len(stream) < self._sizes[tile] else "no JPEG stream")
            pixels: np.ndarray = simplejpeg.decode_jpeg(
                self._header + body, "RGB", min_height=shape[0], min_width=shape[1]
            )
            if pixels.shape != shape:
                raise ValueError(f"{pixels.shape} pixels instead of {shape}")
        except ValueError as error:
            raise DamagedTileError(f"tile {tile}, column {column}, row {row}: {error}") from error
        return pixels


def jpeg_tiles(slide: Slide, level: int) -> JpegTiles | None:
    """The tiles of a level; None where it is not stored as JPEG tiles that can be read as they are."""
    if slide.handle.properties.get(openslide.PROPERTY_NAME_VENDOR) not in VENDORS:
        return None
    try:
        with tifffile.TiffFile(slide.path) as tif:
            pages = [
                page
                for page in tif.pages
                if isinstance(page, tifffile.TiffPage)
                and (page.imagewidth, page.imagelength) == slide.handle.level_dimensions[level]
            ]
            if len(pages) != 1 or not _is_readable(pages[0]):
                return None
            file = os.open(slide.path, os.O_RDONLY)
            tiles = JpegTiles(pages[0], file)
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError):
        return None  # what OpenSlide opened all the same is OpenSlide's to read
    weakref.finalize(tiles, os.close, file)
    return tiles if len(tiles._sizes) == tiles.rows * tiles.columns else None


def _is_readable(page: tifffile.TiffPage) -> bool:
    return (
        page.is_tiled
        and page.compression == tifffile.COMPRESSION.JPEG
        and page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
        and page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
    )


class PlannedRegions:
    """Square regions of a level, put together from its tiles; threads share the tiles, each is decoded once.

    A decoded tile is kept until the last region that needs it has been read. Beyond CACHE_BYTES the oldest goes early,
    to be decoded again.
    """

    def __init__(self, tiles: JpegTiles, corners: np.ndarray, side: int, scale: int = 1) -> None:
        """corners: (N, 2) float64, (x, y) in pixels of the level, not negative; side: of a region, in such pixels.

        With scale 1 the regions are OpenSlide's, bit for bit. With 2, 4 or 8 (which must divide the tile's sides) they
        come that much smaller, averaged by the inverse DCT, at the nearest whole pixel.
        """
        self.tiles, self.scale, self.side = tiles, scale, max(1, round(side / scale))
        if scale == 1:
            fixed = np.rint(corners * FRACTIONS).astype(np.int64)  # as Pixman keeps places
            self.first, self.fraction = fixed // FRACTIONS, fixed % FRACTIONS
        else:
            self.first = np.rint(corners / scale).astype(np.int64)
            self.fraction = np.zeros_like(self.first)
        self.tile_size = np.array([tiles.tile_width, tiles.tile_height]) // scale
        # Between two pixels, one more is needed.
        last = self.first + self.side - 1 + self.fraction.any(axis=1, keepdims=True)
        grid = np.array([tiles.columns, tiles.rows])
        self.first_tile = np.minimum(self.first // self.tile_size, grid)
        self.end_tile = np.minimum(last // self.tile_size + 1, grid)
        self._uses = self._count_uses(grid)
        self._kept: OrderedDict[tuple[int, int], Future[np.ndarray]] = OrderedDict()
        self._room = max(1, CACHE_BYTES // (3 * int(self.tile_size.prod())))
        self._lock = threading.Lock()

    def read(self, index: int) -> np.ndarray:
        """(side, side, 3) uint8 RGB of a region; white outside the level. Each region is read once.

        Raises DamagedTileError, MissingTileError.
        """
        (x, y), (dx, dy) = self.first[index].tolist(), self.fraction[index].tolist()
        between = bool(dx or dy)
        side = self.side + between
        region = np.full((side, side, 3), 255, np.uint8)
        width, height = -(-self.tiles.width // self.scale), -(-self.tiles.height // self.scale)
        try:
            for row, column in self._tiles_of(index):
                left, top = column * self.tile_size[0], row * self.tile_size[1]
                x0, x1 = max(x, left), min(x + side, left + self.tile_size[0], width)
                y0, y1 = max(y, top), min(y + side, top + self.tile_size[1], height)
                if x0 < x1 and y0 < y1:
                    tile = self._decoded(row, column)
                    region[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        finally:
            self._release(index)
        if not between:
            return region
        from preprocessing.between_pixels import paint_between  # numba, which only such levels need

        places = np.arange(side)
        return paint_between(
            region, max(0, width - x), max(0, height - y), np.float32(dx / FRACTIONS), np.float32(dy / FRACTIONS),
            (x + places) % self.tile_size[0] == 0, (y + places) % self.tile_size[1] == 0,
        )  # fmt: skip

    def _tiles_of(self, index: int) -> list[tuple[int, int]]:
        (column, row), (end_column, end_row) = self.first_tile[index].tolist(), self.end_tile[index].tolist()
        return [(r, c) for r in range(row, end_row) for c in range(column, end_column)]

    def _count_uses(self, grid: np.ndarray) -> np.ndarray:
        """(rows, columns): how many regions need each tile; +1 and -1 at the corners of each, summed up."""
        steps = np.zeros((grid[1] + 1, grid[0] + 1), np.int32)
        for x, y, sign in (("a", "a", 1), ("e", "a", -1), ("a", "e", -1), ("e", "e", 1)):
            ends = {"a": self.first_tile, "e": self.end_tile}
            np.add.at(steps, (ends[y][:, 1], ends[x][:, 0]), sign)
        return steps.cumsum(axis=0).cumsum(axis=1)

    def _decoded(self, row: int, column: int) -> np.ndarray:
        with self._lock:
            future = self._kept.get((row, column))
            mine = future is None
            if future is None:
                future = self._kept[row, column] = Future()
                if len(self._kept) > self._room:
                    self._kept.popitem(last=False)
        if mine:
            try:
                future.set_result(self.tiles.decode(row, column, self.scale))
            except Exception as error:  # for every thread that waits for this tile
                future.set_exception(error)
        return future.result()

    def _release(self, index: int) -> None:
        with self._lock:
            for tile in self._tiles_of(index):
                self._uses[tile] -= 1
                if self._uses[tile] == 0:
                    self._kept.pop(tile, None)
