"""What the pipeline itself costs: planning for thousands of slides, and start-up and bookkeeping of real jobs.

``python -m benchmarks.dag`` plans projects of 1,000 and 5,000 placeholder slides with 20 experiments, 5 folds and 3
seeds, and the paper's four cohorts at full size (where their label tables are, ``--labels``). Then it runs a project of
200 tiny slides, and one of 40 with the warm start and without, and compares the machine's time with what the jobs' own
logs say that they took. ``--write PAGE`` puts the tables into a Markdown page.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import yaml

from benchmarks.measure import cpu_name, markdown_table, write_section
from benchmarks.placeholders import COHORTS, make_cohort
from preprocessing.demo_cohort import MPP, make_demo_cohort, write_aperio
from slidestore.warm_start import OWNER

ROOT = Path(__file__).parents[1]
CLASSES = ["normal", "tumour"]
USED = re.compile(r"([\d.]+) s, [\d.]+ s of CPU")


def write_project(folder: Path, slides: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """A project of one cohort whose sheet lists `slides` (slide_id -> path), labels in turn, a patient a slide."""
    rows = [f"{slide},{slide},{CLASSES[i % 2]},{path}" for i, (slide, path) in enumerate(slides.items())]
    (folder / "slides.csv").write_text("\n".join(["slide_id,patient_id,label,path", *rows]) + "\n")
    project = {
        "cohorts": {"cohort": {"sheet": "slides.csv", "mpp": 0.5}},
        "encoders": {"resnet18": {"model": "resnet18", "weights": "random"}},
        "datasets": {"dataset": {"cohorts": ["cohort"], "classes": CLASSES, "encoder": "resnet18"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(project | dict(config)))


def placeholder_project(folder: Path, slides: int, experiments: int = 20, seeds: int = 3) -> None:
    """Empty slide files: enough to plan. Five folds; the experiments share ten numbers of groups."""
    (folder / "slides").mkdir()
    paths = {f"S{i:05}": f"slides/S{i:05}.svs" for i in range(slides)}
    for path in paths.values():
        (folder / path).touch()
    named = {
        f"experiment{i}": {"model": "gmmamba", "dataset": "dataset", "overrides": {"groups": 1 + i % 10}}
        for i in range(experiments)
    }
    models = {"gmmamba": {"method": "gmmamba"}}
    write_project(folder, paths, {"models": models, "experiments": named, "seeds": list(range(seeds))})


def tiny_project(folder: Path, slides: int) -> None:
    """Real files of a few patches each, at 5x: two demo slides, shifted a little further under each name."""
    make_demo_cohort(folder / "painted", slides=10)
    painted = [tifffile.imread(folder / f"painted/slides/demo_{number:02}.svs", level=0) for number in (4, 5)]
    paths = {f"S{i:05}": f"shifted/S{i:05}.svs" for i in range(slides)}
    (folder / "shifted").mkdir()
    for i, path in enumerate(paths.values()):
        write_aperio(folder / path, np.roll(painted[i % 2], 16 * i, axis=1), MPP)
    models = {"gmmamba": {"method": "gmmamba"}, "abmil": {"method": "abmil"}}
    experiments = {name: {"model": name, "dataset": "dataset", "training": {"epochs": 6}} for name in models}
    write_project(folder, paths, {"tiling": {"mpp": 2.0}, "models": models, "experiments": experiments})


def snakemake(folder: Path, *options: str, **environment: str) -> tuple[float, str]:
    """Wall seconds and output of one run."""
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-d", str(folder), *options]
    start = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    took = time.perf_counter() - start
    if run.returncode:
        sys.exit(run.stdout + run.stderr)
    return took, run.stdout + run.stderr


@dataclass(frozen=True)
class Plan:
    """Jobs by rule, and seconds of ``snakemake -n`` as a whole."""

    jobs: Counter[str]
    seconds: float


def plan(folder: Path, *options: str) -> Plan:
    """Ask what would run in the project `folder`."""
    took, output = snakemake(folder, "-n", "--quiet", "rules", "--cores", "2", *options)
    table = output.partition("Job stats:")[2].partition("\n\n")[0]
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    jobs.pop("total", None)
    return Plan(Counter(jobs), took)


def plan_row(name: str, project: Path) -> list[str]:
    made = plan(project)
    print(f"{name}: {made.jobs.total()} jobs planned in {made.seconds:.1f} s", flush=True)
    return [name, f"{made.jobs['tile_slide']:,}", f"{made.jobs.total():,}", f"{made.seconds:.1f}"]


def own_seconds(folder: Path) -> float:
    """The seconds that the logs of tiling, encoding, training and prediction end with, added up."""
    found = [USED.findall(log.read_text()) for log in folder.glob("results/*/logs/**/*.log")]
    return sum(float(last[-1]) for last in found if last)


def measure(slide_counts: list[int], labels: Path, tiny: int, cores: int) -> str:
    """Plan and run everything; the text of the section."""
    plans = []
    cohorts = COHORTS if labels.is_dir() else {}
    with tempfile.TemporaryDirectory() as folder:
        for count in slide_counts:
            project = Path(folder, str(count))
            project.mkdir()
            placeholder_project(project, count)
            plans.append(plan_row(f"{count:,} slides", project))
        for name in cohorts:
            make_cohort(project := Path(folder, name), name, labels)
            plans.append(plan_row(name, project))
        runs, own, per_job = [], 0.0, 0.0
        for way, slides in ("forked", tiny), ("forked", tiny // 5), ("by themselves", tiny // 5):
            project = Path(folder, f"{way} {slides}")
            project.mkdir()
            tiny_project(project, slides)
            jobs = plan(project).jobs.total()
            alone = {OWNER: ""} if way == "by themselves" else {}
            took, _ = snakemake(project, "--cores", str(cores), "--quiet", "all", **alone)
            if not alone:  # a job by itself counts its imports as its own: the same jobs, forked, tell what it is
                own = own_seconds(project)
            overhead = (took * cores - own) / jobs
            per_job = per_job or overhead
            again = plan(project)
            assert not again.jobs, again
            runs.append(
                [way, f"{slides}", f"{jobs}", f"{took:.0f}", f"{own:.0f}", f"{overhead:.2f}", f"{again.seconds:.1f}"]
            )
            print(f"{slides} tiny slides, jobs {way}: {took:.0f} s on {cores} cores", flush=True)
    per_slide = 2 * per_job
    command = f"python -m benchmarks.dag {' '.join(sys.argv[1:])}".strip()
    plan_table = markdown_table(["project", "slides", "jobs", "plan s"], plans)
    header = ["jobs run", "slides", "jobs", "wall s", "of the jobs s", "overhead s a job", "plan when done s"]
    return f"""**{cpu_name()}**, {cores} cores, {time.strftime("%Y-%m-%d")}. `{command}`

Plans (`snakemake -n`, from the shell's prompt back to it) of 20 experiments, 5 folds and 3 seeds, and of the paper's
cohorts as in `config/`, with placeholders for slides:

{plan_table}

Tiny slides, two experiments and five folds, run to the report:

{markdown_table(header, runs)}

*Of the jobs* is what tiling, encoding, training and prediction say in the logs of the forked runs that they took;
overhead is all the rest of the cores' time: Snakemake, shells, start-up and imports, the small stages, and cores left
idle. A slide is two jobs, {per_slide:.1f} s of overhead (first line): below a tenth where its tiling and encoding take
more than {10 * per_slide:.0f} s of a core."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dag", description=__doc__.split("\n")[0])
    parser.add_argument("--slides", default="1000,5000", help="numbers of placeholder slides to plan for")
    parser.add_argument("--labels", type=Path, default=Path("../shared/data/labels"), help="folder of label tables")
    parser.add_argument("--tiny", type=int, default=200, help="number of tiny slides to run")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--write", type=Path, help="the Markdown page to put the tables into")
    options = parser.parse_args()
    slides = [int(count) for count in options.slides.split(",")]
    text = measure(slides, options.labels, options.tiny, options.cores)
    print(text)
    if options.write:
        write_section(options.write, "pipeline", text)


if __name__ == "__main__":
    main()
