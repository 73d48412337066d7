"""The whole DAG on a tiny cohort, run through Snakemake as a user would, and what an edit makes run again."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from slidestore import open_store
from tests.slides import tissue, write_aperio

ROOT = Path(__file__).parents[2]
CODE = ("Snakefile", "workflow", "config", "envs", "gmmamba", "preprocessing", "slidestore")
FOLDS = 3

CONFIG = {
    "cohorts": {"a": {"sheet": "a/slides.csv"}, "b": {"sheet": "slides.csv"}},
    "tiling": {"patch_px": 64, "mpp": 0.5},
    "encoders": {"tiny": {"model": "resnet18", "weights": "random", "batch_size": 16}},
    "datasets": {
        "d": {"cohorts": ["a"], "classes": ["normal", "tumour"], "encoder": "tiny", "split": {"folds": FOLDS}}
    },
    "training": {"epochs": 6},
    "models": {"gmmamba": {"method": "gmmamba", "groups": 3}, "mean": {"method": "mean"}},
    "experiments": {
        "gmmamba": {"model": "gmmamba", "dataset": "d"},
        "gmmamba2": {"model": "gmmamba", "dataset": "d"},
        "mean": {"model": "mean", "dataset": "d"},
    },
    "max_failed_share": 0.2,
}
GOOD = [f"s{i}" for i in range(10)]
OTHER = ["x0", "x1"]  # of cohort b, which is in no dataset
FILES = {  # names that a shell, a parser or Snakemake could take for something else
    "s0": "with space.tif", "s1": "it's.tif", "s2": 'double"quote.tif', "s3": "; touch stolen; .tif",
    "s4": "$(touch stolen).tif", "s5": "Präparat 漢字.tif", "s6": "--help.tif", "s7": "{slide}.tif", "x0": "-x0.tif",
}  # fmt: skip


def write_cohort(folder: Path, names: list[str]) -> None:
    """Slides of 512 x 448 px; positives have dark nuclei. The sheet's labels alternate, one patient a slide."""
    rows = [["slide_id", "patient_id", "label", "path"]]
    for i, name in enumerate(names):
        label = "tumour" if i % 2 else "normal"
        file = FILES.get(name, f"{name}.tif")
        write_aperio(folder / file, tissue(512, 448, seed=i, dark=bool(i % 2)))
        rows.append([name, f"{folder.name}-{name}", label, file])
    with (folder / "slides.csv").open("w", newline="") as sheet:
        csv.writer(sheet).writerows(rows)


def snakemake(project: Path, *options: str, code: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "-s", str(code / "Snakefile"), "-d", str(project), "--cores", "2"]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def plan(project: Path, code: Path = ROOT, *targets: str) -> set[str]:
    """What Snakemake would run: "rule wildcards" of every job but `all` and other targets."""
    run = snakemake(project, "-n", *targets, code=code)
    assert run.returncode == 0, run.stdout + run.stderr
    jobs = set()
    for block in re.split(r"\n(?=(?:local)?rule )", run.stdout + run.stderr):
        head = re.match(r"(?:local)?rule (\w+):", block)
        wildcards = re.search(r"\n    wildcards: (.*)", block)
        if head and head[1] not in ("all", *targets):
            jobs.add(f"{head[1]} {wildcards[1] if wildcards else ''}".strip())
    return jobs


def edit(project: Path, change: Callable[[dict], object]) -> None:
    config = yaml.safe_load((project / "config.yaml").read_text())
    change(config)
    (project / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with results: ten good slides and one truncated file, and a cohort of two beside the config.

    A scanner's clock and that of whoever wrote a sheet were a day ahead.
    """
    project = tmp_path_factory.mktemp("project")
    write_cohort(project / "a", [*GOOD, "broken", "spare"])
    write_cohort(project, OTHER)
    tomorrow = time.time() + 86400
    for path in (project / "a" / FILES["s2"], project / "a/slides.csv"):
        os.utime(path, (tomorrow, tomorrow))
    broken = project / "a" / "broken.tif"
    broken.write_bytes(broken.read_bytes()[:3000])
    sheet = project / "a" / "slides.csv"
    sheet.write_text("\n".join(line for line in sheet.read_text().splitlines() if "spare" not in line) + "\n")
    (project / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    run = snakemake(project, "--show-failed-logs")
    assert run.returncode == 0, run.stdout + run.stderr
    return project


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy to edit; times are kept, they are what Snakemake compares."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def runs(rule: str, *experiments: str) -> set[str]:
    return {
        f"{rule} dataset=d, experiment={experiment}, fold={fold}, seed=0"
        for experiment in experiments
        for fold in range(FOLDS)
    }


def after_training(*experiments: str) -> set[str]:
    """What follows when these experiments are trained again, training included."""
    return (
        runs("train", *experiments)
        | runs("predict", *experiments)
        | {f"evaluate dataset=d, experiment={experiment}" for experiment in experiments}
        | {f"record_pipeline dataset=d, experiment={experiment}" for experiment in experiments}
        | {"compare dataset=d", "report dataset=d"}
    )


def slides(rule: str, *names: str, cohort: str = "a") -> set[str]:
    encoder = ", encoder=tiny" if rule == "encode_slide" else ""
    return {f"{rule} cohort={cohort}{encoder}, slide={name}" for name in names}


EXPERIMENTS = ("gmmamba", "gmmamba2", "mean")
SPLIT = {"split_dataset dataset=d"}
ALL_SLIDES = (*GOOD, "broken")


def account(*cohorts: str) -> set[str]:
    return {f"account_cohort cohort={cohort}, encoder=tiny" for cohort in cohorts}


def contacts(*cohorts: str) -> set[str]:
    return {f"contact_sheet cohort={cohort}" for cohort in cohorts}


def group(*cohorts: str, groups: int = 3) -> set[str]:
    return {f"group_cohort cohort={cohort}, grouping=location-{groups}" for cohort in cohorts}


TILE = slides("tile_slide", *ALL_SLIDES) | slides("tile_slide", *OTHER, cohort="b")
ENCODE = slides("encode_slide", *ALL_SLIDES) | slides("encode_slide", *OTHER, cohort="b")
ACCOUNT, GROUP, CONTACTS = account("a", "b"), group("a", "b"), contacts("a", "b")
EVERYTHING = TILE | CONTACTS | ENCODE | ACCOUNT | GROUP | SPLIT | after_training(*EXPERIMENTS)


def test_every_slide_is_accounted_for(finished: Path) -> None:
    accounting = pd.read_csv(finished / "results/d/accounting.csv").iloc[0]
    assert (accounting.in_sheet, accounting.excluded, accounting.failed, accounting.predicted) == (11, 0, 1, 10)
    table = pd.read_csv(finished / "results/a/features/tiny.csv", index_col="slide_id")
    assert list(table.index[table.status == "failed"]) == ["broken"]
    assert "broken" in table.reason["broken"]
    assert open_store(finished / "results/a/features/tiny/broken.zarr.zip").attributes.failure is not None
    splits = pd.read_csv(finished / "results/d/splits.csv")
    assert sorted(splits.slide_id) == sorted(GOOD)
    assert not list(finished.rglob("stolen")), "a slide's name was run as a command"


def test_the_contact_sheet_shows_every_slide_the_failed_one_first(finished: Path) -> None:
    page = (finished / "results/a/contact_sheet.html").read_text()
    assert re.findall(r"<h2>(\w+) ", page) == ["broken", *GOOD]
    assert "cannot be opened" in page
    assert "http" not in page
    for name in GOOD:
        assert json.loads((finished / f"results/a/tiles/{name}.geojson").read_text())["features"]


def test_results_hang_together(finished: Path) -> None:
    """Every slide is tested once an experiment, and the metrics are those of the predictions."""
    for experiment in EXPERIMENTS:
        folder = finished / "results/d" / experiment
        tests = pd.concat(pd.read_csv(file) for file in folder.glob("fold*/predictions.csv")).query("part == 'test'")
        assert sorted(tests.slide_id) == sorted(GOOD)
        assert (tests.prob_normal + tests.prob_tumour).sub(1).abs().max() < 1e-6
        metrics = pd.read_csv(folder / "metrics.csv")
        fold0 = tests[tests.fold == 0]
        assert metrics.accuracy[0] == pytest.approx((fold0.true == fold0.predicted).mean())
    # Two experiments with equal settings are equal bit for bit: the seed is all the chance there is.
    twins = [finished / "results/d" / e / "fold1_seed0/model.safetensors" for e in ("gmmamba", "gmmamba2")]
    assert twins[0].read_bytes() == twins[1].read_bytes()
    page = (finished / "results/d/report.html").read_text()
    assert "broken" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_nothing_to_be_done_the_second_time(finished: Path) -> None:
    """Also where a slide and a sheet are dated later than all that was made of them."""
    assert plan(finished) == set()


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
    run = snakemake(project, "--show-failed-logs", store)
    assert run.returncode == 0, run.stdout + run.stderr
    assert open_store(project / store).shape[1] == 96
    encode = slides("encode_slide", "x0", cohort="b")
    file.write_text(file.read_text() + "# a remark\n")
    assert not encode & plan(project)
    file.write_text(file.read_text().replace("[1] * 3", "[2] * 3"))
    assert encode <= plan(project)


def test_grouping_by_features_follows_the_encoder(project: Path) -> None:
    edit(project, lambda c: c["experiments"]["gmmamba2"].update(overrides={"grouping": "features"}))
    groups = [f"results/{cohort}/groups/tiny/features-3.npz" for cohort in "ab"]
    run = snakemake(project, "--show-failed-logs", *groups)
    assert run.returncode == 0, run.stdout + run.stderr
    assert plan(project) == after_training("gmmamba2")
    edit(project, lambda c: c["encoders"]["tiny"].update(seed=1))
    assert plan(project) == (
        EVERYTHING - TILE - CONTACTS - GROUP | {"group_cohort_by_features cohort=a, encoder=tiny, groups=3",
                                     "group_cohort_by_features cohort=b, encoder=tiny, groups=3"}
    )  # fmt: skip


def test_new_features_train_again_also_when_the_run_was_stopped_after_them(project: Path) -> None:
    """Snakemake takes a small file of the same bytes for unchanged: the slide table must tell the features apart."""
    edit(project, lambda c: c["encoders"]["tiny"].update(seed=1))
    run = snakemake(project, "results/a/features/tiny.csv", "results/b/features/tiny.csv")
    assert run.returncode == 0, run.stdout + run.stderr
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


def add_columns(sheet: Path, slide: str, **cells: str) -> None:
    """Further columns, filled for one slide."""
    table = pd.read_csv(sheet, dtype=str)
    for column, cell in cells.items():
        table[column] = [cell if name == slide else "" for name in table.slide_id]
    table.to_csv(sheet, index=False)


ONE_SLIDE = (
    slides("tile_slide", "s3") | slides("encode_slide", "s3") | contacts("a") | account("a") | group("a") | SPLIT
    | after_training(*EXPERIMENTS)
)  # fmt: skip


def test_a_setting_of_one_slide(project: Path) -> None:
    add_columns(project / "a/slides.csv", "s3", **{"tiling.saturation_threshold": "25", "tiling.overlap_px": "8"})
    assert plan(project) == ONE_SLIDE
    add_columns(project / "a/slides.csv", "s3", **{"tiling.overlap_px": "all"})
    run = snakemake(project, "-n")
    assert run.returncode != 0
    assert "slides.csv, line 5: tiling.overlap_px: 'all' is not of type 'integer'" in run.stdout + run.stderr


def test_a_mask_of_one_slide_and_another_in_its_place(project: Path) -> None:
    """From the sheet to the patches; the file is named as a shell would not have it."""
    mask = project / "a" / "$(touch stolen) 'mask.png"
    cv2.imwrite(str(mask), np.pad(np.ones((56, 32), np.uint8), ((0, 0), (0, 32))))
    add_columns(project / "a/slides.csv", "s3", mask=mask.name)
    assert plan(project) == ONE_SLIDE
    targets = ["results/a/contact_sheet.html", "results/a/features/tiny.csv"]
    run = snakemake(project, "--show-failed-logs", *targets)
    assert run.returncode == 0, run.stdout + run.stderr
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
    run = snakemake(project, "--show-failed-logs")
    assert run.returncode == 0, run.stdout + run.stderr
    metrics = pd.read_csv(project / "results/d/mean/metrics.csv")
    assert metrics.threshold[0] != 0.5


def test_splits_edited_by_hand(project: Path) -> None:
    """What the pipeline wrote, given back, trains nothing once it is known to be the same; an edit does."""
    own, splits = project / "own splits.csv", project / "results/d/splits.csv"
    shutil.copy(splits, own)
    edit(project, lambda c: c["datasets"]["d"].update(split={"scheme": "file", "path": own.name}))
    everything = SPLIT | after_training(*EXPERIMENTS)
    assert plan(project) == everything
    run = snakemake(project, "--show-failed-logs", "results/d/splits.csv")
    assert run.returncode == 0, run.stdout + run.stderr
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
    run = snakemake(project, "--show-failed-logs", "results/d/splits.csv")
    assert run.returncode != 0
    output = run.stdout + run.stderr
    assert "  - s0 (cohort a, patient a-s0, normal); twin (cohort a, patient a-twin, normal)" in output
    assert "Traceback" not in output


def test_report_setting(project: Path) -> None:
    edit(project, lambda c: c.update(report={"title": "Another title"}))
    assert plan(project) == {"report dataset=d"}


def test_costs_in_the_report(project: Path) -> None:
    edit(project, lambda c: c.update(report={"costs": "cost.csv"}))
    run = snakemake(project, "-n")
    assert run.returncode != 0
    assert "report.costs: cost.csv does not exist" in run.stdout + run.stderr
    costs = project / "cost.csv"
    costs.write_text("model,label,N,parameters,flops,seconds,peak\nmean,Mean pooling,1000,1,1,0.1,1\n")
    assert plan(project) == {"report dataset=d"}
    run = snakemake(project, "--show-failed-logs")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "on a slide of 1,000 patches" in (project / "results/d/report.html").read_text()
    assert plan(project) == set()
    costs.write_text(costs.read_text() + "gmmamba,GMMamba,1000,1,1,0.2,1\n")
    assert plan(project) == {"report dataset=d"}


def test_without_a_gpu_the_same_command_runs_and_says_so_once(project: Path) -> None:
    edit(project, lambda c: c.update(report={"title": "Another title"}))
    run = snakemake(project, "--resources", "gpu=1")
    assert run.returncode == 0, run.stdout + run.stderr
    has_gpu = shutil.which("nvidia-smi") is not None
    assert (run.stdout + run.stderr).count("No GPU on this machine") == (0 if has_gpu else 1)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the program, to edit."""
    for name in CODE:
        source, target = ROOT / name, tmp_path / "code" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path / "code"


def test_a_comment_runs_nothing(project: Path, code: Path) -> None:
    for path in code.rglob("*.py"):
        path.write_text(path.read_text() + "\n\n# a remark\n")
    assert plan(project, code) == set()


def test_a_table_brings_its_runs_and_no_others(project: Path) -> None:
    rows = [f"{name}.unified" for name in ("with-bmp", "with-lg-bmp", "without-masking", "with-imm", "with-css",
                                           "published")]  # fmt: skip
    expected = (after_training(*rows) - {"compare dataset=d", "report dataset=d"}) | group("a", groups=10)
    expected -= {f"record_pipeline dataset=d, experiment={row}" for row in rows}
    expected.add("write_table dataset=d, table=ablation")
    assert plan(project, ROOT, "table_ablation") == expected
    run = snakemake(project, "table_ablation", "--show-failed-logs")
    assert run.returncode == 0, run.stdout + run.stderr
    table = pd.read_csv(project / "results/d/tables/ablation.csv")
    assert list(table.experiment) == rows
    assert (table.runs == FOLDS).all()
    assert "| GMMamba | ✓ | ✓ | ✓ |" in (project / "results/d/tables/ablation.md").read_text()
    assert r"\toprule" in (project / "results/d/tables/ablation.tex").read_text()
    assert plan(project) == set()  # nothing else has changed, and nothing else wants them
    edit(project, lambda c: c.update(tables={"protocol": "official"}))
    assert plan(project) == set()
    assert runs("train", "published.official") <= plan(project, ROOT, "table_ablation")


def test_css_as_a_plug_in_brings_its_groups(project: Path) -> None:
    edit(project, lambda c: c["experiments"].update(
        plugged={"model": "abmil", "dataset": "d", "overrides": {"css": True, "groups": 5}}))  # fmt: skip
    assert plan(project) == group("a", "b", groups=5) | after_training("plugged")
    run = snakemake(project, "--show-failed-logs", "results/d/plugged/metrics.csv")
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_method_of_two_stages_trains_the_first_in_a_job_of_its_own(project: Path) -> None:
    edit(project, lambda c: c["experiments"].update(twice={"model": "ibmil", "dataset": "d"}))
    assert plan(project) == runs("train_first_stage", "twice") | after_training("twice")  # no other gets one
    run = snakemake(project, "--show-failed-logs")
    assert run.returncode == 0, run.stdout + run.stderr
    assert plan(project) == set()

    # Killed between the stages, or in the second: the first is done.
    folder = project / "results/d/twice/fold1_seed0"
    for file in (*folder.glob("*.*"), folder.parent / "metrics.csv", project / "results/d/report.html"):
        file.unlink()
    assert (folder / "first_stage/model.safetensors").is_file()
    expected = {f"{rule} dataset=d, experiment=twice, fold=1, seed=0" for rule in ("train", "predict")}
    expected |= {f"{rule} dataset=d, experiment=twice" for rule in ("evaluate", "record_pipeline")}
    assert plan(project) == expected | {"compare dataset=d", "report dataset=d"}
    edit(project, lambda c: c["experiments"]["twice"].update(overrides={"stage": 1}))
    assert plan(project) == after_training("twice")  # the first stage alone is a method of one


EVALUATE = {f"evaluate dataset=d, experiment={e}" for e in EXPERIMENTS} | {"compare dataset=d", "report dataset=d"}
STAGES = {  # module -> what its change makes run
    "preprocessing/tile.py": EVERYTHING,
    "preprocessing/contours.py": EVERYTHING,
    "gmmamba/contact_sheet.py": CONTACTS,
    "preprocessing/encode.py": EVERYTHING - TILE - CONTACTS - GROUP,
    "gmmamba/accounting.py": ACCOUNT | SPLIT | after_training(*EXPERIMENTS),
    "gmmamba/grouping.py": GROUP | after_training("gmmamba", "gmmamba2"),
    "gmmamba/splits.py": ACCOUNT | CONTACTS | SPLIT | after_training(*EXPERIMENTS),
    "gmmamba/training.py": after_training(*EXPERIMENTS),
    "gmmamba/models/css.py": after_training("gmmamba", "gmmamba2"),
    "gmmamba/evaluation.py": EVALUATE,
    "gmmamba/comparison.py": {"compare dataset=d", "report dataset=d"},
    "gmmamba/report.py": {"report dataset=d"},
    "gmmamba/charts.py": {"report dataset=d"},
    "gmmamba/view/server.py": set(),
    "gmmamba/verify/gmmamba.py": set(),
}


@pytest.mark.parametrize("module", STAGES)
def test_changed_code_runs_its_stage_and_what_follows(project: Path, code: Path, module: str) -> None:
    path = code / module
    path.write_text(path.read_text() + "\n\nCHANGED = True\n")
    assert plan(project, code) == STAGES[module]


def test_a_wrong_key_stops_before_any_job(project: Path) -> None:
    edit(project, lambda c: c.update(trainign={}))
    run = snakemake(project)
    assert run.returncode != 0
    assert "unknown key 'trainign', did you mean 'training'?" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


def test_too_many_failures_stop_the_run_and_say_why(project: Path) -> None:
    edit(project, lambda c: c.update(max_failed_share=0.05))
    run = snakemake(project, "--show-failed-logs")
    assert run.returncode != 0
    assert "1 of 11 slides failed, more than max_failed_share (0.05) allows" in run.stdout + run.stderr
    assert open_store(project / "results/a/features/tiny/s0.zarr.zip").shape[0] > 0  # nothing computed is lost


def test_snakemake_finds_nothing_to_complain_about(finished: Path) -> None:
    run = snakemake(finished, "--lint")
    assert run.returncode == 0, run.stdout + run.stderr
