"""Pictures of the patches that a prediction names, read from the slides as the encoder saw them, with a caption each.

Reads of a folder that `gmmamba predict` wrote tiles/{slide}.json and slides/{slide}/patches.json: `path` of the slide
and `rows`, each {"title": text, "patches": [{"x", "y", "caption"}]}, x and y in level-0 pixels of the top-left corner.
Writes slides/{slide}/patches.jpg.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocessing.errors import SlideError
from preprocessing.patches import PatchReader
from preprocessing.slide import open_slide
from slidestore.atomic import replace_when_whole

SIDE, GAP, TEXT = 168, 10, 20  # px in the picture: side of a patch, space between, height of a line

log = logging.getLogger(__name__)


def picture_patches(folder: Path) -> None:
    """Write the picture of every slide of the folder; a slide that can no longer be read is warned of.

    Folders without a tile record, left from other slides, are passed over.
    """
    for asked in sorted(folder.glob("slides/*/patches.json")):
        content, tiled = json.loads(asked.read_text(encoding="utf-8")), folder / "tiles" / f"{asked.parent.name}.json"
        if not tiled.is_file():
            log.warning("%s is of a slide that is not in %s: no picture of its patches", asked.parent, tiled.parent)
            continue
        record = json.loads(tiled.read_text(encoding="utf-8"))
        try:
            draw_patches(Path(content["path"]), record, content["rows"], asked.with_suffix(".jpg"))
        except (SlideError, OSError) as error:
            log.warning("%s", error)


def draw_patches(path: Path, record: dict[str, Any], rows: list[dict[str, Any]], output: Path) -> None:
    """Write the JPEG of one slide's rows. A patch that cannot be decoded is grey. Raises SlideError."""
    slide = open_slide(path, record["slide_id"], record["cohort"], record["level0_mpp"], record["mpp_source"])
    columns = max(len(row["patches"]) for row in rows)
    width, height = GAP + columns * (SIDE + GAP), len(rows) * (2 * TEXT + SIDE + 2 * GAP) + GAP
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    top = GAP
    for row in rows:
        draw.text((GAP, top), row["title"], fill="black", font=font)
        coords = np.array([(patch["x"], patch["y"]) for patch in row["patches"]], np.int32).reshape(-1, 2)
        reader = PatchReader(slide, coords, record["patch_px"], record["mpp"])
        for i, patch in enumerate(row["patches"]):
            left = GAP + i * (SIDE + GAP)
            try:
                tile = Image.fromarray(reader.read(i)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            except SlideError:
                tile = Image.new("RGB", (SIDE, SIDE), "lightgrey")
            picture.paste(tile, (left, top + TEXT))
            draw.text((left, top + TEXT + SIDE + 2), patch["caption"], fill="black", font=font)
        top += 2 * TEXT + SIDE + 2 * GAP
    with replace_when_whole(output) as part:
        picture.save(part, format="JPEG", quality=90)
