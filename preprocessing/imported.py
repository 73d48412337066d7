"""Stages import_tiles and import_features: patches and features that another tool made, in place of tile and encode.

Never imports torch, but for .pt files. `import_tiles` writes what `tile` does (see preprocessing.tile.Outputs): where
the slide's own file is not at hand, the pictures show the patches alone and say so. `import_features` writes the store
of one encoder; its rows must be the patches of `import_tiles`.

Files that cannot be used fail their slide, as a damaged slide would: the record says why, and so does a store with
N = 0.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from preprocessing import CREATED_BY
from preprocessing.drawing import THUMBNAIL_PX, draw_reason, encode_picture
from preprocessing.errors import SlideError
from preprocessing.slide import open_slide
from preprocessing.tile import Outputs
from slidestore import StoreAttributes, StoreError, write_store
from slidestore.atomic import replace_when_whole
from slidestore.foreign import ForeignFiles, ForeignPatches, foreign_attributes, frame, read_features, read_patches

RECORDED = (
    "slide_id", "cohort", "patch_px", "patch_px_level0", "mpp", "level0_mpp", "level0_width", "level0_height",
    "magnification", "tiling_hash", "source", "created_by",
)  # fmt: skip

log = logging.getLogger(__name__)


def import_tiles(
    path: Path,
    slide_id: str,
    cohort: str,
    files: ForeignFiles,
    outputs: Outputs,
    mpp: float | None = None,
    mpp_source: str = "sheet",
) -> dict[str, Any]:
    """Take over the patches of one slide, write the four outputs and return the record.

    path: the slide, for the pictures; it need not exist. mpp: of level 0, where the sheet or the config gives one; else
    it comes from the tool's magnifications.
    """
    record: dict[str, Any] = {"status": "ok", "reason": None, "warnings": []}
    coords = np.empty((0, 2), np.int32)
    try:
        patches = read_patches(files, mpp)
        thumbnail, size, warning = picture_of(path, slide_id, cohort, patches)
        if size:
            width, height = size
            patches = replace(patches, scale=replace(patches.scale, level0_width=width, level0_height=height))
        record["warnings"] = [warning] if warning else []
        attributes = foreign_attributes(patches, files, slide_id, cohort, "", CREATED_BY)
        coords = patches.coords
        picture = draw_patches(thumbnail, coords, patches.scale.patch_px_level0, frame(patches)[0])
        if not size:  # then the patches are all there is to be seen
            thumbnail = picture
    except StoreError as error:
        log.warning("slide %s: %s", slide_id, error)
        record |= {"status": "failed", "reason": str(error)}
        attributes = failed_attributes(slide_id, cohort, "", files)
        thumbnail = picture = draw_reason(str(error))
    record |= {name: getattr(attributes, name) for name in RECORDED}
    record |= {
        "mpp_source": mpp_source if mpp is not None else files.format,
        "counts": {"kept": len(coords)},
        "imported_from": {
            "format": files.format,
            "path": str(files.path),
            "patches": files.patches and str(files.patches),
        },
    }
    with replace_when_whole(outputs.thumbnail) as part:
        part.write_bytes(encode_picture(".jpg", thumbnail))
    with replace_when_whole(outputs.mask) as part:
        part.write_bytes(encode_picture(".png", picture))
    with replace_when_whole(outputs.coords) as part, part.open("wb") as file:
        np.save(file, coords)
    with replace_when_whole(outputs.record) as part:
        part.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def import_features(
    coords_path: Path,
    record_path: Path,
    files: ForeignFiles,
    encoder: str,
    encoder_weights_sha256: str | None,
    output: Path,
) -> None:
    """Write the store of one slide and encoder from the tool's files; coords and record are of `import_tiles`."""
    record = json.loads(record_path.read_text(encoding="utf-8"))
    coords = np.load(coords_path)
    try:
        if record["status"] == "failed":
            raise StoreError(record["reason"])
        patches = read_patches(files, record["level0_mpp"])
        same = np.array_equal(patches.coords, coords)
        if not same or abs(patches.scale.patch_px_level0 - record["patch_px_level0"]) > 0.5:
            raise StoreError(
                f"{files.path}: its patches are not those of {record['imported_from']['path']}, which all encoders of a"
                " cohort share: extract both from the same patches, or make another cohort of it"
            )
        features = read_features(files, patches)
        size = {name: record[name] for name in ("level0_width", "level0_height")}
        patches = replace(patches, scale=replace(patches.scale, **size))
        if patches.own and not encoder_weights_sha256:
            encoder_weights_sha256 = patches.own.encoder_weights_sha256
        attributes = foreign_attributes(
            patches, files, record["slide_id"], record["cohort"], encoder, CREATED_BY, encoder_weights_sha256
        )
        source = {**record["source"], **attributes.source}  # the record knows where the size came from
        attributes = replace(attributes, tiling_hash=record["tiling_hash"], source=source)
    except StoreError as error:
        log.warning("slide %s: %s", record["slide_id"], error)
        attributes = failed_attributes(record["slide_id"], record["cohort"], encoder, files)
        attributes = replace(attributes, failure={"stage": "import", "reason": str(error)})
        coords, features = coords[:0], np.empty((0, 0), np.float16)
    write_store(output, coords, features, attributes)


def failed_attributes(slide_id: str, cohort: str, encoder: str, files: ForeignFiles) -> StoreAttributes:
    """Of a slide whose files could not be used: sizes and scales are None or 0."""
    return StoreAttributes(
        slide_id=slide_id, cohort=cohort, patch_px=0, patch_px_level0=None, mpp=0.0, level0_mpp=None, level0_width=None,
        level0_height=None, magnification=0.0, encoder=encoder, encoder_weights_sha256=None, tiling_hash="",
        source=files.source(), created_by=CREATED_BY,
    )  # fmt: skip


def picture_of(
    path: Path, slide_id: str, cohort: str, patches: ForeignPatches
) -> tuple[np.ndarray, tuple[int, int] | None, str | None]:
    """A thumbnail, long side about 1024 px; the slide's size in level-0 pixels if its file could be read; a warning.

    Raises StoreError where the slide has another size than the tool saw.
    """
    scale = patches.scale
    if not path.is_file() and not any(path.glob("*.dcm")):
        return blank(patches, "The slide itself is not at hand. Its patches:"), None, None
    try:
        slide = open_slide(path, slide_id, cohort, scale.level0_mpp, "sheet")  # the features are what they are
        thumbnail = slide.read_whole(max(slide.width, slide.height) * scale.level0_mpp / THUMBNAIL_PX)
    except SlideError as error:
        return blank(patches, str(error)), None, f"no picture of the slide: {error}"
    size, seen = (slide.width, slide.height), (scale.level0_width, scale.level0_height)
    if None not in seen and seen != size:
        raise StoreError(
            f"slide {slide_id} ({path}) has {size[0]} x {size[1]} pixels, its imported patches are of a slide of"
            f" {seen[0]} x {seen[1]}: these are two scans; mend the sheet's path, or exclude the slide"
        )
    return thumbnail, size, None


def blank(patches: ForeignPatches, text: str) -> np.ndarray:
    """White, of the slide's proportions, with a remark."""
    width, height = frame(patches)
    scale = THUMBNAIL_PX / max(width, height)
    picture = np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 255, np.uint8)
    remark = draw_reason(text)[: picture.shape[0], : picture.shape[1]]
    picture[: remark.shape[0], : remark.shape[1]] = remark
    return picture


def draw_patches(thumbnail: np.ndarray, coords: np.ndarray, patch_px_level0: float, level0_width: int) -> np.ndarray:
    """The thumbnail with the outlines of the patches at `coords` (N, 2), level-0 pixels."""
    picture = thumbnail.copy()
    scale = thumbnail.shape[1] / level0_width
    for corner in coords:
        first, last = np.rint(corner * scale), np.rint((corner + patch_px_level0) * scale)
        cv2.rectangle(picture, first.astype(int).tolist(), last.astype(int).tolist(), (0, 0, 0), 1)
    return cv2.addWeighted(thumbnail, 0.5, picture, 0.5, 0)
