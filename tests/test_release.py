"""What is released: wheel and sdist, built from what git tracks, installed where there is no checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import slidestore
from tests.workflow.project import write_cohort

ROOT = Path(__file__).parents[1]
PACKAGES = ("gmmamba", "preprocessing", "slidestore")
CONFIG = {
    "cohorts": {"a": {"sheet": "a/slides.csv"}},
    "tiling": {"patch_px": 64, "mpp": 0.5},
    "encoders": {"tiny": {"model": "resnet18", "weights": "random", "batch_size": 16}},
    "datasets": {"d": {"cohorts": ["a"], "classes": ["normal", "tumour"], "encoder": "tiny", "split": {"folds": 2}}},
    "training": {"epochs": 6},
    "experiments": {"mean": {"model": "mean", "dataset": "d"}},
}


def tracked() -> list[str]:
    """The files of git's index; `profiles` is a link to a folder, whose files stand for it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    files = [name for name in listed if (ROOT / name).is_file()]
    return files + [str(file.relative_to(ROOT)) for file in (ROOT / "profiles").glob("*/*")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist of a copy of the tracked files, and a wheel of what the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("release")
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of the project's files: this is no checkout")
    for name in tracked():
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "copy" / name)
    sdist = build(folder / "copy", "sdist", folder)
    wheel = build(folder / "copy", "wheel", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return {
        "sdist": sdist,
        "wheel": wheel,
        "again": build(folder / sdist.name[: -len(".tar.gz")], "wheel", folder / "again"),
    }


def build(source: Path, kind: str, output: Path) -> Path:
    """As pip does it, but with the setuptools of this environment: nothing is downloaded."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
    output.mkdir(exist_ok=True)
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return output / run.stdout.strip().split("\n")[-1]


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a new environment that has the wheel, and this one's other packages: no checkout, for a path in a
    .pth runs no further .pth, such as that of an editable install."""
    home = tmp_path_factory.mktemp("clean") / "env"
    venv.create(home, with_pip=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python = home / "bin" / "python"
    before = run([str(python), "-c", "import gmmamba"], home)
    assert "No module named 'gmmamba'" in before.stderr
    run([str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(built["wheel"])], home).check_returncode()
    return home / "bin"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_run_in_a_checkout_is_snakemake_with_its_snakefile(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gmmamba", "run", "-n", "--cores", "1", "--", "all"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert failed.returncode == 1
    said = failed.stdout + failed.stderr
    assert f'in file "{ROOT / "Snakefile"}"' in said
    assert f"not present or accessible (full checked path: {tmp_path / 'config.yaml'})" in said


@pytest.mark.slow
def test_the_sdist_is_the_checkout_and_builds_the_same_wheel(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    generated = {name for name in names if name.startswith("gmmamba.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - generated == set(tracked())
    first, second = (zipfile.ZipFile(built[name]) for name in ("wheel", "again"))
    assert first.namelist() == second.namelist()
    assert all(first.read(name) == second.read(name) for name in first.namelist())


@pytest.mark.slow
def test_what_the_wheel_holds(built: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(built["wheel"])
    held = set(wheel.namelist())
    folders = ("inputs", "report", "rules", "schemas")
    project = ("Snakefile", "config.yaml", "config/", "envs/", "profiles/", *(f"workflow/{name}/" for name in folders))
    of_packages = {name for name in tracked() if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    of_workflow = {f"gmmamba/_project/{name}" for name in tracked() if name.startswith(project)}
    assert of_packages | of_workflow == {name for name in held if ".dist-info/" not in name}
    assert {f"{package}/py.typed" for package in PACKAGES} <= held

    (metadata,) = (name for name in held if name.endswith(".dist-info/METADATA"))
    facts = Parser().parsestr(wheel.read(metadata).decode())
    assert facts["Version"] == slidestore.__version__
    assert facts["License-Expression"] == "Apache-2.0 AND BSD-3-Clause"
    assert {"cuda", "anndata", "dev"} == set(facts.get_all("Provides-Extra") or [])
    assert any(re.fullmatch(r'mamba-ssm.*; extra == "cuda"', line) for line in facts.get_all("Requires-Dist") or [])


@pytest.mark.slow
def test_an_installed_wheel_runs_the_whole_workflow(installed: Path, tmp_path: Path) -> None:
    gmmamba = str(installed / "gmmamba")
    assert run([gmmamba, "--version"], tmp_path).stdout == f"gmmamba {slidestore.__version__}\n"
    where = run([str(installed / "python"), "-c", "import gmmamba; print(gmmamba.Cohort, gmmamba.__file__)"], tmp_path)
    assert where.stdout.startswith("<class 'gmmamba.api_cohort.Cohort'> " + str(installed.parent)), where.stderr

    write_cohort(tmp_path / "a", [f"n{number}" for number in range(8)])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    checked = run([gmmamba, "check-config"], tmp_path)
    assert "cohort a: 8 slides of a/slides.csv" in checked.stdout, checked.stderr
    done = run([gmmamba, "run", "--cores", "2", "--show-failed-logs"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results/d/report.html").is_file()
    assert "_project/profiles/default" in done.stderr  # the profile of the workflow was found
    again = run([gmmamba, "run", "-n"], tmp_path)
    assert "Nothing to be done" in again.stdout + again.stderr
    # The same code, wherever it is: a checkout goes on with these results.
    code = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-n"]
    assert "Nothing to be done" in (plan := run(code, tmp_path)).stdout + plan.stderr

    predicted = run([gmmamba, "predict", "results/d/mean", "a/n0.tif", "--output", "new", "--quick"], tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    assert (tmp_path / "new/predictions.csv").is_file()
    conda = run([gmmamba, "run", "--cores", "1", "--use-conda", "-n"], tmp_path)
    assert conda.returncode == 1
    assert "clone the repository and run snakemake there" in conda.stdout + conda.stderr


@pytest.mark.slow
def test_the_demo_of_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    gmmamba = str(installed / "gmmamba")
    drawn = run([gmmamba, "demo", "mine"], tmp_path)
    assert "Go on with: cd mine && gmmamba run --cores 2" in drawn.stdout, drawn.stderr
    plan = run([gmmamba, "run", "-n", "--quiet"], tmp_path / "mine")
    assert plan.returncode == 0, plan.stderr
    again = run([gmmamba, "demo", "mine"], tmp_path)
    assert (again.returncode, "config.yaml exists: give another folder" in again.stderr) == (1, True)
