"""What an edit of the configuration, of a sheet or of a file of the user's makes run again, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from slidestore import open_store
from tests.slides import tissue, write_aperio
from tests.workflow.project import (
    ALL_SLIDES,
    CONTACTS,
    EVALUATE,
    EVERYTHING,
    EXPERIMENTS,
    FILES,
    GROUP,
    SPLIT,
    TILE,
    account,
    add_columns,
    after_training,
    contacts,
    edit,
    fail,
    finish,
    group,
    plan,
    slides,
    write_cohort,
)


def test_nothing_to_be_done_the_second_time(project: Path) -> None:
    """Also where a slide and a sheet are dated later than all that was made of them."""
    assert plan(project) == set()


def test_learning_rate_of_one_experiment(project: Path) -> None:
    edit(project, lambda c: c["experiments"]["gmmamba2"].update(training={"learning_rate": 0.01}))
    assert plan(project) == after_training("gmmamba2")


def test_number_of_groups_of_one_experiment(project: Path) -> None:
    edit(project, lambda c: c["experiments"]["gmmamba2"].update(overrides={"groups": 4}))
    assert plan(project) == group("a", "b", groups=4) | after_training("gmmamba2")


def test_tissue_threshold_of_one_cohort(project: Path) -> None:
    edit(project, lambda c: c["cohorts"]["a"].update(tiling={"saturation_threshold": 20}))
    assert plan(project) == (
        slides("tile_slide", *ALL_SLIDES) | slides("encode_slide", *ALL_SLIDES) | contacts("a") | account("a")
        | group("a") | SPLIT | after_training(*EXPERIMENTS)
    )  # fmt: skip


def test_number_of_readers(project: Path) -> None:
    edit(project, lambda c: c.update(reading={"threads": 2}))
    assert plan(project) == set()


def test_encoder(project: Path) -> None:
    edit(project, lambda c: c["encoders"]["tiny"].update(seed=1))
    assert plan(project) == EVERYTHING - TILE - CONTACTS - GROUP


def test_an_encoder_s_own_file_counts_by_its_code(project: Path) -> None:
    file, store = project / "mine.py", "results/b/features/tiny/x0.zarr.zip"
    model = "timm.create_model('test_resnet', num_classes=0)"
    file.write_text(f"import timm\n\ndef net(pretrained):\n    return {model}, [0] * 3, [1] * 3\n")
    edit(project, lambda c: c["encoders"]["tiny"].update(model="mine.py:net"))
    finish(project, store)
    assert open_store(project / store).shape[1] == 96
    encode = slides("encode_slide", "x0", cohort="b")
    file.write_text(file.read_text() + "# a remark\n")
    assert not encode & plan(project)
    file.write_text(file.read_text().replace("[1] * 3", "[2] * 3"))
    assert encode <= plan(project)


def test_grouping_by_features_follows_the_encoder(project: Path) -> None:
    edit(project, lambda c: c["experiments"]["gmmamba2"].update(overrides={"grouping": "features"}))
    groups = [f"results/{cohort}/groups/tiny/features-3.npz" for cohort in "ab"]
    finish(project, *groups)
    assert plan(project) == after_training("gmmamba2")
    edit(project, lambda c: c["encoders"]["tiny"].update(seed=1))
    assert plan(project) == (
        EVERYTHING - TILE - CONTACTS - GROUP | {"group_cohort_by_features cohort=a, encoder=tiny, groups=3",
                                     "group_cohort_by_features cohort=b, encoder=tiny, groups=3"}
    )  # fmt: skip


def test_new_features_train_again_also_when_the_run_was_stopped_after_them(project: Path) -> None:
    """Snakemake takes a small file of the same bytes for unchanged: the slide table must tell the features apart."""
    edit(project, lambda c: c["encoders"]["tiny"].update(seed=1))
    finish(project, "results/a/features/tiny.csv", "results/b/features/tiny.csv")
    assert plan(project) == SPLIT | after_training(*EXPERIMENTS)


def test_one_more_slide(project: Path) -> None:
    with (project / "a/slides.csv").open("a") as sheet:
        sheet.write("spare,a-spare,normal,spare.tif\n")
    assert plan(project) == (
        slides("tile_slide", "spare") | slides("encode_slide", "spare") | contacts("a") | account("a")
        | group("a") | SPLIT | after_training(*EXPERIMENTS)
    )  # fmt: skip


def test_another_file_in_a_slide_s_place(project: Path) -> None:
    """Its date alone tells, even when it is older than the old one."""
    write_aperio(project / "a" / FILES["s2"], tissue(512, 448, seed=77))
    assert plan(project) == (
        slides("tile_slide", "s2") | slides("encode_slide", "s2") | contacts("a") | account("a") | group("a") | SPLIT
        | after_training(*EXPERIMENTS)
    )  # fmt: skip


ONE_SLIDE = (
    slides("tile_slide", "s3") | slides("encode_slide", "s3") | contacts("a") | account("a") | group("a") | SPLIT
    | after_training(*EXPERIMENTS)
)  # fmt: skip


def test_a_setting_of_one_slide(project: Path) -> None:
    add_columns(project / "a/slides.csv", "s3", **{"tiling.saturation_threshold": "25", "tiling.overlap_px": "8"})
    assert plan(project) == ONE_SLIDE
    add_columns(project / "a/slides.csv", "s3", **{"tiling.overlap_px": "all"})
    said = fail(project, "-n")
    assert "slides.csv, line 5: tiling.overlap_px: 'all' is not of type 'integer'" in said


def test_a_mask_of_one_slide_and_another_in_its_place(project: Path) -> None:
    """From the sheet to the patches; the file is named as a shell would not have it."""
    mask = project / "a" / "$(touch stolen) 'mask.png"
    cv2.imwrite(str(mask), np.pad(np.ones((56, 32), np.uint8), ((0, 0), (0, 32))))
    add_columns(project / "a/slides.csv", "s3", mask=mask.name)
    assert plan(project) == ONE_SLIDE
    targets = ["results/a/contact_sheet.html", "results/a/features/tiny.csv"]
    finish(project, *targets)
    record = json.loads((project / "results/a/tiles/s3.json").read_text())
    assert (record["tissue_mask"], record["counts"]["kept"]) == (mask.name, 4 * 7)
    assert not list(project.rglob("stolen"))

    rest = group("a") | SPLIT | after_training(*EXPERIMENTS)
    assert plan(project) == rest
    cv2.imwrite(str(mask), np.ones((112, 128), np.uint8))
    assert plan(project) == ONE_SLIDE


def test_new_cohort_outside_the_dataset(project: Path) -> None:
    write_cohort(project / "c", ["y", "z"])
    edit(project, lambda c: c["cohorts"].update(c={"sheet": "c/slides.csv"}))
    assert plan(project) == (
        slides("tile_slide", "y", "z", cohort="c") | slides("encode_slide", "y", "z", cohort="c")
        | contacts("c") | account("c") | group("c")
    )  # fmt: skip


def test_one_more_seed(project: Path) -> None:
    edit(project, lambda c: c.update(seeds=[0, 7]))
    expected = {job.replace("seed=0", "seed=7") for job in after_training(*EXPERIMENTS)}
    assert plan(project) == expected


def test_one_more_experiment(project: Path) -> None:
    edit(project, lambda c: c["experiments"].update(more={"model": "mean", "dataset": "d"}))
    assert plan(project) == after_training("more")


def test_an_evaluation_setting(project: Path) -> None:
    """A threshold chosen on the validation slides: no model is trained or asked again for it."""
    edit(project, lambda c: c.update(evaluation={"threshold": "youden"}))
    assert plan(project) == EVALUATE
    finish(project)
    metrics = pd.read_csv(project / "results/d/mean/metrics.csv")
    assert metrics.threshold[0] != 0.5


def test_splits_edited_by_hand(project: Path) -> None:
    """What the pipeline wrote, given back, trains nothing once it is known to be the same; an edit does."""
    own, splits = project / "own splits.csv", project / "results/d/splits.csv"
    shutil.copy(splits, own)
    edit(project, lambda c: c["datasets"]["d"].update(split={"scheme": "file", "path": own.name}))
    everything = SPLIT | after_training(*EXPERIMENTS)
    assert plan(project) == everything
    finish(project, "results/d/splits.csv")
    assert splits.read_text() == own.read_text()
    assert plan(project) == {"report dataset=d"}  # which shows the scheme
    table = pd.read_csv(own, index_col="slide_id")
    table.loc[["s0", "s2", "s4", "s6", "s8"], "fold0"] = table.loc[["s2", "s4", "s6", "s8", "s0"], "fold0"].to_numpy()
    table.to_csv(own)
    assert plan(project) == everything


def test_the_same_slide_under_two_names_is_refused(project: Path) -> None:
    shutil.copy(project / "a" / FILES["s0"], project / "a/twin.tif")
    with (project / "a/slides.csv").open("a") as sheet:
        sheet.write("twin,a-twin,normal,twin.tif\n")
    said = fail(project, "results/d/splits.csv")
    assert "  - s0 (cohort a, patient a-s0, normal); twin (cohort a, patient a-twin, normal)" in said


def test_report_setting(project: Path) -> None:
    edit(project, lambda c: c.update(report={"title": "Another title"}))
    assert plan(project) == {"report dataset=d"}


def test_costs_in_the_report(project: Path) -> None:
    edit(project, lambda c: c.update(report={"costs": "cost.csv"}))
    said = fail(project, "-n")
    assert "report.costs: cost.csv does not exist" in said
    costs = project / "cost.csv"
    costs.write_text("model,label,N,parameters,flops,seconds,peak\nmean,Mean pooling,1000,1,1,0.1,1\n")
    assert plan(project) == {"report dataset=d"}
    finish(project)
    assert "on a slide of 1,000 patches" in (project / "results/d/report.html").read_text()
    assert plan(project) == set()
    costs.write_text(costs.read_text() + "gmmamba,GMMamba,1000,1,1,0.2,1\n")
    assert plan(project) == {"report dataset=d"}
