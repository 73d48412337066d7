"""Slides to predict, their preparation, and foci: what is listed, refused, forgotten and kept."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gmmamba.cohort import Slide
from gmmamba.foci import FociError, Focus, read_foci
from gmmamba.inference.localise import in_foci, localise
from gmmamba.inference.pipeline import InferenceError
from gmmamba.inference.preparation import Preparation
from gmmamba.new_slides import SlidesError, list_slides
from preprocessing.patch_picture import picture_patches
from slidestore import StoreAttributes, write_store
from slidestore.progress import progress_bar

# Slides -----------------------------------------------------------------------------------------------------------


def test_slides_of_a_folder_a_sheet_and_a_file(tmp_path: Path) -> None:
    for name in ("b.svs", "sub/a (1).tif", "dicom/0.dcm", "dicom/1.dcm", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = {slide.slide_id: slide.path for slide in list_slides(tmp_path)}
    assert found == {"b": tmp_path / "b.svs", "dicom": tmp_path / "dicom", "a_1": tmp_path / "sub/a (1).tif"}
    assert [slide.slide_id for slide in list_slides(tmp_path / "b.svs", 0.25)] == ["b"]
    sheet = tmp_path / "s.csv"
    sheet.write_text("path,slide_id,mpp,label,exclude\nb.svs,,0.5,tumour,\ndicom,d,,normal,\nsub,,,,torn\n")
    rows = [(s.slide_id, s.mpp, s.mpp_source, s.label) for s in list_slides(sheet, 0.25)]
    assert rows == [("b", 0.5, "sheet", "tumour"), ("d", 0.25, "config", "normal")]


@pytest.mark.parametrize("marks", [["preparation.json"], ["predictions.csv", "members.csv"]])
@pytest.mark.parametrize("output", ["predictions", "."])
def test_heat_maps_of_an_earlier_run_are_no_slides(tmp_path: Path, output: str, marks: list[str]) -> None:
    for name in ("a.svs", f"{output}/slides/a/heatmap.ome.tif", *(f"{output}/{mark}" for mark in marks)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [slide.slide_id for slide in list_slides(tmp_path)] == ["a"]


def prepared(output: Path, cohort: str, encoder: str, slide_id: str = "s") -> tuple[Path, Path]:
    """The tile record and the store of a slide, as far as `Preparation.begin` looks at them."""
    tiled, store = output / f"tiles/{slide_id}.json", output / "features" / encoder / f"{slide_id}.zarr.zip"
    tiled.parent.mkdir(parents=True, exist_ok=True)
    tiled.write_text(json.dumps({"cohort": cohort}))
    attributes = StoreAttributes(
        slide_id=slide_id, cohort=cohort, patch_px=64, patch_px_level0=64, mpp=0.5, level0_mpp=0.5, level0_width=64,
        level0_height=64, magnification=None, encoder=encoder, encoder_weights_sha256="ab", tiling_hash="x", source={},
        created_by="test",
    )  # fmt: skip
    write_store(store, np.zeros((1, 2), np.int32), np.zeros((1, 4), np.float16), attributes)
    return tiled, store


def preparation(output: Path, sha256: str = "ab", **encoder: str) -> Preparation:
    encoder = {"name": "tiny", "model": "test_resnet", "weights": "w.safetensors"} | encoder
    return Preparation(output, {"mpp": 0.5}, {}, encoder, sha256, 1)


def test_the_bar_moves_within_a_slide_too(tmp_path: Path) -> None:
    """By the lines that encoding writes into its log now and then, and by the stores of slides that are done."""
    log = tmp_path / "logs/encode/all.log"
    log.parent.mkdir(parents=True)
    log.write_text("INFO s: 900 patches, tiny on cpu\n")
    prepared(tmp_path, "new", "tiny")
    assert preparation(tmp_path)._encoded({"s": 900, "t": 3100}) == 900
    log.write_text(f"INFO s: 900 patches, tiny on cpu\n{progress_bar(total=4000, initial=1200, unit='patches')}\n")
    assert preparation(tmp_path)._encoded({"s": 900, "t": 3100}) == 1200


def test_another_s_tiles_and_features_are_refused_and_stay(tmp_path: Path) -> None:
    files = prepared(tmp_path, "mycohort", "tiny")
    with pytest.raises(SlidesError, match="holds tiles or features that predict did not make: choose another --output"):
        preparation(tmp_path).begin()
    files[0].unlink()
    with pytest.raises(SlidesError, match="choose another --output"):
        preparation(tmp_path).begin()
    assert files[1].is_file()
    assert not (tmp_path / "preparation.json").exists()


def test_only_what_was_prepared_with_other_settings_is_forgotten(tmp_path: Path) -> None:
    preparation(tmp_path).begin()
    files = prepared(tmp_path, "new", "tiny")
    _, other = prepared(tmp_path, "new", "other")
    orphan = prepared(tmp_path, "new", "tiny", "t")
    orphan[0].unlink()
    preparation(tmp_path, weights="elsewhere.safetensors").begin()  # the same weights at another path
    assert all(path.is_file() for path in files)
    preparation(tmp_path, sha256="cd").begin()
    assert [path.is_file() for path in (*files, orphan[1], other)] == [False, False, False, True]
    files = prepared(tmp_path, "mycohort", "tiny")  # Snakemake's, since then
    preparation(tmp_path).begin()
    assert all(path.is_file() for path in files)


def test_a_killed_stage_is_said_to_be_so_and_the_first_slide_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = preparation(tmp_path)
    slides = [slide for name in "ab" for slide in list_slides(touched(tmp_path / f"{name}.svs"))]
    ended: list[str] = []
    script = {"all": "echo INFO 12 patches; kill -9 $$"}

    def run(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        ended.append(command[3])
        return popen(["sh", "-c", script["all"]], **options)

    def tile(self: Preparation, slide: Slide) -> None:
        record = self.tiles(slide.slide_id, ".json")
        record.parent.mkdir(exist_ok=True)
        record.write_text('{"cohort": "new", "counts": {"kept": 12}}')

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(Preparation, "_tile", tile)
    monkeypatch.setattr(Preparation, "_is_encoded", lambda self, slide_id: False)
    with pytest.raises(SlidesError, match=r"encode ended with exit status -9, see .*logs/encode/all.log"):
        asked.prepare(slides)
    assert ended == ["encode"]
    script["all"] = "echo 'preprocessing: no such model'; exit 1"
    with pytest.raises(SlidesError, match=r"^no such model$"):
        asked.prepare(slides)
    script["all"] = "echo INFO nothing to do"
    reason = f"encode ended with exit status 0, see {tmp_path}/logs/encode/all.log"
    assert asked.prepare(slides) == {"a": reason, "b": reason}


def touched(path: Path) -> Path:
    path.touch()
    return path


def test_slides_left_without_a_tile_record_stop_no_picture(tmp_path: Path) -> None:
    for name in ("a_left", "b"):
        (tmp_path / "slides" / name).mkdir(parents=True)
        content = {"path": "none.svs", "rows": [{"title": "x", "patches": []}]}
        (tmp_path / "slides" / name / "patches.json").write_text(json.dumps(content))
    picture_patches(tmp_path)  # of a file that is gone, too, it only warns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id\na\n", "no column 'path'"),
        ("path\n", "it lists no slide"),
        ("path,slide_id\n\nx.svs,a\n", "line 3: slide a: no such file"),
        ("path\nx.svs,a\n", "more cells than the first one has names"),
        ("path,slide_id\nx.svs,a\nx.svs,a\n", "line 2: slide a: no such file: .*line 3: slide_id 'a' stands in line 2"),
        ("path,mpp\ns.csv,big\n", "line 2: slide s.csv: 'big' is not a number"),
    ],
)
def test_bad_sheets_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(SlidesError, match=message):
        list_slides(tmp_path / "s.csv")


def test_nothing_to_predict_is_said(tmp_path: Path) -> None:
    with pytest.raises(SlidesError, match="holds no slide"):
        list_slides(tmp_path)
    with pytest.raises(SlidesError, match="does not exist"):
        list_slides(tmp_path / "none")


# Localisation -----------------------------------------------------------------------------------------------------


def test_the_share_of_a_patch_in_foci() -> None:
    coords = np.array([[0, 0], [100, 0], [200, 0]], np.int32)
    squares = [Focus(0, 0, "side", 100), Focus(150, 0, "side", 100)]
    assert in_foci(coords, 100.0, squares).tolist() == [1, 0.5, 0.5]
    disc = Focus(50, 50, "radius", 40)
    assert in_foci(coords, 100.0, [disc]) == pytest.approx([np.pi * 0.16, 0, 0], abs=0.02)


def test_squares_and_discs_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "foci.csv"
    path.write_text("slide_id,x,y,tile_px,radius_px,class\na,50,50,,40,T\na,150,0,100,,\n007,1,2,3,,\n")
    found = read_foci(path)
    assert found == {
        "a": [Focus(50, 50, "radius", 40, "T"), Focus(150, 0, "side", 100)],
        "007": [Focus(1, 2, "side", 3)],
    }
    coords = np.array([[0, 0], [100, 0]], np.int32)
    assert in_foci(coords, 100.0, found["a"]) == pytest.approx([np.pi * 0.16, 0.5], abs=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,x,y\na,1,2\n", "must have the columns slide_id, x, y and tile_px or radius_px, not slide_id, x, y"),
        ("slide_id,x,y,radius_px\na,1,2,3\na,1,2,\n", "line 3: a focus needs the numbers"),
        ("slide_id,x,y,radius_px\na,,2,3\n", "line 2: a focus needs"),
        ("slide_id,x,y,radius_px,tile_px\na,1,2,3,4\n", "line 2: a focus needs .* one of"),
        ("slide_id,x,y,radius_px\na,1,2,nan\n", "line 2: a focus needs"),
    ],
)
def test_bad_foci_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "foci.csv").write_text(text)
    with pytest.raises(FociError, match=message):
        read_foci(tmp_path / "foci.csv")


def test_localisation_of_predictions(tmp_path: Path) -> None:
    """Attention that ranks the foci first is 1, its reverse 0; slides without foci are left out."""
    for slide_id, sign in (("a", 1), ("b", -1), ("c", 1)):
        (tmp_path / "slides" / slide_id).mkdir(parents=True)
        patches = pd.DataFrame({"x": [0, 100, 200], "y": 0, "group": [0, 0, 1]})
        patches["attention"] = np.array([3, 2, 1.0]) * sign
        patches.to_csv(tmp_path / "slides" / slide_id / "patches.csv", index=False)
        (tmp_path / "tiles").mkdir(exist_ok=True)
        (tmp_path / "tiles" / f"{slide_id}.json").write_text('{"patch_px_level0": 100.0}')
    (tmp_path / "predictions.csv").touch()
    (tmp_path / "foci.csv").write_text("slide_id,x,y,tile_px,class\na,0,0,100,T\nb,0,0,100,T\n")
    said = localise(tmp_path, tmp_path / "foci.csv", tmp_path / "l.csv")
    assert "attention    AUROC 0.500" in said
    table = pd.read_csv(tmp_path / "l.csv", index_col="slide_id")
    assert table.attention_auroc.to_dict() == {"a": 1, "b": 0}
    assert table.attention_top.to_dict() == {"a": True, "b": False}
    assert table.attention_group_top.to_dict() == {"a": 1, "b": 0}
    assert (table.group_chance == 0.5).all()
    (tmp_path / "foci.csv").write_text("slide_id,x,y,tile_px,class\nz,0,0,100,T\n")
    with pytest.raises(InferenceError, match="no focus in a slide of"):
        localise(tmp_path, tmp_path / "foci.csv", tmp_path / "l.csv")
