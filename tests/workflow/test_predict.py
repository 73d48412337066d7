"""New slides by a trained experiment, through Snakemake and by the command: equal to the evaluation, or refused."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import shapely
import tifffile
import torch
import yaml
from safetensors.torch import load_file, save_file

from gmmamba.__main__ import main
from gmmamba.config import ConfigError, load_config
from gmmamba.evaluation import read_predictions
from slidestore import open_store
from tests.slides import tissue, write_aperio
from tests.workflow.project import FILES, add_columns, edit, finish, plan, write_cohort

COHORT = [f"s{i}" for i in range(8)]
CONFIG = {
    "cohorts": {"a": {"sheet": "a/slides.csv"}},
    "tiling": {"patch_px": 64, "mpp": 0.5},
    "encoders": {"tiny": {"model": "test_resnet", "weights": "random", "batch_size": 16}},
    "datasets": {"d": {"cohorts": ["a"], "classes": ["normal", "tumour"], "encoder": "tiny", "split": {"folds": 2}}},
    "training": {"epochs": 6},
    "models": {"gmmamba": {"method": "gmmamba", "groups": 3, "width": 64, "mask": "straight_through"}},
    "experiments": {"gmmamba": {"model": "gmmamba", "dataset": "d"}},
    "predictions": {"fresh": {"slides": "new", "dataset": "d", "experiment": "gmmamba"}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained project, and of two new slides, a broken one and one without mpp the predictions."""
    project = tmp_path_factory.mktemp("predicted")
    write_cohort(project / "a", COHORT)
    add_columns(project / "a/slides.csv", "s7", **{"tiling.mpp": "1.0"})  # new slides follow the cohort all the same
    for i in range(2):
        write_aperio(project / f"new/n {i}.tif", tissue(512, 448, seed=100 + i, dark=bool(i)))
    (project / "new/broken.svs").write_bytes((project / "new/n 0.tif").read_bytes()[:3000])
    write_aperio(project / "new/blind.tif", tissue(256, 256, seed=3), mpp=None)
    (project / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    finish(project)
    return project


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def gmmamba(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in a project's folder."""

    def run(project: Path, *arguments: str | Path) -> Said:
        capsys.readouterr()
        with contextlib.chdir(project):
            status = main([*map(str, arguments)])
        return Said(status, *capsys.readouterr())

    return run


def refused(said: Said, message: str) -> None:
    """In one line that says so."""
    assert said.status == 1, said.out + said.err
    lines = [line for line in said.err.splitlines() if "selective scan" not in line]
    assert len(lines) == 1, said.err
    assert message in lines[0]


def test_snakemake_predicts_a_folder_and_a_broken_slide_costs_itself(finished: Path) -> None:
    table = pd.read_csv(finished / "results/fresh/predictions.csv", index_col="slide_id")
    assert list(table.index[table.status == "failed"]) == ["blind", "broken"]
    assert "set predictions.fresh.mpp" in table.reason["blind"]
    assert "cannot be opened" in table.reason["broken"]
    assert table.loc[["n_0", "n_1"], ["prob_normal", "prob_tumour"]].sum(axis=1).tolist() == pytest.approx([1, 1])
    assert (table.in_training[["n_0", "n_1"]] == "no").all()
    assert not (finished / "results/fresh/slides/broken").exists()
    folder = finished / "results/fresh/slides/n_1"
    names = "annotations.geojson attention.png evidence.png groups.png heatmap.geojson heatmap.ome.tif heatmap.png"
    assert {path.name for path in folder.iterdir()} == {
        *names.split(), "patches.csv", "patches.jpg", "patches.json", "record.json",
    }  # fmt: skip
    assert plan(finished) == set()


def test_what_is_written_of_a_slide_agrees(finished: Path) -> None:
    """The record, the patches, the GeoJSON and the heat map, of the store's patches and the models' logits."""
    folder = finished / "results/fresh/slides/n_1"
    record, patches = json.loads((folder / "record.json").read_text()), pd.read_csv(folder / "patches.csv")
    store = open_store(finished / "results/fresh/features/tiny/n_1.zarr.zip")
    assert patches[["x", "y"]].to_numpy().tolist() == store.coords.tolist()
    assert patches.attention.sum() == pytest.approx(1)
    of_members = record["model"]["members"]
    assert record["probabilities"]["tumour"] == pytest.approx(
        sum(member["probabilities"]["tumour"] for member in of_members) / 2
    )
    found = record["contributions"]
    odds = [member["logits"]["tumour"] - member["logits"]["normal"] for member in of_members]
    assert found["log_odds"] == pytest.approx(sum(odds) / 2, abs=1e-5)
    assert patches.contribution.sum() == pytest.approx(
        found["log_odds"] - found["log_odds_of_the_mean_patch"], abs=1e-3
    )
    assert (patches.contribution[patches.kept == 0] == 0).all()
    assert record["encoder"]["weights_sha256"] == store.attributes.encoder_weights_sha256

    detections = json.loads((folder / "heatmap.geojson").read_text())["features"]
    assert [item["properties"]["measurements"]["contribution"] for item in detections] == pytest.approx(
        patches.contribution.tolist()
    )
    corners = [shapely.geometry.shape(item["geometry"]).bounds[:2] for item in detections]
    assert corners == [tuple(row) for row in store.coords.tolist()]
    annotations = json.loads((folder / "annotations.geojson").read_text())["features"]
    outlines = [a for a in annotations if a["properties"]["name"].startswith("Group")]
    assert sum(a["properties"]["measurements"]["patches"] for a in outlines) == len(patches)
    assert sum(a["properties"]["measurements"]["importance"] for a in outlines) == pytest.approx(1)
    with tifffile.TiffFile(folder / "heatmap.ome.tif") as tiff:
        drawn = tiff.series[0].asarray()
    x, y = store.coords[0] // 16
    assert drawn[0, y + 2, x + 2] == pytest.approx(patches.contribution[0])


def test_a_slide_of_the_cohort_is_predicted_as_in_the_evaluation_bit_for_bit(
    finished: Path, tmp_path: Path, gmmamba: Command
) -> None:
    sheet = "path,slide_id\n" + "".join(
        f'"{FILES[name]}",{name}\n'.replace('double"q', 'double""q') for name in COHORT[:3]
    )
    (finished / "a/again.csv").write_text(sheet)
    said = gmmamba(finished, "predict", "results/d/gmmamba", "a/again.csv", "--output", tmp_path / "out", "--quick")
    assert said.status == 0, said.err
    assert "no independent prediction: s0, s1, s2" in said.out
    members = pd.read_csv(tmp_path / "out/members.csv", dtype=str).set_index(["slide_id", "fold"])
    compared = 0
    for fold in (0, 1):
        evaluated = pd.read_csv(finished / f"results/d/gmmamba/fold{fold}_seed0/predictions.csv", dtype=str)
        for row in evaluated[evaluated.slide_id.isin(COHORT[:3])].to_dict("records"):
            assert members.prob_tumour[row["slide_id"], str(fold)] == row["prob_tumour"]  # text: every digit
            compared += 1
    assert compared >= 3

    # Once more, from one model file: the same, and nothing is encoded again.
    model = tmp_path / "m.safetensors"
    assert gmmamba(finished, "export-model", "results/d/gmmamba", "--output", model).status == 0
    store = tmp_path / "out/features/tiny/s0.zarr.zip"
    before, written = (tmp_path / "out/members.csv").read_bytes(), store.stat().st_mtime_ns
    said = gmmamba(finished, "predict", model, "a/again.csv", "--output", tmp_path / "out", "--quick")
    assert said.status == 0, said.err
    assert ((tmp_path / "out/members.csv").read_bytes(), store.stat().st_mtime_ns) == (before, written)
    assert read_predictions(finished / "results/d/gmmamba/fold0_seed0/predictions.csv").part.isin(["val", "test"]).all()


def test_one_more_slide_and_another_model(project: Path) -> None:
    write_aperio(project / "new/n 2.tif", tissue(512, 448, seed=102))
    after = {"predict_slides prediction=fresh", "picture_patches prediction=fresh"}
    new = {"tile_slide cohort=fresh, slide=n_2", "encode_slide cohort=fresh, encoder=tiny, slide=n_2"}
    assert plan(project) == new | after
    (project / "new/n 2.tif").unlink()
    edit(project, lambda c: c["experiments"]["gmmamba"].update(training={"learning_rate": 0.01}))
    assert after <= plan(project)
    assert not any("cohort=fresh" in job for job in plan(project))


def test_a_slide_that_errs_costs_itself_and_no_map_of_an_earlier_run_stays(project: Path, gmmamba: Command) -> None:
    fresh = ("--prepared", "--output", "results/fresh", "--quick")
    left = project / "results/fresh/slides/left"
    shutil.copytree(project / "results/fresh/slides/n_0", left)
    (project / "results/fresh/tiles/n_1.thumbnail.jpg").unlink()
    said = gmmamba(project, "predict", "results/d/gmmamba", "--runs", "fold0_seed0", "new", *fresh)
    assert said.status == 0, said.err
    table = pd.read_csv(project / "results/fresh/predictions.csv", index_col="slide_id")
    assert table.status.to_dict() == {"blind": "failed", "broken": "failed", "n_0": "predicted", "n_1": "failed"}
    assert table.reason["n_1"].startswith("FileNotFoundError: ")
    assert "n_1.thumbnail.jpg" in table.reason["n_1"]
    assert table.models["n_0"] == 1
    assert [path.name for path in (project / "results/fresh/slides").iterdir()] == ["n_0"]
    (project / "results/fresh/tiles/n_0.thumbnail.jpg").unlink()
    refused_by = gmmamba(project, "predict", "results/d/gmmamba", "new", *fresh)
    assert refused_by.status == 1  # none could be predicted
    table = pd.read_csv(project / "results/fresh/predictions.csv")
    assert (table.status == "failed").all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nvjpeg can be used")
def test_another_reader_where_there_is_no_gpu(project: Path, gmmamba: Command) -> None:
    path = project / "results/d/gmmamba/pipeline.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reading": {"reader": "nvjpeg"}}))
    asked = ("predict", "results/d/gmmamba", "new/n 0.tif", "--output", "new/out", "--quick")
    refused(gmmamba(project, *asked), "needs an NVIDIA GPU: give --reader scaled or exact")
    refused(gmmamba(project, *asked, "--prepared", "--reader", "exact"), "leave out one of the two")
    said = gmmamba(project, *asked, "--reader", "scaled")
    assert said.status == 0, said.err
    record = json.loads((project / "new/out/slides/n_0/record.json").read_text())
    assert (record["reading"], record["reading_in_training"]) == ({"reader": "scaled"}, {"reader": "nvjpeg"})


def test_an_emptied_folder_is_no_work(project: Path) -> None:
    shutil.rmtree(project / "new")
    (project / "new").mkdir()
    assert plan(project) == set()
    assert re.search(r"(?m)^predictions.fresh: new holds no slide.* nothing is predicted of it$", finish(project, "-n"))


def test_what_does_not_go_together_is_refused_in_one_line(project: Path, tmp_path: Path, gmmamba: Command) -> None:
    home, fresh = project / "results/d/gmmamba", ("--prepared", "--output", "results/fresh")
    (tmp_path / "empty").mkdir()
    refused(gmmamba(project, "predict", "results/d/none", "new", *fresh), "results/d/none does not exist")
    refused(
        gmmamba(project, "predict", "results/d/gmmamba", "--runs", "fold7_seed0", "new", *fresh), "has no fold7_seed0"
    )
    files = sorted(project.glob("results/*/features/tiny/*.zarr.zip"))
    for folder in ("a", "fresh"):  # made by Snakemake
        asked = ("predict", "results/d/gmmamba", "new", "--output", f"results/{folder}")
        refused(gmmamba(project, *asked), "holds tiles or features that predict did not make: choose another --output")
    assert sorted(project.glob("results/*/features/tiny/*.zarr.zip")) == files
    refused(gmmamba(project, "predict", "results/d/gmmamba", tmp_path / "empty", *fresh), "holds no slide")
    refused(gmmamba(project, "predict", "results/d/gmmamba", "new", *fresh, "--like", "b"), "knows no cohort 'b'")
    (project / "labelled.csv").write_text("path,label\nnew/n 0.tif,cancer\n")
    refused(
        gmmamba(project, "predict", "results/d/gmmamba", "labelled.csv", *fresh),
        "label 'cancer', the model's classes are",
    )

    pipeline = json.loads((home / "pipeline.json").read_text())

    def with_pipeline(**changes: object) -> None:
        (home / "pipeline.json").write_text(json.dumps(pipeline | changes))

    with_pipeline(tiling={"a": pipeline["tiling"]["a"] | {"mpp": 1.0}})
    refused(gmmamba(project, "predict", "results/d/gmmamba", "new", *fresh), "was tiled with mpp 0.5, the slides that")
    with_pipeline(encoder=pipeline["encoder"] | {"seed": 1})  # other random weights
    own = ("--output", tmp_path / "own", "--quick")
    refused(gmmamba(project, "predict", "results/d/gmmamba", "new", *own), "has other weights here")
    weights = tmp_path / "w.safetensors"
    state = load_file(home / "fold0_seed0/model.safetensors")
    save_file(state, weights)
    with_pipeline(encoder=pipeline["encoder"] | {"weights": str(weights)})
    refused(gmmamba(project, "predict", "results/d/gmmamba", "new", *own), "has other weights")
    with_pipeline()
    for run in ("fold0_seed0", "fold1_seed0"):
        card = json.loads((home / run / "model.json").read_text())
        (home / run / "model.json").write_text(json.dumps(card | {"encoder_weights_sha256": "ab" * 32}))
    refused(gmmamba(project, "predict", "results/d/gmmamba", "new", *fresh), "was trained on those with abababababab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": "none"}, "'none' is not in `experiments`"),
        ({"slides": "nowhere"}, "nowhere does not exist"),
        ({"like": "b"}, "'b' is no cohort of its dataset"),
    ],
)
def test_bad_predictions_in_the_config(finished: Path, change: dict[str, str], message: str) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["predictions"]["fresh"].update(change)
    with contextlib.chdir(finished), pytest.raises(ConfigError, match=message):
        load_config(config)
