"""Where the workflow's files are, and how they are started: `gmmamba run` and `gmmamba demo`.

A checkout has Snakefile, config/, envs/, profiles/ and workflow/ beside the packages. A wheel has them in
gmmamba/_project, where pyproject.toml's package-dir puts them. Standard library only: planning imports this.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

INSTALLED = Path(__file__).with_name("_project")
PROJECT = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1]
"""The folder of the Snakefile."""


def run_workflow(arguments: Sequence[str]) -> NoReturn:
    """Become Snakemake with the workflow of this installation, in the working directory."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "snakemake", *display(arguments), "--snakefile", str(PROJECT / "Snakefile")]
    os.execv(sys.executable, [*command, *arguments])


def display(arguments: Sequence[str]) -> list[str]:
    """Options for bars on a terminal, unless the user chooses; lines elsewhere, and on a cluster, as the plug-in does
    not show the logs of a group of jobs that failed."""
    own = ("--logger", "--executor", "-e", "--profile", "--workflow-profile")
    return ["--logger", "rich"] if sys.stderr.isatty() and not any(a.startswith(own) for a in arguments) else []


def make_demo(folder: Path) -> str:
    """Draw the demo's slides into `folder`, and put the demo's config.yaml there; what to do next.

    Raises FileExistsError where it has a config.yaml.
    """
    config = folder / "config.yaml"
    if config.exists():
        raise FileExistsError(f"{config} exists: give another folder, or go on there with `gmmamba run`")
    slides = folder / "results" / "demo" / "cohort"  # where the config looks for them
    subprocess.run([sys.executable, "-m", "preprocessing", "demo-cohort", "--out", str(slides)], check=True)
    shutil.copyfile(PROJECT / "config.yaml", config)
    return f"The slides are in {slides}, the settings in {config}. Go on with: cd {folder} && gmmamba run --cores 2"


def where_to_look(contact_sheets: Sequence[Path], reports: Sequence[Path], command: Path | str) -> list[str]:
    """The last lines of a run or a summary: the pages that are there, and `command`, gmmamba's, to see the slides."""
    return [
        *(f"Tissue and problems of every slide: {page}" for page in contact_sheets),
        *(f"Report: {page}" for page in reports),
        *(f"Look at the slides: {command} view {page.parent}" for page in reports),
    ]
