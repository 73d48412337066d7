"""Stage tile: find the tissue of one slide and lay a grid of patches over it. Never imports torch.

Reads the slide. Writes
  coords     .npy, (N, 2) int32, (x, y) of each patch's top-left corner, level-0 pixels, row-major order
  record     .json, what was found: scale (µm/px) and where it came from, tissue area (mm²), counts, reasons
  thumbnail  .jpg, the slide, long side about 1024 px
  mask       .png, the thumbnail with contours of tissue (green), holes (blue) and the kept patches (black)

A patch is `patch_px` pixels at the target mpp, so it covers patch_px * mpp / level0_mpp level-0 pixels,
whatever the scanner. A slide that fails (SlideError) gets all four outputs too: no coords, the reason in
record and pictures.
"""

import hashlib
import json
import logging
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from preprocessing import CREATED_BY
from preprocessing.errors import SlideError
from preprocessing.slide import Slide, describe_file, find_file, magnification, open_slide, resize
from preprocessing.tissue import Tissue, find_tissue
from slidestore.atomic import replace_when_whole

THUMBNAIL_PX = 1024  # long side

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TilingSettings:
    """How a slide is cut into patches; the keys of `tiling` in the config."""

    patch_px: int = 224  # side of a patch, pixels at the target mpp
    mpp: float = 0.5  # target scale, µm per pixel
    min_tissue_share: float = 0.5  # of a patch's area that the tissue mask covers
    mask_mpp: float = 8.0  # scale of the picture that the mask is made on, µm per pixel
    saturation_threshold: float | str = 8.0  # 0-255, after white balance; or "otsu"
    median_blur_um: float = 40.0
    closing_um: float = 40.0
    min_tissue_um2: float = 10_000.0  # smaller parts of tissue are specks
    min_hole_um2: float = 5_000.0  # smaller holes in tissue are filled


@dataclass(frozen=True)
class Outputs:
    """Where the four results of the stage go."""

    coords: Path
    record: Path
    thumbnail: Path
    mask: Path


def tile_slide(
    path: Path,
    slide_id: str,
    cohort: str,
    settings: TilingSettings,
    outputs: Outputs,
    mpp: float | None = None,
    mpp_source: str = "sheet",
) -> dict[str, Any]:
    """Tile one slide, write its four outputs and return the record.

    `mpp` is the slide's own level-0 scale where the sheet or the config gives one. Slide problems end in a
    record with status "failed", see the module.
    """
    record: dict[str, Any] = {
        "slide_id": slide_id,
        "cohort": cohort,
        "status": "ok",
        "reason": None,
        "source": {"name": path.name, "size": None, "quickhash": None},
        "level0_mpp": None,
        "mpp_source": None,
        "objective_power": None,
        "level0_width": None,
        "level0_height": None,
        "patch_px": settings.patch_px,
        "mpp": settings.mpp,
        "patch_px_level0": None,
        "magnification": magnification(settings.mpp),
        "tissue_mm2": 0.0,
        "saturation_threshold": None,
        "counts": {"grid": 0, "kept": 0, "little_tissue": 0, "outside": 0},
        "settings": asdict(settings),
        "tiling_hash": "",
        "warnings": [],
        "created_by": CREATED_BY,
    }
    coords = np.empty((0, 2), np.int32)
    thumbnail = picture = None
    try:
        record["source"] = describe_file(find_file(path, slide_id))
        slide = open_slide(path, slide_id, cohort, mpp, mpp_source)
        patch_px_level0 = settings.patch_px * settings.mpp / slide.level0_mpp
        record |= {
            "source": slide.source(),
            "level0_mpp": slide.level0_mpp,
            "mpp_source": slide.mpp_source,
            "objective_power": slide.objective_power,
            "level0_width": slide.width,
            "level0_height": slide.height,
            "patch_px_level0": patch_px_level0,
        }
        image, thumbnail = read_pictures(slide, settings.mask_mpp)
        mask_mpp = slide.width * slide.level0_mpp / image.shape[1]
        tissue = find_tissue(
            image,
            mask_mpp,
            settings.saturation_threshold,
            settings.median_blur_um,
            settings.closing_um,
            settings.min_tissue_um2,
            settings.min_hole_um2,
        )
        coords, record["counts"] = patch_grid(
            tissue.mask, (slide.width, slide.height), patch_px_level0, settings.min_tissue_share
        )
        picture = draw_mask(thumbnail, tissue, coords, (slide.width, slide.height), patch_px_level0)
        record["tissue_mm2"] = round(float(tissue.mask.sum()) * mask_mpp**2 / 1e6, 4)
        record["saturation_threshold"] = tissue.threshold
        record["warnings"] = slide.warnings + tissue.warnings
        if slide.level0_mpp > 1.1 * settings.mpp:
            record["warnings"].append(
                f"patches are enlarged: the slide has {slide.level0_mpp:g} µm/px, asked for {settings.mpp:g}"
            )
        if not len(coords):
            raise SlideError(
                f"slide {slide_id} ({path}) has no patch with at least {settings.min_tissue_share:.0%} tissue"
                f" ({record['tissue_mm2']} mm² of tissue found): look at {outputs.mask}; lower min_tissue_share or"
                " saturation_threshold, or set exclude in the sheet"
            )
    except SlideError as error:
        log.warning("%s", error)
        record |= {"status": "failed", "reason": str(error)}
        thumbnail = draw_reason(str(error)) if thumbnail is None else thumbnail
        picture = draw_reason(str(error)) if picture is None else picture
    record["tiling_hash"] = tiling_hash(record, coords)

    assert thumbnail is not None
    assert picture is not None
    with replace_when_whole(outputs.thumbnail) as part:
        part.write_bytes(encode_picture(".jpg", thumbnail))
    with replace_when_whole(outputs.mask) as part:
        part.write_bytes(encode_picture(".png", picture))
    with replace_when_whole(outputs.coords) as part, part.open("wb") as file:
        np.save(file, coords)
    with replace_when_whole(outputs.record) as part:
        part.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def read_pictures(slide: Slide, mask_mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """The slide as RGB uint8 at `mask_mpp`, and as a thumbnail of about 1024 px; read once."""
    thumbnail_mpp = max(slide.width, slide.height) * slide.level0_mpp / THUMBNAIL_PX
    finer = slide.read_whole(min(mask_mpp, thumbnail_mpp))
    finer_mpp = slide.width * slide.level0_mpp / finer.shape[1]
    at_mask, at_thumbnail = (
        resize(finer, (max(1, round(finer.shape[1] * scale)), max(1, round(finer.shape[0] * scale))))
        for scale in (min(1.0, finer_mpp / mask_mpp), min(1.0, finer_mpp / thumbnail_mpp))
    )
    return at_mask, at_thumbnail


def patch_grid(
    mask: np.ndarray, slide_size: tuple[int, int], patch_px_level0: float, min_tissue_share: float
) -> tuple[np.ndarray, dict[str, int]]:
    """Corners of the patches with enough tissue, (N, 2) int32 level-0 pixels in row-major order, and the
    counts.

    mask (H, W) bool covers the whole slide; slide_size is (width, height) in level-0 pixels. Patch i of a
    row starts at round(i * patch_px_level0), so that rounding does not add up over the row. Only patches
    that lie fully inside the slide are in the grid; those that would reach over its right or lower edge are
    counted as "outside".
    """
    side = round(patch_px_level0)
    starts, integral = [], cv2.integral(mask.astype(np.uint8), sdepth=cv2.CV_64F)
    for length in slide_size:
        corners = np.rint(np.arange(int(length / patch_px_level0) + 1) * patch_px_level0).astype(np.int64)
        starts.append(corners[corners + side <= length])
    xs, ys = starts
    # The integral picture, read between its pixels by linear interpolation, gives the exact tissue area of
    # each patch.
    columns = [_between(integral, x * mask.shape[1] / slide_size[0], axis=1) for x in (xs, xs + side)]
    band = columns[1] - columns[0]
    rows = [_between(band, y * mask.shape[0] / slide_size[1], axis=0) for y in (ys, ys + side)]
    area = side**2 * mask.size / (slide_size[0] * slide_size[1])
    share = (rows[1] - rows[0]) / area
    row, column = np.nonzero(share >= min_tissue_share)
    coords = np.stack([xs[column], ys[row]], axis=1).astype(np.int32)

    whole_grid = int(np.prod([np.ceil(length / patch_px_level0) for length in slide_size]))
    inside = len(xs) * len(ys)
    counts = {
        "grid": whole_grid,
        "kept": len(coords),
        "little_tissue": inside - len(coords),
        "outside": whole_grid - inside,
    }
    return coords, counts


def _between(values: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """`values` at fractional `positions` along `axis`, by linear interpolation."""
    positions = np.minimum(positions, values.shape[axis] - 1)
    below = np.minimum(positions.astype(np.int64), values.shape[axis] - 2)
    share = np.expand_dims(positions - below, 1 - axis)
    return np.take(values, below, axis) * (1 - share) + np.take(values, below + 1, axis) * share


def tiling_hash(record: dict[str, Any], coords: np.ndarray) -> str:
    """Short hash of everything that decides which pixels the patches hold; equal hash, equal patches."""
    names = ("slide_id", "source", "level0_mpp", "patch_px", "mpp")
    text = json.dumps({name: record[name] for name in names}, sort_keys=True)
    return hashlib.sha256(text.encode() + coords.astype("<i4").tobytes()).hexdigest()[:16]


def draw_mask(
    thumbnail: np.ndarray, tissue: Tissue, coords: np.ndarray, slide_size: tuple[int, int], patch_px_level0: float
) -> np.ndarray:
    """The thumbnail with outlines of the kept patches (black), of tissue (green) and of its holes (blue)."""
    picture = thumbnail.copy()
    size = (picture.shape[1], picture.shape[0])
    scale = np.array(size) / np.array(slide_size)
    for corner in coords:
        first, last = np.rint(corner * scale), np.rint((corner + patch_px_level0) * scale)
        cv2.rectangle(picture, first.astype(int).tolist(), last.astype(int).tolist(), (0, 0, 0), 1)
    picture = cv2.addWeighted(thumbnail, 0.5, picture, 0.5, 0)
    mask = cv2.resize(tissue.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for i in range(len(contours)):
        is_hole = hierarchy[0][i][3] >= 0
        cv2.drawContours(picture, contours, i, (0, 90, 255) if is_hole else (0, 160, 0), 2)
    return picture


def draw_reason(reason: str) -> np.ndarray:
    """A picture in place of a thumbnail that could not be made: the reason in words."""
    picture = np.full((THUMBNAIL_PX // 2, THUMBNAIL_PX, 3), 255, np.uint8)
    text = reason.replace("µ", "u").replace("²", "2")  # OpenCV's letters are ASCII
    for i, line in enumerate(textwrap.wrap(text, 64)):
        cv2.putText(picture, line, (24, 56 + 34 * i), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (160, 0, 0), 1, cv2.LINE_AA)
    return picture


def encode_picture(extension: str, picture: np.ndarray) -> bytes:
    """An (H, W, 3) uint8 RGB picture as the bytes of a .jpg or .png file."""
    encoded = cv2.imencode(extension, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1]
    return bytes(encoded.tobytes())
