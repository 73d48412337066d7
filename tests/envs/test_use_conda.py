"""The whole DAG with `--use-conda`: every job in the environment of its file, and what an edit of a file runs again.

conda is the one of tests/envs/conda.py, and Snakemake itself runs in the environment of envs/snakemake.yaml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.envs.conda import build_channels, install_conda
from tests.envs.files import CONDA_NAMES, FILES, ROOT, read
from tests.workflow.project import CODE, CONFIG, write_cohort

pytestmark = pytest.mark.slow

SLIDES = [f"s{i}" for i in range(6)]
PREPROCESSING = {"tile_slide", "encode_slide"}
MODELLING = {
    "contact_sheet", "account_cohort", "group_cohort", "split_dataset", "train", "predict", "record_pipeline",
    "evaluate", "compare", "report",
}  # fmt: skip
COMMANDS = {
    "preprocessing": {"tile", "encode"},
    "gmmamba": {
        "account",
        "contact-sheet",
        "group",
        "split",
        "train",
        "predict-fold",
        "evaluate",
        "compare",
        "report",
        "record-pipeline",
    },
}

Snakemake = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """project: slides and configuration. code: the program, where nothing is installed from."""
    folder = tmp_path_factory.mktemp("conda")
    (folder / "code").mkdir()
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "code" / name)
    write_cohort(folder / "project" / "a", SLIDES)
    split = {"scheme": "ratio", "folds": 1, "test": 0.34, "validation": 0.34}
    datasets = {"d": CONFIG["datasets"]["d"] | {"split": split}}
    config = CONFIG | {"datasets": datasets, "experiments": {"gmmamba": CONFIG["experiments"]["gmmamba"]}}
    config["cohorts"] = {"a": {"sheet": str(folder / "project" / "a" / "slides.csv")}}
    (folder / "project" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def snakemake(folder: Path) -> Snakemake:
    """Runs Snakemake with the tests' conda on the PATH; returns what it said."""
    pins = {name: pin for file in FILES for name, pin in read(file).pins.items()}
    build_channels(folder / "channels", pins, CONDA_NAMES)
    binaries = install_conda(folder / "conda", folder / "channels")
    base = folder / "snakemake"
    create = [binaries / "conda", "env", "create", "--file", ROOT / "envs/snakemake.yaml", "--prefix", base]
    subprocess.run(create, check=True)
    # A package of this name on the user's own PYTHONPATH must not reach any job.
    (folder / "astray").mkdir()
    (folder / "astray" / "timm.py").write_text("raise ImportError('the PYTHONPATH of the user reached a job')\n")
    environment = os.environ | {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "astray"),
        "RECORD_PYTHON": str(folder / "pythons.tsv"),
    }

    def run(*options: str) -> str:
        command = [base / "bin/python", "-m", "snakemake", "-s", folder / "code/Snakefile", "-d", folder / "project"]
        run = subprocess.run([*command, "--cores", "2", *options], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout + run.stderr

    return run


@pytest.fixture(scope="module")
def finished(folder: Path, snakemake: Snakemake) -> Path:
    snakemake("--use-conda", "--show-failed-logs")
    return folder


def rules(output: str) -> set[str]:
    """The rules of a dry run's jobs."""
    return set(re.findall(r"^(?:local)?rule (\w+):", output, re.MULTILINE)) - {"all"}


def prefix(folder: Path, name: str) -> Path:
    """The environment that Snakemake made of code/envs/{name}.yaml; it keeps a copy of the file beside it."""
    content = (folder / "code/envs" / f"{name}.yaml").read_text()
    (copy,) = (f for f in (folder / "project/.snakemake/conda").glob("*.yaml") if f.read_text() == content)
    return copy.with_suffix("")


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_every_job_runs_in_the_environment_of_its_file(finished: Path) -> None:
    expected = {name: {prefix(finished, name)} for name in COMMANDS}
    seen: dict[str, set[Path]] = {name: set() for name in COMMANDS}
    commands: dict[str, set[str]] = {name: set() for name in COMMANDS}
    for line in (finished / "pythons.tsv").read_text().splitlines():
        python, _, *arguments = line.split("\t")
        # `-m package command ...`, or a process that imports a package's modules on a job's behalf
        package = next((a.split(".")[0] for a in arguments if a.split(".")[0] in COMMANDS), None)
        if package:
            seen[package].add(Path(python))
            commands[package] |= {arguments[2]} if arguments[:2] == ["-m", package] else set()
    assert seen == expected
    assert commands == COMMANDS


def test_an_environment_holds_no_more_than_its_stage_needs(finished: Path) -> None:
    """So that a job that runs in it proves that its file is complete."""
    held = {
        name: {file.name.rsplit("-", 2)[0] for file in prefix(finished, name).glob("conda-meta/*.json")}
        for name in COMMANDS
    }
    assert not {"pandas", "scikit-learn"} & held["preprocessing"]
    assert not {"timm", "openslide", "py-opencv"} & held["gmmamba"]


def test_nothing_to_be_done_the_second_time(finished: Path, snakemake: Snakemake) -> None:
    assert rules(snakemake("--use-conda", "-n")) == set()


@pytest.mark.parametrize(("name", "expected"), [("gmmamba", MODELLING), ("preprocessing", PREPROCESSING | MODELLING)])
def test_a_changed_pin_runs_its_stages_and_what_follows(
    finished: Path, snakemake: Snakemake, name: str, expected: set[str]
) -> None:
    file = finished / "code/envs" / f"{name}.yaml"
    edit(file, "tqdm =4.67.1", "tqdm =4.67.0")
    try:
        assert rules(snakemake("--use-conda", "-n")) == expected
    finally:
        edit(file, "tqdm =4.67.0", "tqdm =4.67.1")


def test_with_and_without_conda_are_different_environments(finished: Path, snakemake: Snakemake) -> None:
    assert rules(snakemake("-n")) == PREPROCESSING | MODELLING
    assert rules(snakemake("-n", "--rerun-triggers", "mtime", "params", "input", "code")) == set()


def test_the_container_holds_the_same_environments(finished: Path, snakemake: Snakemake) -> None:
    """envs/gmmamba.def makes what Snakemake will look for; docs/environments.md has the command that writes it anew."""
    project = ("-d", str(finished / "code"), "--configfile", str(finished / "project/config.yaml"))
    create = re.compile(r"conda env create --prefix \S+ --file \S+")
    expected = create.findall(snakemake("--containerize", *project))
    assert len(expected) == 2
    assert create.findall((ROOT / "envs" / "gmmamba.def").read_text()) == expected
