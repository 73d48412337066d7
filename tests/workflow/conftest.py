"""The finished project that tests look at, and the copy of it that tests edit."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tests.workflow.project import CONFIG, FILES, GOOD, OTHER, finish, write_cohort


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of `make_finished`, made once for all processes that tests run in; not to be changed, nor run in."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    project, stamp = folder / "finished", folder / "finished.stamp"
    with FileLock(folder / "finished.lock"):
        if not stamp.exists():
            shutil.rmtree(project, ignore_errors=True)
            make_finished(project)
            stamp.touch()
    return project


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy to edit; times are kept, they are what Snakemake compares."""
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def make_finished(project: Path) -> None:
    """Run a project: ten good slides and one truncated file, and a cohort of two beside the config.

    A scanner's clock and that of whoever wrote a sheet were a day ahead.
    """
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
    finish(project)
