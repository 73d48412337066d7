"""Tissue as outlines: written as GeoJSON that QuPath opens, and read from GeoJSON or from a picture.

Outlines follow the edges of the mask's pixels. To draw and to trace them exactly, both work on a lattice twice as fine,
(2H + 1, 2W + 1), whose odd points are the centres of pixels and whose even points are their edges and corners.
"""

import json
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
import tifffile

from preprocessing.errors import SlideError

OUTLINES = (".geojson", ".json")  # else it is a picture
ASPECT_TOLERANCE = 0.02  # by which the proportions of a picture may differ from the slide's
TISSUE = {"objectType": "annotation", "classification": {"name": "Tissue", "color": [0, 160, 0]}}


def tissue_polygons(mask: np.ndarray, tolerance: float = 1.0) -> list[shapely.Polygon]:
    """Valid polygons with holes around the tissue of `mask`, (H, W) bool, in its pixels, the largest first.

    Vertices that lie within `tolerance` mask pixels of the simplified outline are left out. Exterior rings run
    counterclockwise (positive area), holes clockwise.
    """
    lattice = np.zeros((2 * mask.shape[0] + 1, 2 * mask.shape[1] + 1), np.uint8)
    lattice[1::2, 1::2] = mask
    lattice = np.asarray(cv2.dilate(lattice, np.ones((3, 3), np.uint8)))
    rings, hierarchy = cv2.findContours(lattice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes: dict[int, list[np.ndarray]] = {i: [] for i in range(len(rings)) if hierarchy[0][i][3] < 0}
    for i, ring in enumerate(rings):
        if i not in holes:
            holes[hierarchy[0][i][3]].append(ring[:, 0] / 2)
    found = []
    for i, inner in holes.items():
        whole = shapely.Polygon(rings[i][:, 0] / 2, inner)
        # Where pixels touch at a corner only, the outline touches itself: made valid, it is several, or has a hole.
        parts = shapely.get_parts(shapely.make_valid(whole)) if not whole.is_valid else [whole]
        found += [part.simplify(tolerance) for part in parts if isinstance(part, shapely.Polygon)]
    found = [shapely.orient_polygons(polygon) for polygon in found if not polygon.is_empty]
    return sorted(found, key=lambda polygon: (-polygon.area, polygon.bounds))


def to_geojson(mask: np.ndarray, slide_size: tuple[int, int]) -> dict[str, Any]:
    """A GeoJSON FeatureCollection of the tissue in `mask`, (H, W) bool, for QuPath: level-0 pixels, a feature a part.

    slide_size is (width, height) in level-0 pixels.
    """
    scale = np.array(slide_size) / mask.shape[::-1]
    features = []
    for polygon in tissue_polygons(mask):
        rings = [polygon.exterior, *polygon.interiors]
        coordinates = [np.round(shapely.get_coordinates(ring) * scale, 1).tolist() for ring in rings]
        geometry = {"type": "Polygon", "coordinates": coordinates}
        features.append({"type": "Feature", "geometry": geometry, "properties": TISSUE})
    return {"type": "FeatureCollection", "features": features}


def read_mask(path: Path, slide_id: str, slide_size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """The tissue that a file describes, (H, W) bool of `shape`, over the whole slide.

    slide_size is (width, height) in level-0 pixels. GeoJSON: every Polygon and MultiPolygon is tissue, in level-0
    pixels. A picture covers the whole slide at any scale; what is not black is tissue.

    Raises SlideError where the file is broken or does not fit the slide.
    """
    where = f"slide {slide_id}: mask {path}"
    if path.suffix.lower() in OUTLINES:
        try:
            polygons = _polygons(json.loads(path.read_text(encoding="utf-8-sig")))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise SlideError(
                f"{where} is not GeoJSON with polygons ({type(error).__name__}: {error}): export it anew from QuPath"
                " (File, Export objects as GeoJSON), or empty the sheet's 'mask' cell"
            ) from error
        mask = _fill(polygons, slide_size, shape)
    else:
        picture = _read_picture(path, where, shape[1])
        height, width = picture.shape
        expected = width * slide_size[1] / slide_size[0]
        if abs(height - expected) > max(1, ASPECT_TOLERANCE * expected):
            raise SlideError(
                f"{where} is {width} x {height} px, which is not the shape of the slide ({slide_size[0]} x"
                f" {slide_size[1]} px): the picture must cover the whole slide; export it anew, or empty the sheet's"
                " 'mask' cell"
            )
        shrinks = width >= shape[1]
        way = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
        mask = np.asarray(cv2.resize(picture.astype(np.uint8) * 255, shape[::-1], interpolation=way)) >= 128
    if not mask.any():
        raise SlideError(
            f"{where} marks no tissue within the slide ({slide_size[0]} x {slide_size[1]} px): outlines must be in"
            " level-0 pixels, and tissue in pictures must not be black; mend it, or empty the sheet's 'mask' cell"
        )
    return mask


def _polygons(document: Any) -> list[list[np.ndarray]]:
    """The rings, (K, 2) float each, of every polygon of a parsed GeoJSON document."""
    features = document if isinstance(document, list) else document.get("features", [document])
    found = []
    for feature in features:
        geometry = feature.get("geometry", feature)
        if geometry["type"] not in ("Polygon", "MultiPolygon"):
            raise ValueError(f"a {geometry['type']} has no area, expected Polygon or MultiPolygon")
        polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        for polygon in polygons:
            rings = [np.array([point[:2] for point in ring], np.float64) for ring in polygon]
            if not all(ring.ndim == 2 and len(ring) > 2 and np.isfinite(ring).all() for ring in rings):
                raise ValueError("a ring has fewer than three points, or coordinates that are no numbers")
            found.append(rings)
    return found


def _fill(polygons: list[list[np.ndarray]], slide_size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels whose centres lie in a polygon and in none of its holes; polygons add up."""
    lattice = np.zeros((2 * shape[0] + 1, 2 * shape[1] + 1), np.uint8)
    scale = 2 * np.array(shape[::-1]) / np.array(slide_size)
    for rings in polygons:
        cv2.fillPoly(lattice, [np.rint(ring * scale).astype(np.int32) for ring in rings], 1)
    return lattice[1::2, 1::2].astype(bool)


def _read_picture(path: Path, where: str, width: int) -> np.ndarray:
    """(H, W) bool: the pixels of a PNG or TIFF that are not black; of a pyramid, the level that is just fine enough."""
    try:
        if path.suffix.lower() == ".png":
            picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if picture is None:
                raise ValueError("no PNG")
        else:
            with tifffile.TiffFile(path) as tiff:
                levels = [level for level in tiff.series[0].levels if level.sizes["width"] >= width]
                picture = (levels[-1] if levels else tiff.series[0].levels[0]).asarray()
    except (ValueError, KeyError, IndexError, RuntimeError, struct.error, cv2.error, tifffile.TiffFileError) as error:
        raise SlideError(
            f"{where} cannot be read as a picture ({error}): export it anew, or empty the sheet's 'mask' cell"
        ) from error
    if picture.ndim == 2:
        return np.asarray(picture > 0)
    if picture.shape[2] == 4:  # with transparency
        return np.asarray((picture[..., :3] > 0).any(axis=2) & (picture[..., 3] > 0))
    return np.asarray((picture > 0).any(axis=2))
