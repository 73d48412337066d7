"""A level's own JPEG tiles, found with tifffile and decoded each once: OpenSlide's pixels several times as fast.

Only for what is known to be stored as it is shown: tiled TIFF that OpenSlide calls aperio or generic-tiff, 8 bits, RGB
or YCbCr in JPEG (by libjpeg-turbo), RGB in JPEG 2000 (by OpenJPEG; Aperio's other kind of it, YCbCr, comes out a grey
level off). Whether the pixels are OpenSlide's is checked on every slide (see preprocessing.patches).
"""

import os
import threading
import weakref

import imagecodecs
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
        self._file = file
        self.is_jpeg = page.compression == tifffile.COMPRESSION.JPEG
        transform = b"\1" if page.photometric == tifffile.PHOTOMETRIC.YCBCR else b"\0"
        self._header = b"\xff\xd8" + ADOBE + transform + (page.jpegtables or b"\xff\xd8\xff\xd9")[2:-2]
        self.scales = [
            k for k in (1, 2, 4, 8) if k == 1 or (self.is_jpeg and self.tile_width % k == self.tile_height % k == 0)
        ]

    def decode(self, row: int, column: int, scale: int = 1) -> np.ndarray:
        """(tile_height / scale, tile_width / scale, 3) uint8 RGB; one of `scales`, by the inverse DCT.

        Raises DamagedTileError, MissingTileError.
        """
        stream = self._fetch(row, column)
        shape = (self.tile_height // scale, self.tile_width // scale, 3)
        try:
            if self.is_jpeg:
                pixels: np.ndarray = simplejpeg.decode_jpeg(
                    self._complete(stream), "RGB", min_height=shape[0], min_width=shape[1]
                )
            else:
                pixels = imagecodecs.jpeg2k_decode(stream)
            if pixels.shape != shape:
                raise ValueError(f"{pixels.shape} pixels instead of {shape}")
        except (ValueError, imagecodecs.Jpeg2kError) as error:
            raise self._damaged(row, column, error) from error
        return pixels

    def jpeg(self, row: int, column: int) -> bytes:
        """A tile as a JPEG file of its own. Raises DamagedTileError, MissingTileError."""
        stream = self._fetch(row, column)
        try:
            return self._complete(stream)
        except ValueError as error:
            raise self._damaged(row, column, error) from error

    def _fetch(self, row: int, column: int) -> bytes:
        tile = row * self.columns + column
        if self._sizes[tile] == 0:
            raise MissingTileError(f"tile {tile} is not in the file")
        stream = os.pread(self._file, int(self._sizes[tile]), int(self._offsets[tile]))
        if len(stream) < self._sizes[tile]:
            raise self._damaged(row, column, "the file ends before it")
        return stream

    def _complete(self, stream: bytes) -> bytes:
        if stream[:2] != b"\xff\xd8":
            raise ValueError("no JPEG stream")
        body = stream[2:]
        while body[:1] == b"\xff" and 0xE0 <= body[1] <= 0xEF:  # JFIF's or another Adobe marker would overrule ours
            body = body[2 + int.from_bytes(body[2:4], "big") :]
        return self._header + body

    def _damaged(self, row: int, column: int, error: object) -> DamagedTileError:
        return DamagedTileError(f"tile {row * self.columns + column}, column {column}, row {row}: {error}")


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
                and (page.imagewidth, page.imagelength) == slide.level_dimensions[level]
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
        and page.compression in (tifffile.COMPRESSION.JPEG, tifffile.COMPRESSION.APERIO_JP2000_RGB)
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
        self.width, self.height = -(-tiles.width // scale), -(-tiles.height // scale)
        self.tile_width, self.tile_height = tiles.tile_width // scale, tiles.tile_height // scale
        tile_size = np.array([self.tile_width, self.tile_height])
        # Between two pixels, one more is needed.
        last = self.first + self.side - 1 + self.fraction.any(axis=1, keepdims=True)
        grid = np.array([tiles.columns, tiles.rows])
        self.first_tile = np.minimum(self.first // tile_size, grid)
        self.end_tile = np.minimum(last // tile_size + 1, grid)
        self._uses = self._count_uses(grid)
        self._kept: dict[tuple[int, int], np.ndarray | threading.Event] = {}  # the oldest first
        self._room = max(1, CACHE_BYTES // (3 * self.tile_width * self.tile_height))
        self._lock = threading.Lock()

    def read(self, index: int) -> np.ndarray:
        """(side, side, 3) uint8 RGB of a region; white outside the level. Each region is read once.

        Raises DamagedTileError, MissingTileError.
        """
        (x, y), (dx, dy) = self.first[index].tolist(), self.fraction[index].tolist()
        between = bool(dx or dy)
        side = self.side + between
        region = np.empty((side, side, 3), np.uint8)
        if x + side > self.width or y + side > self.height:
            region.fill(255)
        try:
            for tile in self._tiles_of(index):
                top, left = tile[0] * self.tile_height, tile[1] * self.tile_width
                x0, x1 = max(x, left), min(x + side, left + self.tile_width, self.width)
                y0, y1 = max(y, top), min(y + side, top + self.tile_height, self.height)
                if x0 < x1 and y0 < y1:
                    pixels = self._decoded(tile)
                    region[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        finally:
            self._release(index)
        if not between:
            return region
        from preprocessing.between_pixels import paint_between  # numba, which only such levels need

        places = np.arange(side)
        return paint_between(
            region, max(0, self.width - x), max(0, self.height - y),
            np.float32(dx / FRACTIONS), np.float32(dy / FRACTIONS),
            (x + places) % self.tile_width == 0, (y + places) % self.tile_height == 0,
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

    def _decoded(self, tile: tuple[int, int]) -> np.ndarray:
        while not isinstance(found := self._kept.get(tile), np.ndarray):
            with self._lock:
                found = self._kept.setdefault(tile, ready := threading.Event())
            if found is ready:
                return self._decode(tile, ready)
            if isinstance(found, threading.Event):  # another thread is at it
                found.wait()
        return found

    def _decode(self, tile: tuple[int, int], ready: threading.Event) -> np.ndarray:
        try:
            pixels = self.tiles.decode(*tile, self.scale)
            with self._lock:
                self._kept[tile] = pixels
                if len(self._kept) > self._room:
                    del self._kept[next(iter(self._kept))]
            return pixels
        except BaseException:
            self._kept.pop(tile, None)  # whoever waits tries again, and fails by itself
            raise
        finally:
            ready.set()

    def _release(self, index: int) -> None:
        with self._lock:
            for tile in self._tiles_of(index):
                self._uses[tile] -= 1
                if self._uses[tile] == 0:
                    self._kept.pop(tile, None)
