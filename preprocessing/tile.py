"""Stage tile: find the tissue of one slide and lay a grid of patches over it. Never imports torch.

Reads the slide, and the file that says where its tissue is, if there is one. Writes
  coords     .npy, (N, 2) int32, (x, y) of each patch's top-left corner, level-0 pixels, row-major order
  record     .json, what was found: scale (µm/px) and where it came from, tissue area (mm²), counts, reasons
  thumbnail  .jpg, the slide, long side about 1024 px
  mask       .png, the thumbnail with contours of tissue (green), holes (blue), ink (orange), kept patches (black)
  contours   .geojson, the outlines of the tissue for QuPath, level-0 pixels

A patch is `patch_px` pixels at the target mpp, so it covers patch_px * mpp / level0_mpp level-0 pixels,
whatever the scanner. A slide that fails (SlideError) gets all five outputs too: no coords, no contours, the reason in
record and pictures.
"""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing import CREATED_BY
from preprocessing.contours import read_mask, to_geojson
from preprocessing.drawing import THUMBNAIL_PX, draw_mask, draw_reason, encode_picture
from preprocessing.errors import SlideError
from preprocessing.grid import lay_grid
from preprocessing.patches import PatchReader, ReadingSettings
from preprocessing.quality import PixelLimits, find_folds, pixel_flaws
from preprocessing.slide import Slide, describe_file, find_file, magnification, open_slide, resize
from preprocessing.tissue import Tissue, find_tissue
from slidestore.atomic import replace_when_whole

# Why a patch of the grid is not kept, in the order of the checks: the first that applies is counted.
REASONS = ("outside", "ink", "little_tissue", "fold", "white", "black", "blurred", "over_cap")
BATCH_BYTES = 32_000_000  # of patches that are looked at together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TilingSettings:
    """How a slide is cut into patches; the keys of `tiling` in the config."""

    patch_px: int = 224  # side of a patch, pixels at the target mpp
    mpp: float = 0.5  # target scale, µm per pixel
    overlap_px: int = 0  # that neighbours share, pixels at the target mpp
    min_tissue_share: float = 0.5  # of a patch's area that the tissue mask covers
    max_patches: int | None = None  # a slide with more keeps so many of them, drawn at random
    sampling_seed: int = 0  # of that draw
    mask_mpp: float = 8.0  # scale of the picture that the mask is made on, µm per pixel
    saturation_threshold: float | str = 8.0  # 0-255, after white balance; or "otsu"
    median_blur_um: float = 40.0
    closing_um: float = 40.0
    min_tissue_um2: float = 10_000.0  # smaller parts of tissue are specks
    min_hole_um2: float = 5_000.0  # smaller holes in tissue are filled
    max_ink_share: float = 0.5  # of a patch's area that pens may cover
    max_fold_share: float = 1.0  # of a patch's area that folds may cover
    fold_density: float = 2.0  # a fold is so many times as dense as the slide's tissue is in the median
    max_white_share: float = 1.0  # of a patch's own pixels that may be nearly white
    max_black_share: float = 1.0  # of a patch's pixels that may be nearly black
    min_sharpness: float = 0.0  # variance of the Laplacian of a patch in grey (0-255)

    def __post_init__(self) -> None:
        if not 0 <= self.overlap_px < self.patch_px:
            raise ValueError(f"overlap_px ({self.overlap_px}) must be less than patch_px ({self.patch_px})")


@dataclass(frozen=True)
class Outputs:
    """Where the five results of the stage go; imported patches come without contours of tissue."""

    coords: Path
    record: Path
    thumbnail: Path
    mask: Path
    contours: Path | None = None


def tile_slide(
    path: Path,
    slide_id: str,
    cohort: str,
    settings: TilingSettings,
    outputs: Outputs,
    mpp: float | None = None,
    mpp_source: str = "sheet",
    tissue_mask: Path | None = None,
) -> dict[str, Any]:
    """Tile one slide, write its five outputs and return the record.

    `mpp` is the slide's own level-0 scale where the sheet or the config gives one. `tissue_mask` is a file that says
    where tissue is, instead of finding it: GeoJSON or a picture, see contours.read_mask. Slide problems end in a record
    with status "failed", see the module.
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
        "tissue_mask": None if tissue_mask is None else tissue_mask.name,
        "saturation_threshold": None,
        "counts": dict.fromkeys(("grid", "kept", *REASONS), 0),
        "settings": asdict(settings),
        "tiling_hash": "",
        "warnings": [],
        "created_by": CREATED_BY,
    }
    coords = np.empty((0, 2), np.int32)
    contours: dict[str, Any] = {"type": "FeatureCollection", "features": []}
    thumbnail = picture = None
    try:
        record["source"] = describe_file(find_file(path, slide_id))
        slide = open_slide(path, slide_id, cohort, mpp, mpp_source)
        size = (slide.width, slide.height)
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
        record["warnings"] = slide.warnings + tissue.warnings
        mask = tissue.mask
        if tissue_mask is None:
            record["saturation_threshold"] = tissue.threshold
        else:
            mask = read_mask(tissue_mask, slide_id, size, mask.shape)
        contours = to_geojson(mask, size)
        coords, record["counts"] = choose_patches(slide, mask, tissue, mask_mpp, settings)
        picture = draw_mask(thumbnail, mask, tissue.ink, coords, size, patch_px_level0)
        record["tissue_mm2"] = round(float(mask.sum()) * mask_mpp**2 / 1e6, 4)
        if slide.level0_mpp > 1.1 * settings.mpp:
            record["warnings"].append(
                f"patches are enlarged: the slide has {slide.level0_mpp:g} µm/px, asked for {settings.mpp:g}"
            )
        if not len(coords):
            raise SlideError(nothing_kept(f"slide {slide_id} ({path})", record, outputs.mask))
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
    if outputs.contours is not None:
        with replace_when_whole(outputs.contours) as part:
            part.write_text(json.dumps(contours) + "\n", encoding="utf-8")
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


def choose_patches(
    slide: Slide, mask: np.ndarray, tissue: Tissue, mask_mpp: float, settings: TilingSettings
) -> tuple[np.ndarray, dict[str, int]]:
    """Corners of the patches to keep, (N, 2) int32 level-0 pixels in row-major order, and the counts of all others.

    mask: (H, W) bool, the tissue, at mask_mpp µm per pixel. In the counts, grid = kept + every reason of REASONS.
    """
    scale = settings.mpp / slide.level0_mpp
    step = (settings.patch_px - settings.overlap_px) * scale
    grid = lay_grid((slide.width, slide.height), settings.patch_px * scale, step)
    counts = Counter({"outside": grid.outside})
    chosen = np.ones(grid.shape, bool)

    def drop(reason: str, broken: np.ndarray) -> None:
        counts[reason] = int((chosen & broken).sum())
        chosen[broken] = False

    drop("ink", grid.shares(tissue.ink) > settings.max_ink_share)
    drop("little_tissue", grid.shares(mask) < settings.min_tissue_share)
    if settings.max_fold_share < 1:
        folds = find_folds(tissue.balanced, mask & ~tissue.ink, mask_mpp, settings.fold_density)
        drop("fold", grid.shares(folds) > settings.max_fold_share)
    coords = grid.coords(chosen)

    limits = PixelLimits(settings.max_white_share, settings.max_black_share, settings.min_sharpness)
    if not limits.accept_all:
        batch = max(1, BATCH_BYTES // (3 * settings.patch_px**2))
        # A patch that cannot be decoded stays: `encode` lists it.
        reader = PatchReader(slide, coords, settings.patch_px, settings.mpp, ReadingSettings(max_damaged_share=1))
        flaws = np.full(len(coords), "", object)
        for patches in reader.batches(batch, threads=1):
            flaws[patches.rows] = [flaw or "" for flaw in pixel_flaws(patches.pixels, tissue.background, limits)]
        counts.update(flaw for flaw in flaws if flaw)
        coords = coords[flaws == ""]

    if settings.max_patches is not None and len(coords) > settings.max_patches:
        counts["over_cap"] = len(coords) - settings.max_patches
        drawn = np.random.default_rng(settings.sampling_seed).permutation(len(coords))[: settings.max_patches]
        coords = coords[np.sort(drawn)]
    counted = {reason: counts[reason] for reason in REASONS}
    return coords, {"grid": len(coords) + sum(counted.values()), "kept": len(coords), **counted}


def nothing_kept(where: str, record: dict[str, Any], picture: Path) -> str:
    """Why a slide has no patch, and what to do."""
    found = ", ".join(f"{reason} {count}" for reason, count in record["counts"].items() if count) or "none"
    return (
        f"{where} has no patch with at least {record['settings']['min_tissue_share']:.0%} tissue"
        f" ({record['tissue_mm2']} mm² of tissue found; patches: {found}): look at {picture}; lower min_tissue_share or"
        " saturation_threshold, or set exclude in the sheet"
    )


def tiling_hash(record: dict[str, Any], coords: np.ndarray) -> str:
    """Short hash of everything that decides which pixels the patches hold; equal hash, equal patches."""
    names = ("slide_id", "source", "level0_mpp", "patch_px", "mpp")
    text = json.dumps({name: record[name] for name in names}, sort_keys=True)
    return hashlib.sha256(text.encode() + coords.astype("<i4").tobytes()).hexdigest()[:16]
