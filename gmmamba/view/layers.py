"""What can be laid over a slide: attention and groups as pictures, tissue and foci as shapes in level-0 pixels.

N patches of a slide, in the order of its store.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from gmmamba.figures import GROUP_COLOURS, HEAT
from gmmamba.foci import read_foci as foci_of_slides
from gmmamba.view.dataset import ListedSlide, Tested
from slidestore import StoreError, open_store
from slidestore.groups import read_groups

PATCH_SIDE = 16  # pixels of a patch's side in a picture, fewer where the picture would be larger than LONGEST_SIDE
LONGEST_SIDE = 4096
SHADES = 255  # of attention; a picture has 256 colours, of which one is "no patch here"

Scale = Literal["linear", "rank"]


@dataclass(frozen=True)
class Patches:
    """coords (N, 2): (x, y) of the top-left corners, level-0 pixels; side, width, height: of a patch and of the slide,
    level-0 pixels, the latter None where imported features do not say; mpp: µm per level-0 pixel."""

    coords: np.ndarray
    side: float
    width: int | None
    height: int | None
    mpp: float | None


def read_patches(slide: ListedSlide) -> Patches | None:
    """The patches of a slide; None where it has none, as it failed or was excluded."""
    if slide.store is None:
        return None
    store = open_store(slide.store)
    attributes = store.attributes
    assert attributes.patch_px_level0 is not None, "a ready slide has patches"
    return Patches(
        store.coords, attributes.patch_px_level0, attributes.level0_width, attributes.level0_height,
        attributes.level0_mpp,
    )  # fmt: skip


def read_attention(tested: Tested, slide_id: str) -> np.ndarray | None:
    """(N,) attention of one run; None for models without, and for those that give each patch the same."""
    with np.load(tested.attention) as maps:
        attention = maps[slide_id] if slide_id in maps.files else None
    return None if attention is None or np.ptp(attention) == 0 else attention


def read_labels(groups: Mapping[tuple[str, str], Path], slide: ListedSlide, grouping: str) -> np.ndarray | None:
    """(N,) group of each patch, 0, 1, ...; None where the grouping has none of this slide."""
    path = groups.get((slide.cohort, grouping))
    if path is None or not path.is_file():
        return None
    found = read_groups(path).get(slide.slide_id)
    return None if found is None else found[1]


def attention_picture(patches: Patches, size: tuple[int, int], attention: np.ndarray, scale: Scale) -> bytes:
    """PNG of attention (N,) on a slide of `size` (width, height), level-0 pixels; clear where there is no patch, or
    where it was masked away (0).

    linear: colours by the share of the largest attention, as in the report; rank: by the share of patches with less.
    """
    check_rows(patches, attention, "attention")
    values = attention / attention.max()
    if scale == "rank":
        order = np.sort(attention)
        values = np.searchsorted(order, attention) / max(1, len(order) - 1)
    shades = 1 + np.rint(np.clip(values, 0, 1) * (SHADES - 1)).astype(np.uint8)
    palette = np.rint(HEAT(np.linspace(0, 1, SHADES))[:, :3] * 255).astype(np.uint8)
    return paint(patches, size, np.where(attention > 0, shades, 0), palette)


def groups_picture(patches: Patches, size: tuple[int, int], labels: np.ndarray) -> bytes:
    """PNG of the group (labels (N,) int) of each patch, in the report's colours."""
    check_rows(patches, labels, "groups")
    return paint(patches, size, 1 + labels % len(GROUP_COLOURS), GROUP_COLOURS)


def group_centres(patches: Patches, labels: np.ndarray) -> list[dict[str, Any]]:
    """The number (from 1, as in the report) and the centre of each group, level-0 pixels, and its colour."""
    check_rows(patches, labels, "groups")
    centres = []
    for label in np.unique(labels).tolist():
        x, y = patches.coords[labels == label].mean(axis=0) + patches.side / 2
        colour = "#{:02x}{:02x}{:02x}".format(*GROUP_COLOURS[label % len(GROUP_COLOURS)])
        centres.append({"number": label + 1, "x": float(x), "y": float(y), "colour": colour})
    return centres


def check_rows(patches: Patches, values: np.ndarray, what: str) -> None:
    """Raise StoreError unless there is a value for each patch: else the slide was encoded anew since."""
    if len(values) != len(patches.coords):
        raise StoreError(
            f"the {what} are of {len(values)} patches, the store has {len(patches.coords)}: the slide was encoded anew "
            "since, run snakemake"
        )


def paint(patches: Patches, size: tuple[int, int], colours: np.ndarray, palette: np.ndarray) -> bytes:
    """PNG of the whole slide in which patch i has the colour palette[colours[i] - 1], none where colours[i] is 0.

    Where patches overlap, the higher number shows.
    """
    scale = min(PATCH_SIDE / patches.side, LONGEST_SIDE / max(size))
    width, height = (max(1, round(length * scale)) for length in size)
    across = np.array([width, height]) / size
    corners = np.rint(patches.coords * across).astype(int)
    ends = np.maximum(np.rint((patches.coords + patches.side) * across).astype(int), corners + 1)
    canvas = np.zeros((height, width), np.uint8)
    for i in np.argsort(colours, kind="stable"):
        (left, top), (right, bottom) = corners[i], ends[i]
        canvas[top:bottom, left:right] = colours[i]
    picture = Image.fromarray(canvas, mode="P")
    picture.putpalette([0, 0, 0, *palette.ravel().tolist()])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", transparency=0)
    return buffer.getvalue()


def read_outlines(slide: ListedSlide) -> list[list[list[list[float]]]]:
    """The tissue of a slide as polygons, each its outer ring and its holes, of (x, y) in level-0 pixels."""
    if not slide.outlines.is_file():
        return []
    features = json.loads(slide.outlines.read_text(encoding="utf-8"))["features"]
    polygons: list[Any] = []
    for geometry in (feature["geometry"] for feature in features):
        many = geometry["type"] == "MultiPolygon"
        polygons += geometry["coordinates"] if many else [geometry["coordinates"]]
    return polygons


def read_foci(slide: ListedSlide) -> list[dict[str, Any]]:
    """The foci of a slide: circles (x, y, radius) and squares (x, y, side; top-left corner), level-0 pixels.

    From foci.csv (gmmamba.foci).
    """
    if not slide.foci.is_file():
        return []
    foci = foci_of_slides(slide.foci).get(slide.slide_id, [])
    return [{"x": focus.x, "y": focus.y, focus.kind: focus.length, "class": focus.label} for focus in foci]
