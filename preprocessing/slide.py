"""Open a slide through OpenSlide (a flat picture through Pillow), settle its physical scale, read RGB pixels.

Scale is µm per pixel (mpp). Its source, in order: the slide sheet, the config, the file. Coordinates are
level-0 pixels, (x, y) of the top-left corner.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from preprocessing.errors import SlideError

MPP_RANGE = (0.05, 5.0)
MPP_TOLERANCE = 0.3  # share by which two statements about the scale may differ
LEVEL_TOLERANCE = 1.01  # a level is fine enough when it is up to 1 % coarser: pyramids are off by rounding
FLAT_PIXELS = 2**28  # of a picture without tiles and levels, which is held in memory whole (0.8 GB)
Image.MAX_IMAGE_PIXELS = None  # Pillow's own guard, for pictures from the web; FLAT_PIXELS takes its place
TILE_WIDTH = 322  # TIFF's tag
MAX_UNREADABLE = 0.5  # share of a level
SMALLEST_PX = 128  # side of the smallest region that is given up as a whole
BLOCK_PX = 2048  # a whole level is read in blocks of about this side, so that memory stays bounded


def magnification(mpp: float) -> float:
    """The magnification that people call this scale, by the convention 0.25 µm/px = 40x."""
    return 10 / mpp


@dataclass
class Slide:
    """An opened slide. `handle` may be read from several threads; after one error it refuses all reads: `reopen`."""

    slide_id: str
    path: Path
    handle: openslide.AbstractSlide
    level0_mpp: float
    mpp_source: str
    objective_power: float | None
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Once: a handle that met an error says nothing any more.
        self.width, self.height = self.handle.dimensions
        self.level_dimensions, self.level_downsamples = self.handle.level_dimensions, self.handle.level_downsamples

    def source(self) -> dict[str, Any]:
        """What identifies the slide's content, so that a replaced file is noticed."""
        quickhash = self.handle.properties.get(openslide.PROPERTY_NAME_QUICKHASH1)
        return {**describe_file(self.path), "quickhash": quickhash}

    def best_level(self, mpp: float) -> int:
        """The coarsest level that is at least as fine as `mpp`; level 0 where even that is coarser."""
        wanted = mpp / self.level0_mpp * LEVEL_TOLERANCE
        return max([i for i, d in enumerate(self.level_downsamples) if d <= wanted], default=0)

    def read_region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB; (x, y) in level-0 pixels, width and height in pixels of `level`.

        Pixels that the file does not hold are white. Raises SlideError where the file cannot be decoded.
        """
        try:
            rgba = np.asarray(self.handle.read_region((int(x), int(y)), level, (width, height)))
        except openslide.OpenSlideError as error:
            raise self.damaged(error) from error
        if cv2.extractChannel(rgba, 3).min() == 255:
            return np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), np.uint8)  # several times as fast as slices
        share = rgba[..., 3:].astype(np.float32) / 255
        return np.rint(rgba[..., :3] * share + 255 * (1 - share)).astype(np.uint8)

    def reopen(self) -> None:
        """Take a new handle in place of one that met an error."""
        self.handle = open_handle(self.path, self.slide_id)

    def read_whole(self, mpp: float) -> np.ndarray:
        """The whole slide as (H, W, 3) uint8 RGB at `mpp` (never finer than level 0), area-averaged.

        What cannot be decoded is taken from a coarser level; where none can be read it is white, as is what the file
        does not hold, and a warning. SlideError where that is more than MAX_UNREADABLE of the slide.
        """
        level = self.best_level(mpp)
        downsample = self.level_downsamples[level]
        level_width, level_height = self.level_dimensions[level]
        # First an integer factor, block by block, then the rest in one go: blocks then join without seams.
        factor = max(1, int(mpp / (self.level0_mpp * downsample)))
        block = factor * max(1, BLOCK_PX // factor)
        unreadable = 0
        reduced = np.empty((-(-level_height // factor), -(-level_width // factor), 3), np.uint8)
        for y in range(0, level_height, block):
            for x in range(0, level_width, block):
                width, height = min(block, level_width - x), min(block, level_height - y)
                region, lost = self._read_what_can_be(x, y, level, width, height)
                unreadable += lost
                size = (-(-width // factor), -(-height // factor))
                top, left = y // factor, x // factor
                reduced[top : top + size[1], left : left + size[0]] = resize(region, size)
        if unreadable:
            share = unreadable / (level_width * level_height)
            if share > MAX_UNREADABLE:
                raise self.damaged(f"{share:.0%} of level {level} is unreadable")
            self.warnings.append(
                f"{share:.1%} of level {level} cannot be decoded and counts as glass: the file is damaged"
            )
        scale = min(1.0, self.level0_mpp / mpp)
        return resize(reduced, (max(1, round(self.width * scale)), max(1, round(self.height * scale))))

    def _read_what_can_be(self, x: int, y: int, level: int, width: int, height: int) -> tuple[np.ndarray, int]:
        """A region, (x, y) in pixels of its level, white where it cannot be decoded, and how many pixels those are."""
        downsample = self.level_downsamples[level]
        try:
            return self.read_region(round(x * downsample), round(y * downsample), level, width, height), 0
        except SlideError:
            self.reopen()
        if max(width, height) <= SMALLEST_PX:
            return self._read_coarser(x, y, level, width, height)
        region = np.empty((height, width, 3), np.uint8)
        lost = 0
        half = -(-max(width, height) // 2)
        for top in range(0, height, half):
            for left in range(0, width, half):
                part = region[top : top + half, left : left + half]
                part[:], more = self._read_what_can_be(x + left, y + top, level, part.shape[1], part.shape[0])
                lost += more
        return region, lost

    def _read_coarser(self, x: int, y: int, level: int, width: int, height: int) -> tuple[np.ndarray, int]:
        """The same from the next coarser level that can be read there, enlarged."""
        downsample = self.level_downsamples[level]
        for coarser in range(level + 1, len(self.level_downsamples)):
            scale = downsample / self.level_downsamples[coarser]
            size = max(1, round(width * scale)), max(1, round(height * scale))
            try:
                region = self.read_region(round(x * downsample), round(y * downsample), coarser, *size)
            except SlideError:
                self.reopen()
            else:
                return resize(region, (width, height)), 0
        return np.full((height, width, 3), 255, np.uint8), width * height

    def damaged(self, error: object) -> SlideError:
        """What to raise where a part of the file cannot be decoded."""
        return SlideError(
            f"slide {self.slide_id} ({self.path}) cannot be decoded ({error}): the file is damaged;"
            " copy it anew from its source, or set exclude in the sheet"
        )


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample to `size` (width, height): area average when it shrinks, bilinear when it grows."""
    if image.shape[1::-1] == size:
        return image
    shrinks = image.shape[1] >= size[0] and image.shape[0] >= size[1]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def describe_file(path: Path) -> dict[str, Any]:
    """Name and size in bytes of a slide's file, known also where OpenSlide cannot open it."""
    return {"name": path.name, "size": path.stat().st_size, "quickhash": None}


def find_file(path: Path, slide_id: str) -> Path:
    """The file to hand to OpenSlide: `path` itself, or one DICOM file of the folder that holds a DICOM
    slide."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.dcm"))
    if not files:
        raise SlideError(
            f"slide {slide_id} ({path}) is a folder without .dcm files:"
            " give the slide's file, or its folder if it is DICOM"
        )
    return files[0]


def open_handle(path: Path, slide_id: str) -> openslide.AbstractSlide:
    """OpenSlide's handle on a slide; a flat picture (TIFF in strips, PNG, JPEG …) is read whole.

    Raises OpenSlideError for what neither reads, SlideError for a flat picture that is too large or not in RGB.
    """
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        try:
            picture = Image.open(path)
        except UnidentifiedImageError:
            picture = None
        if picture is None or TILE_WIDTH in getattr(picture, "tag_v2", ()):
            raise  # what has tiles is a slide, and OpenSlide knows what is wrong with it
    remedy = "convert it to a pyramidal TIFF, for example with `vips tiffsave --tile --pyramid --compression jpeg`"
    where = f"slide {slide_id} ({path}) is a flat picture of {picture.width} x {picture.height} px"
    if picture.width * picture.height > FLAT_PIXELS:
        raise SlideError(
            f"{where}, more than the {FLAT_PIXELS / 1e6:g} million that are read without a pyramid: {remedy}"
        )
    if picture.mode not in ("RGB", "RGBA", "P"):
        raise SlideError(f"{where} in mode {picture.mode}, not RGB: {remedy}")
    try:
        picture.load()
    except OSError as error:
        raise SlideError(f"{where} that cannot be decoded ({error}): copy it anew from its source") from error
    return openslide.ImageSlide(picture)


def open_slide(path: Path, slide_id: str, cohort: str, mpp: float | None = None, mpp_source: str = "sheet") -> Slide:
    """Open a slide and settle its scale; `mpp` is what the sheet or the config says about it, if anything.

    Raises SlideError where OpenSlide cannot read the file or the scale is unknown or implausible.
    """
    path = find_file(path, slide_id)
    with path.open("rb"):  # a missing or unreadable file is no property of the slide: OSError stops the job
        pass
    try:
        handle = open_handle(path, slide_id)
    except openslide.OpenSlideError as error:
        raise SlideError(
            f"slide {slide_id} ({path}) cannot be opened ({error or 'unknown format'}): the file is truncated, damaged"
            " or of a format that OpenSlide does not read; copy it anew from its source, or set exclude in the sheet"
        ) from error

    power = _number(handle, openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    in_file = [_number(handle, name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
    file_mpp = sum(in_file) / 2 if in_file[0] and in_file[1] else None  # type: ignore[arg-type]
    where = f"slide {slide_id} ({path})"
    remedy = f"add an 'mpp' column to the sheet, or set cohorts.{cohort}.mpp for all its slides"
    if mpp is None:
        mpp, mpp_source = file_mpp, "file"
    if mpp is None:
        raise SlideError(f"{where} has no mpp: {remedy}")
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise SlideError(
            f"{where} has an absurd mpp, {mpp:g} µm/px (from the {mpp_source}; {MPP_RANGE[0]} to {MPP_RANGE[1]} is"
            f" plausible): {remedy}"
        )
    warnings = []
    stated = {"mpp of the file": file_mpp, "objective power": magnification(power) if power else None}
    for name, other in stated.items():
        if other is None or abs(mpp / other - 1) <= MPP_TOLERANCE:
            continue
        text = f"mpp {mpp:g} of the {mpp_source} contradicts {other:g}, the {name}"
        if mpp_source == "sheet":  # a person wrote it for this very slide: the last word, but not unheard
            warnings.append(text)
        else:
            raise SlideError(f"{where}: {text}: add an 'mpp' column with this slide's true mpp to the sheet")
    return Slide(slide_id, path, handle, mpp, mpp_source, power, warnings)


def _number(handle: openslide.AbstractSlide, name: str) -> float | None:
    """A numeric property; None where it is absent, zero or not a number (files hold all three)."""
    try:
        return float(handle.properties.get(name, "")) or None
    except ValueError:
        return None
