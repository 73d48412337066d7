"""A project without slides: features of TRIDENT and CLAM, from the import to the report; what an edit runs again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from slidestore import open_store
from tests.slides import tissue, write_aperio
from tests.slidestore.foreign_files import bag, grid, write_clam, write_trident
from tests.workflow.project import edit, fail, finish, plan

SLIDES = [f"s{i}" for i in range(12)]
BAD = "s11"
TRIDENT = "it's TRIDENT/20x_256px_0px_overlap"
CONFIG = {
    "cohorts": {
        "t": {
            "sheet": "t.csv",
            "features": {
                "uni": {"format": "trident-h5", "path": f"{TRIDENT}/features_uni_v1/{{slide_id}}.h5"},
                "uni-pt": {
                    "format": "pt",
                    "path": "{slide_id}.pt",
                    "patches": f"{TRIDENT}/patches/{{slide_id}}_patches.h5",
                },
            },
        },
        "c": {
            "sheet": "c.csv",
            "mpp": 0.25,
            "features": {
                "uni": {"format": "clam-h5", "path": "clam/h5_files/{stem}.h5", "patches": "clam/patches/{stem}.h5"}
            },
        },
    },
    "datasets": {"d": {"cohorts": ["t"], "classes": ["a", "b"], "encoder": "uni", "split": {"folds": 2}}},
    "training": {"epochs": 6},
    "models": {"gmmamba": {"method": "gmmamba", "groups": 3}},
    "experiments": {"gmmamba": {"model": "gmmamba", "dataset": "d"}},
}


def features_of(number: int) -> np.ndarray:
    features = bag(seed=number)
    features[:4, 0] += 3 * (number % 2)
    return features


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve slides of TRIDENT's, one with NaN, and two of CLAM's, whose files have names of their own; the file of one
    slide is at hand."""
    project = tmp_path_factory.mktemp("project")
    for number, slide in enumerate(SLIDES):
        features = features_of(number)
        if slide == BAD:
            features[5, 3] = np.nan
        write_trident(project / TRIDENT, slide, grid(), features, level0_width=2048, level0_height=1536)
        torch.save(torch.from_numpy(features), project / f"{slide}.pt")
    rows = [f"{slide},p{i},{'ab'[i % 2]},{slide}.svs" for i, slide in enumerate(SLIDES)]
    rows[2] = "s2,p2,a,"
    (project / "t.csv").write_text("\n".join(["slide_id,patient_id,label,path", *rows]) + "\n")
    write_aperio(project / "s0.svs", tissue(2048, 1536), mpp=0.25)
    for name in ("x 0", "x 1"):
        write_clam(project / "clam", name, grid(step=1024), bag())
    (project / "c.csv").write_text("slide_id,patient_id,label,path\nx0,px0,a,x 0.svs\nx1,px1,b,x 1.svs\n")
    (project / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    finish(project)
    return project


def test_every_slide_is_accounted_for(finished: Path) -> None:
    accounting = pd.read_csv(finished / "results/d/accounting.csv").iloc[0]
    assert (accounting.in_sheet, accounting.failed, accounting.predicted) == (12, 1, 11)
    table = pd.read_csv(finished / "results/t/features/uni.csv", index_col="slide_id")
    assert table.reason[BAD].startswith("import: ")
    assert f"{BAD}.h5: features of 1 of 12 patches are not finite (first: row 5)" in table.reason[BAD]
    page = (finished / "results/d/report.html").read_text()
    assert "features of t imported (trident-h5)" in page
    assert not list(finished.glob("results/*/tiles/*.part"))


def test_the_stores_hold_what_the_tools_wrote(finished: Path) -> None:
    order = np.lexsort(grid().T)
    for encoder in ("uni", "uni-pt"):
        store = open_store(finished / f"results/t/features/{encoder}/s3.zarr.zip", encoder)
        np.testing.assert_array_equal(store.features, features_of(3).astype(np.float16)[order])
        np.testing.assert_array_equal(store.coords, np.load(finished / "results/t/tiles/s3.npy"))
        assert (store.attributes.mpp, store.attributes.level0_mpp, store.attributes.cohort) == (0.5, 0.25, "t")
    facts = open_store(finished / "results/c/features/uni/x0.zarr.zip").attributes
    assert (facts.slide_id, facts.mpp, facts.level0_width) == ("x0", 1.0, 10240)


def test_pictures_are_of_the_slide_or_say_that_it_is_not_there(finished: Path) -> None:
    pictures = {slide: Image.open(finished / f"results/t/tiles/{slide}.thumbnail.jpg") for slide in ("s0", "s1")}
    assert {picture.size for picture in pictures.values()} == {(1024, 768)}
    share_white = {slide: (np.asarray(picture) > 235).all(axis=2).mean() for slide, picture in pictures.items()}
    assert share_white["s0"] < 0.6 < share_white["s1"]


def test_nothing_to_be_done_the_second_time(finished: Path) -> None:
    assert plan(finished) == set()


def test_other_features_of_one_slide(project: Path) -> None:
    torch.save(torch.zeros(12, 9), project / "s3.pt")
    assert plan(project) == {
        "import_features cohort=t, encoder=uni-pt, slide=s3",
        "account_cohort cohort=t, encoder=uni-pt",
    }


def test_other_patches_fail_the_encoder_that_has_not_got_them(project: Path) -> None:
    features = project / TRIDENT / "features_uni_v1/s3.h5"
    write_trident(project / "new", "s3", grid()[:-1], bag(11), level0_width=2048, level0_height=1536)
    shutil.copy(project / "new/features_uni_v1/s3.h5", features)
    store = "results/t/features/uni-pt/s3.zarr.zip"
    finish(project, store)
    failure = open_store(project / store).attributes.failure
    assert failure is not None
    assert "s3.pt: its patches are not those of " in failure["reason"]
    assert json.loads((project / "results/t/tiles/s3.json").read_text())["counts"] == {"kept": 11}


def test_an_experiment_runs_no_import(project: Path) -> None:
    edit(project, lambda c: c["experiments"]["gmmamba"].update(training={"learning_rate": 0.01}))
    training = {"train", "record_pipeline", "predict", "evaluate", "compare", "report"}
    assert {job.split()[0] for job in plan(project)} == training


def test_a_missing_file_stops_before_any_job(project: Path) -> None:
    (project / "clam/patches/x 1.h5").unlink()
    said = fail(project)
    assert "c.csv, line 3: slide x1: no such file: clam/patches/x 1.h5 (cohorts.c.features.uni" in said
