"""Runs that are killed, that run out of disk, that may not write, that are started twice: a plain rerun mends it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.dag import tiny_project
from benchmarks.faults import command, outputs, run_campaign

pytestmark = pytest.mark.slow


def run(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(project, "--cores", "2"), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    tiny_project(folder, slides=10)
    return folder


@pytest.fixture(scope="module")
def expected(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outputs of an undisturbed run."""
    project = shutil.copytree(template, tmp_path_factory.mktemp("calm") / "project")
    finished = run(project)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return outputs(project)


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "project")


def test_whatever_is_killed_a_rerun_finishes_and_nothing_differs(template: Path) -> None:
    campaign = run_campaign(
        lambda folder: shutil.copytree(template, folder, dirs_exist_ok=True), kills=6, longest=15, rng=random.Random(0)
    )
    assert campaign.killed.total() == 6
    assert campaign.finished >= 1
    assert not campaign.lost
    assert not campaign.differing


Mount = Callable[[str], None]


@pytest.fixture
def mount(project: Path) -> Iterator[Mount]:
    """A file system of its own at `results`; call it with mount options, again to change them."""
    results = project / "results"
    results.mkdir()

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(results)], capture_output=True, text=True
        )
        if done.returncode and os.getuid():
            pytest.skip(f"only root can mount a file system: {done.stderr}")
        assert done.returncode == 0, done.stderr

    yield mount
    subprocess.run(["umount", "--lazy", str(results)], check=False)


def test_a_full_disk(project: Path, mount: Mount, expected: dict[str, str]) -> None:
    mount("size=600k")
    full = run(project)
    assert full.returncode != 0
    assert "No space left on device" in full.stdout + full.stderr
    kept = outputs(project)
    assert all(expected[name] == digest for name, digest in kept.items())  # whole, or not there
    mount("remount,size=1g")
    again = run(project)
    assert again.returncode == 0, again.stdout + again.stderr
    assert outputs(project) == expected


def test_results_that_may_not_be_written(project: Path, mount: Mount, expected: dict[str, str]) -> None:
    mount("size=1g,ro")
    refused = run(project)
    assert refused.returncode != 0
    assert "Read-only file system" in refused.stdout + refused.stderr
    assert "results" in refused.stdout + refused.stderr
    mount("remount,rw")
    again = run(project)
    assert again.returncode == 0, again.stdout + again.stderr
    assert outputs(project) == expected


def test_a_second_run_at_the_same_time_is_refused_with_the_remedy(project: Path, expected: dict[str, str]) -> None:
    first = subprocess.Popen(command(project, "--cores", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(project.glob("results/cohort/tiles/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = run(project)
    assert second.returncode != 0
    assert "Directory cannot be locked" in second.stdout + second.stderr
    assert "--unlock" in second.stdout + second.stderr
    assert first.wait(300) == 0
    assert outputs(project) == expected
