"""Jobs in forks of one warm process: what a job sees and says, and what happens when one of the processes dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slidestore.warm_start import OWNER

ROOT = Path(__file__).parents[2]

COMMAND = """
import json, os, sys, time
from pathlib import Path
from slidestore.warm_start import run_warm

sys.path.insert(0, str(Path(__file__).parents[1]))
status = run_warm("job", sys.argv[1:], ["job.heavy"])
if status is not None:
    sys.exit(status)
from job import heavy
match sys.argv[1]:
    case "say":
        print(json.dumps([os.getppid(), os.getcwd(), sys.argv[1:], os.environ.get("WORD")]))
        print("a remark", file=sys.stderr)
        heavy.state.append("changed")
        print(len(heavy.state))
    case "fail":
        raise ValueError("a broken job")
    case "exit":
        sys.exit("no such slide")
    case "killed":
        os.kill(os.getpid(), 9)
    case "wait":
        Path(sys.argv[2]).write_text(f"{os.getppid()} {os.getpid()}")
        time.sleep(60)
"""
HEAVY = """
import os
from pathlib import Path

with Path(os.environ["IMPORTS"]).open("a") as file:
    print("imported", file=file)
state = []
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a job of a package whose import is counted in the file `imports`."""
    package = tmp_path / "code" / "job"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(COMMAND)
    (package / "heavy.py").write_text(HEAVY)
    owner = subprocess.Popen(["sleep", "600"])
    environment = {
        **os.environ, OWNER: str(owner.pid), "PYTHONPATH": f"{ROOT}:{package.parent}", "TMPDIR": str(tmp_path),
        "IMPORTS": str(tmp_path / "imports"),
    }  # fmt: skip

    def run(*arguments: str, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "job", *arguments]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**environment, **more},
        )

    yield run
    owner.kill()
    owner.wait()
    wait_until(lambda: not sockets(tmp_path))


def sockets(folder: Path) -> list[Path]:
    return [path for path in folder.glob("gmmamba-*/*") if path.name != "lock"]


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jobs fork on Linux only")


def test_jobs_share_the_imports_and_nothing_else(start: Start, tmp_path: Path) -> None:
    """Arguments, folder, environment and streams are those of each job, also of eight at a time."""
    jobs = [start("say", f"a b;'\"ü{i}", WORD=f"word {i}") for i in range(8)]
    parents = set()
    for i, job in enumerate(jobs):
        out, err = job.communicate(timeout=60)
        assert job.returncode == 0, err
        parent, folder, arguments, word = json.loads(out.splitlines()[0])
        assert (folder, arguments, word) == (str(tmp_path), ["say", f"a b;'\"ü{i}"], f"word {i}")
        assert out.splitlines()[1] == "1"  # no trace of the other jobs
        assert err == "a remark\n"
        parents.add(parent)
    assert len(parents) == 1
    assert (tmp_path / "imports").read_text() == "imported\n"
    assert oct(sockets(tmp_path)[0].parent.stat().st_mode)[-3:] == "700"


def test_without_an_owner_a_command_runs_by_itself(start: Start, tmp_path: Path) -> None:
    out, _ = start("say", **{OWNER: ""}).communicate(timeout=60)
    assert json.loads(out.splitlines()[0])[0] == os.getpid()
    assert not sockets(tmp_path)


def test_a_job_whose_snakemake_has_ended_is_not_begun(start: Start) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    job = start("say", **{OWNER: str(ended.pid)})
    out, err = job.communicate(timeout=60)
    assert (job.returncode, out) == (1, "")
    assert "Snakemake has ended: this job is not begun" in err


def test_a_job_that_runs_by_itself_ends_with_snakemake_too(start: Start, tmp_path: Path) -> None:
    owner = subprocess.Popen(["sleep", "600"])
    crowded = tmp_path / ("folder with a name too long for the address of a socket " * 3)
    crowded.mkdir()
    job = start("wait", "first", TMPDIR=str(crowded), **{OWNER: str(owner.pid)})
    wait_until(lambda: (tmp_path / "first").exists())
    owner.kill()
    owner.wait()
    assert job.wait(30) == -signal.SIGKILL
    assert job.stderr is not None
    assert "this job runs by itself" in job.stderr.read()


def test_failures_are_the_job_s_own(start: Start) -> None:
    expected = {"fail": (1, "ValueError: a broken job"), "exit": (1, "no such slide\n"), "killed": (137, "SIGKILL")}
    for command, (status, message) in expected.items():
        job = start(command)
        _, err = job.communicate(timeout=60)
        assert job.returncode == status
        assert message in err
    assert start("say").wait(60) == 0


def waiting_job(start: Start, tmp_path: Path, name: str) -> tuple[subprocess.Popen[str], int, int]:
    """A running job, the pid of its warm process and its own."""
    job = start("wait", name)
    wait_until(lambda: (tmp_path / name).exists() and bool((tmp_path / name).read_text()))
    warm, pid = map(int, (tmp_path / name).read_text().split())
    return job, warm, pid


def test_a_killed_client_takes_its_job_with_it(start: Start, tmp_path: Path) -> None:
    first, _, pid = waiting_job(start, tmp_path, "first")
    second, _, other = waiting_job(start, tmp_path, "second")
    first.kill()
    wait_until(lambda: gone(pid))
    assert not gone(other)
    second.kill()
    wait_until(lambda: gone(other))


def test_a_killed_warm_process_takes_its_jobs_with_it_and_the_next_job_has_another(
    start: Start, tmp_path: Path
) -> None:
    job, warm, pid = waiting_job(start, tmp_path, "first")
    os.kill(warm, signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "was killed" in err
    wait_until(lambda: gone(pid))
    out, err = start("say").communicate(timeout=60)
    assert json.loads(out.splitlines()[0])[0] not in (warm, os.getpid()), err


def test_a_module_that_cannot_be_imported_is_reported_in_the_job_s_own_words(start: Start, tmp_path: Path) -> None:
    (tmp_path / "code/job/heavy.py").write_text("import nonexistent_module")
    job = start("say")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "no warm start" in err
    assert err.rstrip().endswith("No module named 'nonexistent_module'")
