"""Outlines: valid, faithful to the mask they were drawn from, and masks read from what people hand in."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.contours import _fill, read_mask, tissue_polygons, to_geojson
from preprocessing.errors import SlideError

SIZE = (4000, 3000)  # of the slide, level-0 pixels
SHAPE = (75, 100)  # of the mask


def random_mask(seed: int, density: float, smooth: int) -> np.ndarray:
    noise = np.random.default_rng(seed).random((40, 50)).astype(np.float32)
    noise = cv2.blur(noise, (smooth, smooth))
    return noise < np.quantile(noise, density)


MASKS = st.builds(random_mask, st.integers(0, 10_000), st.floats(0.02, 0.98), st.integers(1, 9))


@settings(deadline=None)
@given(MASKS)
def test_outlines_are_valid_and_give_the_mask_again(mask: np.ndarray) -> None:
    """Also where pixels touch at corners only, and parts lie in the holes of others."""
    size = (mask.shape[1] * 7, mask.shape[0] * 7)
    exact = tissue_polygons(mask, tolerance=0)
    rings = [[shapely.get_coordinates(r) * 7 for r in (p.exterior, *p.interiors)] for p in exact]
    np.testing.assert_array_equal(_fill(rings, size, mask.shape), mask)

    document = to_geojson(mask, size)
    for feature in document["features"]:
        polygon = shapely.geometry.shape(feature["geometry"])
        assert polygon.is_valid
        assert polygon.exterior.is_ccw
        assert not any(ring.is_ccw for ring in polygon.interiors)
        assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"] == {"name": "Tissue", "color": [0, 160, 0]}


def test_outlines_of_a_disc_are_short_and_close() -> None:
    mask = np.zeros((200, 200), np.uint8)
    cv2.circle(mask, (100, 100), 80, 1, -1)
    cv2.circle(mask, (100, 100), 30, 0, -1)
    (polygon,) = tissue_polygons(mask.astype(bool))
    assert polygon.area == pytest.approx(mask.sum(), rel=0.02)
    assert len(polygon.interiors) == 1
    assert len(shapely.get_coordinates(polygon)) < 80


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(kind: str, coordinates: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": {}}


HOLED = feature("Polygon", [square(400, 400, 800), square(600, 600, 400)])
TWO = feature("MultiPolygon", [[square(2000, 400, 800)], [square(2000, 2000, 400)]])
OVERLAPPING = feature("Polygon", [square(2400, 400, 800)])
UNION_PX = 800**2 - 400**2 + 800**2 + 400**2 + 400 * 800


@pytest.mark.parametrize(
    ("document", "area"),
    [
        ({"type": "FeatureCollection", "features": [HOLED, TWO, OVERLAPPING]}, UNION_PX),
        ([HOLED, TWO, OVERLAPPING], UNION_PX),  # as older QuPath exports it
        (HOLED, 800**2 - 400**2),
        (TWO["geometry"], 800**2 + 400**2),
    ],
    ids=["collection", "list", "feature", "geometry"],
)
def test_polygons_with_holes_add_up(tmp_path: Path, document: Any, area: float) -> None:
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(document))
    mask = read_mask(path, "S1", SIZE, SHAPE)
    assert mask.shape == SHAPE
    assert mask.sum() * 40**2 == area


@pytest.mark.parametrize("width", [40, 100, 400, 3999])
@pytest.mark.parametrize("kind", ["png", "colour.png", "tif", "pyramid.tif"])
def test_pictures_of_any_scale(tmp_path: Path, kind: str, width: int) -> None:
    height = round(width * 0.75)
    picture = np.zeros((height, width), np.uint8)
    picture[:, : width // 2] = 255
    path = tmp_path / f"mask.{kind}"
    if kind.endswith("png"):
        cv2.imwrite(str(path), picture if kind == "png" else cv2.cvtColor(picture, cv2.COLOR_GRAY2BGRA))
    else:
        with tifffile.TiffWriter(path) as tif:
            tif.write(picture, subifds=kind.startswith("pyramid"), compression="deflate")
            if kind.startswith("pyramid"):
                tif.write(picture[::2, ::2], subfiletype=1, compression="deflate")
    mask = read_mask(path, "S1", SIZE, SHAPE)
    assert mask.shape == SHAPE
    assert mask[:, :49].all()
    assert not mask[:, 51:].any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.geojson", b"{", "is not GeoJSON with polygons (JSONDecodeError"),
        ("m.geojson", b"\xff\xfe", "is not GeoJSON with polygons (UnicodeDecodeError"),
        ("m.geojson", b"[1]", "is not GeoJSON with polygons"),
        ("m.geojson", json.dumps(feature("Point", [1, 2])).encode(), "a Point has no area"),
        ("m.geojson", json.dumps(feature("Polygon", [[[1, 2], [3, 4]]])).encode(), "fewer than three points"),
        ("m.geojson", json.dumps(feature("Polygon", [square(9000, 9000, 50)])).encode(), "marks no tissue within"),
        ("m.geojson", b'{"type": "FeatureCollection", "features": []}', "marks no tissue within the slide"),
        ("m.png", b"no picture", "cannot be read as a picture"),
        ("m.tif", b"no picture", "cannot be read as a picture"),
        ("m.png", cv2.imencode(".png", np.ones((100, 100), np.uint8))[1].tobytes(), "is 100 x 100 px, which is not"),
    ],
)
def test_masks_that_cannot_be_are_named_with_the_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError) as caught:
        read_mask(tmp_path / name, "S1", SIZE, SHAPE)
    assert f"slide S1: mask {tmp_path / name}" in str(caught.value)
    assert message in str(caught.value)
    assert "empty the sheet's 'mask' cell" in str(caught.value)
