"""A tiny project of the whole DAG, its runs through Snakemake as a user's, and the jobs that an edit of it may run."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import yaml

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


def add_columns(sheet: Path, slide: str, **cells: str) -> None:
    """Further columns, filled for one slide."""
    table = pd.read_csv(sheet, dtype=str)
    for column, cell in cells.items():
        table[column] = [cell if name == slide else "" for name in table.slide_id]
    table.to_csv(sheet, index=False)


def snakemake(project: Path, *options: str, code: Path = ROOT) -> tuple[int, str]:
    """Exit status and output of a run."""
    command = [sys.executable, "-m", "snakemake", "-s", str(code / "Snakefile"), "-d", str(project), "--cores", "2"]
    run = subprocess.run([*command, "--show-failed-logs", *options], capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def finish(project: Path, *options: str, code: Path = ROOT) -> str:
    """What a run says that must come to its end."""
    status, said = snakemake(project, *options, code=code)
    assert status == 0, said
    return said


def fail(project: Path, *options: str) -> str:
    """What a run says that must not, and for a reason that it knows."""
    status, said = snakemake(project, *options)
    assert status != 0, said
    assert "Traceback" not in said
    return said


def plan(project: Path, code: Path = ROOT, *targets: str) -> set[str]:
    """What Snakemake would run: "rule wildcards" of every job but `all` and other targets."""
    jobs = set()
    for block in re.split(r"\n(?=(?:local)?rule )", finish(project, "-n", *targets, code=code)):
        head = re.match(r"(?:local)?rule (\w+):", block)
        wildcards = re.search(r"\n    wildcards: (.*)", block)
        if head and head[1] not in ("all", *targets):
            jobs.add(f"{head[1]} {wildcards[1] if wildcards else ''}".strip())
    return jobs


def edit(project: Path, change: Callable[[dict], object]) -> None:
    config = yaml.safe_load((project / "config.yaml").read_text())
    change(config)
    (project / "config.yaml").write_text(yaml.safe_dump(config))


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
EVALUATE = {f"evaluate dataset=d, experiment={e}" for e in EXPERIMENTS} | {"compare dataset=d", "report dataset=d"}
