"""A level's own JPEG tiles, found with tifffile: OpenSlide's pixels several times as fast.

Only for what is known to be stored as it is shown: tiled TIFF that OpenSlide calls aperio or generic-tiff, 8 bits, RGB
or YCbCr in JPEG (by libjpeg-turbo), RGB in JPEG 2000 (by OpenJPEG; Aperio's other kind of it, YCbCr, comes out a grey
level off). Whether the pixels are OpenSlide's is checked on every slide (see preprocessing.patches).
"""

import os
import weakref

import imagecodecs
import numpy as np
import openslide
import simplejpeg
import tifffile

from preprocessing.slide import Slide

VENDORS = ("aperio", "generic-tiff")
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

    def decode(self, row: int, column: int, scale: int = 1, out: np.ndarray | None = None) -> np.ndarray:
        """(tile_height / scale, tile_width / scale, 3) uint8 RGB; one of `scales`, by the inverse DCT.

        Written to `out` where that is given, contiguous and of that shape. Raises DamagedTileError, MissingTileError.
        """
        stream = self._fetch(row, column)
        shape = (self.tile_height // scale, self.tile_width // scale, 3)
        try:
            if self.is_jpeg:
                pixels: np.ndarray = simplejpeg.decode_jpeg(
                    self._complete(stream), "RGB", min_height=shape[0], min_width=shape[1], buffer=out
                )
            else:
                pixels = imagecodecs.jpeg2k_decode(stream, out=out)
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
