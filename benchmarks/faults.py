"""What a run loses when its processes are killed: ``python -m benchmarks.faults`` kills and restarts the demo.

One demo runs undisturbed. Another is started again and again with the plain command, and at random moments, until it
ends, ``kill -9`` hits one of its processes at random: Snakemake, a shell, a job, a process that jobs fork from. After
every run each output that is there must be whole, after the last one all must be there, and every one must be that of
the undisturbed run, bit for bit. ``--write PAGE`` puts the table into a Markdown page. Linux only.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import cpu_name, markdown_table, write_section
from preprocessing.demo_cohort import make_demo_cohort

ROOT = Path(__file__).parents[1]
DEMO_COHORT = Path("results/demo/cohort")


@dataclass
class Campaign:
    """What a campaign did and found.

    killed     the processes hit, by kind
    lost       outputs of finished jobs that were there before a kill and not after it
    differing  outputs found, after a kill or at the end, that are not those of the undisturbed run
    finished   runs brought to their end
    unlocked   restarts that needed ``snakemake --unlock`` first
    """

    killed: Counter[str] = field(default_factory=Counter)
    lost: set[str] = field(default_factory=set)
    differing: set[str] = field(default_factory=set)
    finished: int = 0
    unlocked: int = 0


def command(project: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-d", str(project), *options]


def outputs(project: Path) -> dict[str, str]:
    """Digest of every file that the rules of a project have written, logs aside."""
    kept = {}
    for path in sorted(project.glob("results/**/*")):
        name = str(path.relative_to(project))
        inside = path.relative_to(project).parts[2:]
        if path.name.startswith(".") or not path.is_file():
            continue  # beginning with a dot: what a killed job had begun to write
        if inside and inside[0] not in ("logs", "cohort"):
            kept[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return kept


def recorded(project: Path) -> set[str]:
    """The outputs of jobs that Snakemake has recorded as finished."""
    folder = project / ".snakemake"
    keys = {name: base64.urlsafe_b64encode(name.encode()).decode() for name in outputs(project)}
    return {
        name
        for name, key in keys.items()
        if (folder / "metadata" / key).exists() and not (folder / "incomplete" / key).exists()
    }


def processes(project: Path) -> dict[int, str]:
    """The processes of a run, by pid: those that work in the project's folder, with a name for each."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ProcessLookupError):  # not a process, another user's, or gone by now
            if entry.name.isdigit() and (entry / "cwd").readlink() == project:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found[int(entry.name)] = kind_of(words)
    return found


def kind_of(words: list[str]) -> str:
    if "snakemake" in words:
        return "Snakemake"
    if "slidestore.warm_start" in words:
        return "warm process, or a job in a fork of it"
    if "preprocessing" in words or "gmmamba" in words:
        return "job or its client"
    return "shell"


def run_campaign(
    prepare: Callable[[Path], None], kills: int, longest: float, rng: random.Random, cores: int = 2
) -> Campaign:
    """Kill `kills` processes, each at a moment drawn evenly within `longest` seconds of a start or of the last kill.

    prepare: fills an empty folder with a project. Finished runs are checked, wiped and begun anew.
    """
    campaign = Campaign()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent).resolve()
        calm, project = folder / "calm", folder / "project"
        for path in (calm, project):
            path.mkdir()
            prepare(path)
        subprocess.run(command(calm, "--cores", str(cores), "--quiet", "all"), check=True)
        expected = outputs(calm)
        while campaign.killed.total() < kills:
            print(f"{campaign.killed.total()} of {kills} kills, {campaign.finished} runs finished", file=sys.stderr)
            if one_run(project, kills, longest, rng, cores, campaign, expected):
                finish(project, cores, campaign, expected)
                shutil.rmtree(project / ".snakemake")
                for name in outputs(project):
                    (project / name).unlink()
        finish(project, cores, campaign, expected)
    return campaign


def one_run(
    project: Path,
    kills: int,
    longest: float,
    rng: random.Random,
    cores: int,
    campaign: Campaign,
    expected: dict[str, str],
) -> bool:
    """Start the run and kill its processes, one after another, until it ends; True where it has come to its end."""
    unlock(project, campaign)
    run = subprocess.Popen(
        command(project, "--cores", str(cores), "--quiet", "all"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    before: set[str] = set()
    while campaign.killed.total() < kills:
        with suppress(subprocess.TimeoutExpired):
            run.wait(rng.uniform(0, longest))
            break
        before |= recorded(project)
        candidates = {run.pid: "Snakemake"} | processes(project)  # while it starts it is in no folder yet
        pid = rng.choice(sorted(candidates))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            campaign.killed[candidates[pid]] += 1
    run.wait()
    deadline = time.monotonic() + 60
    while processes(project):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes outlive the run: {processes(project)}")
        time.sleep(0.1)
    after = outputs(project)
    campaign.lost |= before - after.keys()
    campaign.differing |= {name for name, digest in after.items() if expected.get(name) != digest}
    return run.returncode == 0


def unlock(project: Path, campaign: Campaign) -> None:
    """What a user does whom Snakemake tells that the folder is locked."""
    locks = project / ".snakemake" / "locks"
    if locks.is_dir() and any(locks.iterdir()):
        subprocess.run(command(project, "--unlock"), check=True, capture_output=True)
        campaign.unlocked += 1


def finish(project: Path, cores: int, campaign: Campaign, expected: dict[str, str]) -> None:
    """Bring the run to its end with the plain command and compare every output."""
    unlock(project, campaign)
    subprocess.run(command(project, "--cores", str(cores), "--quiet", "all"), check=True)
    found = outputs(project)
    campaign.lost |= expected.keys() - found.keys()
    campaign.differing |= {name for name, digest in found.items() if expected.get(name) != digest}
    campaign.finished += 1


def prepare_demo(project: Path) -> None:
    shutil.copy(ROOT / "config.yaml", project)
    make_demo_cohort(project / DEMO_COHORT)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--longest", type=float, default=30, help="seconds from a start, or a kill, to the next kill, at most"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the Markdown page to put the table into")
    options = parser.parse_args()
    campaign = run_campaign(prepare_demo, options.kills, options.longest, random.Random(options.seed))
    rows = [[kind, str(count)] for kind, count in campaign.killed.most_common()]
    text = f"""**{cpu_name()}**, {time.strftime("%Y-%m-%d")}. `python -m benchmarks.faults {" ".join(sys.argv[1:])}`

{markdown_table(["killed", "moments"], rows)}

{campaign.killed.total()} moments, {campaign.finished} runs brought to their end, {campaign.unlocked} restarts after \
`snakemake --unlock`: {len(campaign.lost)} outputs lost, {len(campaign.differing)} differing."""
    print(text, *sorted(campaign.lost), *sorted(campaign.differing), sep="\n")
    if options.write:
        write_section(options.write, "kills", text)
    sys.exit(bool(campaign.lost or campaign.differing))


if __name__ == "__main__":
    main()
