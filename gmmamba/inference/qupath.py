"""What QuPath (0.4 and later) imports, and napari through its GeoJSON readers: outlines of groups, patches, heat map.

GeoJSON FeatureCollections in level-0 pixels, as QuPath writes and reads them: `objectType` ("annotation" or
"detection"), `classification` {name, color}, `measurements` {name: number}, `isLocked`; ids depend on slide and object
alone, so that equal predictions give equal files.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

Colour = tuple[int, int, int]


def feature(
    slide_id: str,
    kind: str,
    name: str,
    geometry: shapely.Geometry,
    measurements: Mapping[str, float],
    classification: str | None = None,
    colour: Colour | None = None,
) -> dict[str, Any]:
    """One object. kind: "annotation" or "detection". Without a classification, `colour` is the object's own."""
    properties: dict[str, Any] = {"objectType": kind, "name": name, "isLocked": True}
    if classification is not None:
        properties["classification"] = {"name": classification, "color": list(colour or (128, 128, 128))}
    elif colour is not None:
        properties["color"] = list(colour)
    properties["measurements"] = {key: float(value) for key, value in measurements.items()}
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"gmmamba:{slide_id}:{kind}:{name}")),
        "geometry": shapely.geometry.mapping(geometry),
        "properties": properties,
    }


def collection(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


def patch_boxes(coords: NDArray[np.int32], side: float) -> NDArray[np.object_]:
    """A polygon (N,) for each patch at `coords` (N, 2), `side` level-0 pixels wide and high."""
    left, top = coords.T.astype(np.float64)
    boxes: NDArray[np.object_] = shapely.box(left, top, np.round(left + side, 1), np.round(top + side, 1))
    return boxes


def group_outlines(coords: NDArray[np.int32], side: float, labels: NDArray[np.int64]) -> dict[int, shapely.Geometry]:
    """The merged outline, Polygon or MultiPolygon, of each group's patches.

    Corners are whole pixels while steps of the grid need not be: patches are rounded up, so that neighbours join.
    """
    boxes = patch_boxes(coords, float(np.ceil(side)))
    return {int(label): shapely.union_all(boxes[labels == label]) for label in np.unique(labels)}
