"""Opened slides, and their pixels as the tiles of a deep-zoom pyramid."""

import io
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import openslide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image, ImageDraw, UnidentifiedImageError

TILE_PX, OVERLAP_PX = 254, 1  # with its overlap a tile is 256 px, as slides themselves are tiled
KEPT_OPEN = 8
TILE_WIDTH = 322  # TIFF's tag


class UnreadableSlideError(ValueError):
    """A slide that cannot be shown; the message says why."""


def open_pixels(path: Path) -> DeepZoomGenerator:
    """The whole slide, frame of level 0. `path` is a file that OpenSlide reads, a flat picture that Pillow reads, or a
    folder of DICOM files.

    Raises UnreadableSlideError.
    """
    if path.is_dir():
        files = sorted(path.glob("*.dcm"))
        if not files:
            raise UnreadableSlideError(f"{path} is a folder without .dcm files")
        path = files[0]
    try:
        handle: openslide.AbstractSlide
        if openslide.OpenSlide.detect_format(path) or is_tiled(path):
            handle = openslide.OpenSlide(path)
        else:
            picture = Image.open(path)
            picture.load()  # all of it, now: Pillow decodes without a lock, and tiles are asked for by several threads
            handle = openslide.ImageSlide(picture)
    except (openslide.OpenSlideError, Image.DecompressionBombError, OSError) as error:
        raise UnreadableSlideError(f"{path} cannot be opened: {error or 'unknown format'}") from error
    return DeepZoomGenerator(handle, tile_size=TILE_PX, overlap=OVERLAP_PX, limit_bounds=False)


def is_tiled(path: Path) -> bool:
    """Whether a file is a TIFF in tiles: a slide, then, and OpenSlide knows what is wrong with it."""
    try:
        with Image.open(path) as picture:
            return TILE_WIDTH in getattr(picture, "tag_v2", ())
    except UnidentifiedImageError:
        return False


class OpenSlides:
    """The slides that were looked at last, held open; safe to use from several threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, DeepZoomGenerator] = OrderedDict()
        self._lock = Lock()

    def get(self, path: Path) -> DeepZoomGenerator:
        with self._lock:
            if path not in self._open:
                self._open[path] = open_pixels(path)
                if len(self._open) > KEPT_OPEN:
                    self._open.popitem(last=False)  # closed when no thread reads it any more
            self._open.move_to_end(path)
            return self._open[path]

    def tile(self, path: Path, level: int, column: int, row: int) -> bytes:
        """A JPEG tile; crossed out where the file is damaged there. Raises ValueError for one outside the pyramid."""
        pixels = self.get(path)
        try:
            picture = pixels.get_tile(level, (column, row))
        except (openslide.OpenSlideError, OSError):  # OpenSlide's handle then refuses all further reads
            with self._lock:
                self._open.pop(path, None)
            picture = crossed_out(pixels.get_tile_dimensions(level, (column, row)))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=85)
        return buffer.getvalue()


def crossed_out(size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, "#dddddd")
    draw = ImageDraw.Draw(picture)
    draw.line([(0, 0), size], fill="#b3261e", width=2)
    draw.line([(0, size[1]), (size[0], 0)], fill="#b3261e", width=2)
    return picture
