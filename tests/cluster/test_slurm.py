"""A real Slurm cluster of one node runs the workflow: to its end, and through jobs that the scheduler kills.

Not among the default tests: `make test-slurm` installs Slurm where it is missing and runs them.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.faults import outputs
from tests.cluster.slurm import Cluster, slurm_cluster
from tests.workflow.project import CONFIG, write_cohort

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SLIDES = [f"s{i}" for i in range(8)]

# How docs/cluster.md has several jobs on one GPU.
SHARED_GPU = {"gpu": 0, "gres": "shard:1"}

# What this cluster needs beyond the profile: it keeps no accounts, and a test should not wait long.
OPTIONS = (
    "--slurm-no-account", "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2",
    "--latency-wait", "5", "--max-status-checks-per-second", "10",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


def new_project(folder: Path) -> Path:
    write_cohort(folder / "a", SLIDES)
    config = copy.deepcopy(CONFIG)
    config["datasets"]["d"]["split"] = {"folds": 2}
    for part, name in ("cohorts", "b"), ("experiments", "gmmamba2"):
        del config[part][name]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return new_project(tmp_path)


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(cluster: Cluster, project: Path) -> Iterator[Start]:
    """Starts Snakemake in the project. One that a failed test leaves behind is ended, its Slurm jobs too."""
    runs = []

    def begin(*options: str, profile: str = "slurm") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--workflow-profile", profile]
        run = subprocess.Popen(
            [*command, *OPTIONS, *options], cwd=project, env=cluster.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        runs.append(run)
        return run

    yield begin
    for run in runs:
        if run.poll() is None:
            run.kill()
            run.communicate()
    cluster.cancel_all()


def finish(run: subprocess.Popen[str], expect: int = 0) -> str:
    output, _ = run.communicate(timeout=600)
    assert run.returncode == expect, output
    return output


def jobs_of(cluster: Cluster, project: Path, rule: str) -> list[dict[str, str]]:
    """The Slurm jobs of a project that ran the rule, in the order of their submission."""
    return [job for job in cluster.jobs() if job["WorkDir"] == str(project) and rule in job["Comment"]]


def wait_for_job(cluster: Cluster, project: Path, rule: str) -> dict[str, str]:
    deadline = time.monotonic() + 500
    while True:
        for job in jobs_of(cluster, project, rule):
            if job["JobState"] == "RUNNING":
                return job
        assert time.monotonic() < deadline, f"no job of {rule} began"
        time.sleep(0.2)


def minutes(job: dict[str, str]) -> int:
    days, _, rest = job["TimeLimit"].rpartition("-")
    hours, minutes, _ = map(int, rest.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + minutes


def memory(job: dict[str, str]) -> int:
    """MB that a job asked for."""
    found = re.search(r"mem=(\d+)([MG])", job["TRES"])
    assert found, job
    return int(found[1]) * {"M": 1, "G": 1000}[found[2]]


def test_the_workflow_runs_to_its_report_and_a_new_cohort_costs_its_own_jobs(
    cluster: Cluster, project: Path, start: Start
) -> None:
    finish(start())
    assert (project / "results/d/report.html").exists()
    (tiling,) = jobs_of(cluster, project, "tile_slide")  # one for all eight slides, which are tiled one by one
    assert (tiling["NumCPUs"], memory(tiling), minutes(tiling)) == ("1", 2000, 8 * 15)
    assert len(jobs_of(cluster, project, "encode_slide")) == 2
    for rule in ("encode_slide", "train", "predict"):
        for job in jobs_of(cluster, project, rule):
            assert re.fullmatch("gres[:/]gpu:1", job["TresPerJob"])  # as the version of Slurm spells it
    assert "Nothing to be done" in finish(start())

    write_cohort(project / "c", ["y", "z"])
    edit_config(project, lambda c: c["cohorts"].update(c={"sheet": "c/slides.csv"}))
    before = len(cluster.jobs())
    finish(start())
    added = cluster.jobs()[before:]
    assert {job["Comment"].removeprefix("rule_").split("_wildcards")[0] for job in added} == {
        "tile_tile_slide", "contact_sheet", "encode_encode_slide", "group_cohort", "prepare_account_cohort"
    }  # fmt: skip
    assert len(added) == 5


def test_a_cancelled_job_is_submitted_again_with_more(cluster: Cluster, project: Path, start: Start) -> None:
    run = start()
    victim = wait_for_job(cluster, project, "train")
    cluster.run("scancel", victim["JobId"])
    output = finish(run)
    assert "CANCELLED" in output
    again = [job for job in jobs_of(cluster, project, "train") if job["Comment"] == victim["Comment"]]
    assert [job["JobState"] for job in again] == ["CANCELLED", "COMPLETED"]
    assert minutes(again[1]) == 2 * minutes(again[0])
    assert memory(again[1]) == pytest.approx(2 * memory(again[0]), rel=0.01)


def edit_config(project: Path, change: Callable[[dict], object]) -> None:
    config = yaml.safe_load((project / "config.yaml").read_text())
    change(config)
    (project / "config.yaml").write_text(yaml.safe_dump(config))


def scarce_profile(project: Path, name: str, **resources: dict[str, int | str]) -> str:
    """The profile with less of something for some rules, and without retries; in the project, which comes first."""
    settings = yaml.safe_load((ROOT / "workflow/profiles/slurm/config.yaml").read_text())
    settings |= {"set-resources": resources, "retries": 0}
    path = project / "profiles" / name / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(settings))
    return name


def test_jobs_out_of_memory_or_time_are_reported_and_a_rerun_goes_on(
    cluster: Cluster, project: Path, start: Start
) -> None:
    """Encoding gets too little memory and training too little time; neither costs what was done before."""
    endless = {"epochs": 10**6, "min_epochs": 10**6}
    edit_config(project, lambda c: (c["experiments"].pop("gmmamba"), c.update(training=endless)))
    little_memory = scarce_profile(project, "little-memory", encode_slide={"mem_mb": 60, **SHARED_GPU})
    output = finish(start(profile=little_memory), expect=1)
    assert "exceeded memory limit" in output
    assert all(re.fullmatch("gres[:/]shard:1", job["TresPerNode"]) for job in jobs_of(cluster, project, "encode_slide"))
    assert "encode_slide" in output
    logs = re.findall(r"/\S+/slurm_logs/\S+\.log", output)
    assert logs
    assert Path(logs[-1]).exists()
    tiles = {name: digest for name, digest in outputs(project).items() if "/tiles/" in name}
    assert len(tiles) == 5 * len(SLIDES)

    little_time = scarce_profile(project, "little-time", train={"runtime": 1})
    output = finish(start(profile=little_time), expect=1)
    assert "'TIMEOUT'" in output
    assert {job["JobState"] for job in jobs_of(cluster, project, "train")} == {"TIMEOUT"}

    edit_config(project, lambda c: c.update(training=CONFIG["training"]))
    finish(start())
    assert (project / "results/d/report.html").exists()
    assert {name: digest for name, digest in outputs(project).items() if "/tiles/" in name} == tiles
    assert len(jobs_of(cluster, project, "tile_slide")) == 1
    assert len(jobs_of(cluster, project, "encode_slide")) == 4  # two that were killed, two that were not
