"""The whole DAG on a tiny cohort, run through Snakemake as a user would; what an edit of the code makes run again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from slidestore import open_store
from tests.workflow.project import (
    ACCOUNT,
    CODE,
    CONTACTS,
    EVALUATE,
    EVERYTHING,
    EXPERIMENTS,
    FOLDS,
    GOOD,
    GROUP,
    ROOT,
    SPLIT,
    TILE,
    after_training,
    edit,
    fail,
    finish,
    group,
    plan,
    runs,
)


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


def test_without_a_gpu_the_same_command_runs_and_says_so_once(project: Path) -> None:
    edit(project, lambda c: c.update(report={"title": "Another title"}))
    said = finish(project, "--resources", "gpu=1")
    has_gpu = shutil.which("nvidia-smi") is not None
    assert said.count("No GPU on this machine") == (0 if has_gpu else 1)


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
    finish(project, "table_ablation")
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
    finish(project, "results/d/plugged/metrics.csv")


def test_a_method_of_two_stages_trains_the_first_in_a_job_of_its_own(project: Path) -> None:
    edit(project, lambda c: c["experiments"].update(twice={"model": "ibmil", "dataset": "d"}))
    assert plan(project) == runs("train_first_stage", "twice") | after_training("twice")  # no other gets one
    finish(project)
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
    said = fail(project)
    assert "unknown key 'trainign', did you mean 'training'?" in said
    edit(project, lambda c: c.pop("trainign"))
    config = project / "config.yaml"
    config.write_text(config.read_text() + "training: {epochs: 9}\n")
    assert "'training' stands there a second time" in fail(project)


def test_too_many_failures_stop_the_run_and_say_why(project: Path) -> None:
    edit(project, lambda c: c.update(max_failed_share=0.05))
    said = fail(project)
    assert "1 of 11 slides failed, more than max_failed_share (0.05) allows" in said
    assert "same command again: it goes on from there" in said
    assert open_store(project / "results/a/features/tiny/s0.zarr.zip").shape[0] > 0  # nothing computed is lost


def test_a_run_ends_with_where_to_look_also_from_folders_with_spaces(project: Path, tmp_path: Path) -> None:
    """And with bars instead of lines, as `--logger rich` has it."""
    spaced = project.rename(tmp_path / "my project")
    (code := tmp_path / "the code").symlink_to(ROOT)
    edit(spaced, lambda c: c.update(report={"title": "Another title"}))
    said = finish(spaced, "--logger", "rich", code=code)
    assert re.search(r"Tissue and problems of every slide: results/a/contact_sheet.html\n.*results/b/contact", said)
    assert re.search(r"Report: results/d/report.html\nLook at the slides: .*gmmamba view results/d\n", said)
    assert "Finished jobid" not in said


def test_snakemake_finds_nothing_to_complain_about(project: Path) -> None:
    finish(project, "--lint")
