"""foci.csv of a cohort: where its slides are known to have what a class is about.

A row a focus, in level-0 pixels: `slide_id, x, y` and either tile_px (a square; x, y is its top-left corner) or
radius_px (a disc; x, y is its centre), and an optional `class`. Squares and discs may stand in one file, each with its
own of the two columns filled.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slidestore import StoreError


class FociError(StoreError):
    """A foci.csv that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Focus:
    """A square (kind "side": x, y is the top-left corner) or a disc ("radius": x, y is the centre), level-0 pixels."""

    x: float
    y: float
    kind: Literal["side", "radius"]
    length: float
    label: str = ""  # the column `class`

    @property
    def centre(self) -> tuple[float, float]:
        half = self.length / 2 if self.kind == "side" else 0
        return self.x + half, self.y + half


def read_foci(path: Path) -> dict[str, list[Focus]]:
    """The foci by slide. Raises FociError for a file without these columns, and for a row without a place or a size."""
    found: dict[str, list[Focus]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"slide_id", "x", "y"} <= set(columns) or not {"tile_px", "radius_px"} & set(columns):
            raise FociError(
                f"{path} must have the columns slide_id, x, y and tile_px or radius_px, not {', '.join(columns)}"
            )
        for row in reader:
            square, disc = row.get("tile_px") or "", row.get("radius_px") or ""
            try:
                x, y, length = float(row["x"]), float(row["y"]), float(square or disc)
            except (TypeError, ValueError):
                x = y = length = math.nan
            if bool(square) == bool(disc) or not (math.isfinite(x) and math.isfinite(y) and 0 < length < math.inf):
                raise FociError(
                    f"{path}, line {reader.line_num}: a focus needs the numbers x, y and one of tile_px and radius_px"
                )
            focus = Focus(x, y, "side" if square else "radius", length, row.get("class") or "")
            found.setdefault(row["slide_id"], []).append(focus)
    return found
