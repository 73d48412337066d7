"""Real slides through tile and encode: SVS as JPEG and as JPEG 2000, one without a scale, one nearly empty, DICOM."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocessing.encode import encode_slide
from preprocessing.encoders import EncoderSettings
from preprocessing.patches import ReadingSettings
from preprocessing.tile import Outputs, TilingSettings, tile_slide
from slidestore import open_store

CMU, TCGA, LUNA = "CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "msk_luna_1065626.svs"
DICOM = "cmu-1-small-region-dicom"
TINY = EncoderSettings(name="tiny", model="test_resnet", weights="random")


def tile(slide: Path, folder: Path, target_mpp: float = 0.5, **given: Any) -> tuple[dict[str, Any], Outputs]:
    outputs = Outputs(*(folder / f"S1{end}" for end in (".npy", ".json", ".thumbnail.jpg", ".mask.png", ".geojson")))
    return tile_slide(slide, "S1", "real", TilingSettings(mpp=target_mpp), outputs, **given), outputs


# Patches of 224 px by eye on the mask pictures in docs/masks, at 20x and 10x; tissue in mm².
@pytest.mark.parametrize(
    ("name", "given", "patches", "tissue_mm2"),
    [
        (CMU, {}, {0.5: 49, 1.0: 11}, 0.64),
        (TCGA, {"mpp": 0.5, "mpp_source": "sheet"}, {0.5: 193, 1.0: 47}, 2.55),
        (LUNA, {}, {0.5: 16, 1.0: 2}, 0.225),
        (DICOM, {}, {0.5: 49, 1.0: 12}, 0.66),
    ],
)
@pytest.mark.parametrize("target_mpp", [0.5, 1.0])
def test_a_real_slide_becomes_features(
    shared: Path,
    tmp_path: Path,
    name: str,
    given: dict[str, Any],
    patches: dict[float, int],
    tissue_mm2: float,
    target_mpp: float,
) -> None:
    slide = shared / "data" / "slides" / name
    record, outputs = tile(slide, tmp_path, target_mpp, **given)
    assert record["status"] == "ok"
    assert record["counts"]["kept"] == pytest.approx(patches[target_mpp], rel=0.1, abs=1)
    assert record["tissue_mm2"] == pytest.approx(tissue_mm2, rel=0.1)
    assert bool(record["warnings"]) == (name == DICOM)
    encode_slide(slide, outputs.coords, outputs.record, TINY, ReadingSettings(), tmp_path / "S1.zarr.zip")
    store = open_store(tmp_path / "S1.zarr.zip", encoder="tiny")
    assert store.shape == (record["counts"]["kept"], 96)
    assert store.features.std(axis=0, dtype=np.float32).max() > 0  # patches differ
    assert store.attributes.failure is None


def test_the_slide_without_a_scale_is_refused_with_the_remedy(shared: Path, tmp_path: Path) -> None:
    record, outputs = tile(shared / "data" / "slides" / TCGA, tmp_path)
    assert record["status"] == "failed"
    assert "TS1.svs) has no mpp: add an 'mpp' column to the sheet, or set cohorts.real.mpp" in record["reason"]
    assert json.loads(outputs.record.read_text())["reason"] == record["reason"]


def test_false_colours_are_said(shared: Path, tmp_path: Path) -> None:
    record, _ = tile(shared / "data" / "slides" / DICOM, tmp_path)
    assert record["warnings"][0].startswith("implausible colours: the background is RGB (244, 127, 129)")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("name", [CMU, LUNA])
def test_a_truncated_slide_ends_as_a_recorded_failure(shared: Path, tmp_path: Path, name: str, share: float) -> None:
    """Or, where all that is cut off is what nobody reads, with all its patches; never with some of them."""
    whole = shared / "data" / "slides" / name
    slide = tmp_path / name
    slide.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    _, outputs = tile(slide, tmp_path)
    encode_slide(slide, outputs.coords, outputs.record, TINY, ReadingSettings(), tmp_path / "S1.zarr.zip")
    store = open_store(tmp_path / "S1.zarr.zip")
    if store.attributes.failure:
        assert store.shape[0] == 0
        assert "copy it anew" in store.attributes.failure["reason"]
    else:
        _, outputs = tile(whole, tmp_path)
        encode_slide(whole, outputs.coords, outputs.record, TINY, ReadingSettings(), tmp_path / "whole.zarr.zip")
        np.testing.assert_array_equal(store.features, open_store(tmp_path / "whole.zarr.zip").features)
        assert share > 0.9
