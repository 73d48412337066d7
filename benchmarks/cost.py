"""What a slide costs in each method of the paper's comparison: parameters, FLOPs, time and memory of a prediction.

``python -m benchmarks.cost measure --csv docs/cost.csv --write docs/performance.md`` measures the rows of the table
`methods` (config/tables.yaml), each size of each method in a process of its own, ended after ``--limit`` seconds.
``python -m benchmarks.cost figure --costs docs/cost.csv --table results/d/tables/methods.csv --output docs/cost.svg``
draws them against what the methods reach, as the paper's introduction does.

FLOPs are two a multiply-add: those that torch's FlopCounterMode counts (matrix products and convolutions), and by
formula selective scans (9 N E S + 2 N E each, E inner width, S states) and Fourier transforms (2.5 n log2 n each).

Shapes: N instances, K scans.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Step, cpu_name, interleaved_medians, markdown_table, peak_rss, write_section
from benchmarks.model import integers, number, tell
from benchmarks.steps import CLASSES, WIDTH, synthetic_bag, wait
from gmmamba.config import NAMED_MODELS, TABLES
from gmmamba.models import create_model, scan
from gmmamba.models.bag import MILModel

NOTE = """\
**{device}**, {threads} threads, torch {torch}, {date}; predicting one slide, float32, D = 512, 2 classes.
`{command}`

{table}

Parameters in millions; FLOPs of matrix products, convolutions, scans and Fourier transforms. Time is the median of
{repeats} after a warm-up; memory is what a first prediction needs beyond model and slide. Groups are made before. –
took more than {limit:g} s or more memory than there is. MHIM's teacher and IBMIL's first stage are not counted.
"""


def comparison_rows() -> dict[str, tuple[str, dict[str, Any]]]:
    """Label and settings of the methods that are compared, by the name of their model."""
    models = yaml.safe_load(NAMED_MODELS.read_text())["models"]
    rows = yaml.safe_load(TABLES.read_text())["tables"]["methods"]["rows"]
    return {name: (row["label"], models.get(name, {})) for name, row in rows.items()}


def make_model(name: str, device: str) -> tuple[MILModel, int]:
    """The model, to predict with, and how many groups it wants."""
    settings = dict(comparison_rows()[name][1])
    grouping, groups = settings.pop("grouping", "location"), settings.pop("groups", 10)
    torch.manual_seed(0)
    model = create_model(settings.pop("method"), WIDTH, CLASSES, **settings).eval().to(device)
    return model, 1 if grouping == "none" else groups


def prepare(name: str, N: int, device: str, threads: int) -> Step:
    torch.set_num_threads(threads)
    model, groups = make_model(name, device)
    bag = synthetic_bag(N, groups, device)

    def step() -> None:
        with torch.no_grad():
            model(bag)
        wait(device)

    return step


def count_flops(step: Step) -> float:
    """Of one run of the step."""
    transforms = {torch.ops.aten._fft_r2c: fourier_flops, torch.ops.aten._fft_c2r: inverse_fourier_flops}
    # The fast path of attention is one operation that the counter does not know.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counted_scans() as scans, FlopCounterMode(display=False, custom_mapping=transforms) as counter:
            step()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops() + sum(scans))


def fourier_flops(shape: Any, dim: list[int], *_: Any, **__: Any) -> int:
    n = math.prod(shape[d] for d in dim)
    return round(2.5 * math.prod(shape) * math.log2(max(n, 2)))


def inverse_fourier_flops(shape: Any, dim: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return fourier_flops(out_shape, dim)


@contextmanager
def counted_scans() -> Iterator[list[int]]:
    """The FLOPs of each call of a selective scan, whichever backend it has."""
    flops: list[int] = []
    find = scan.find_backend

    def find_counted(name: str, device: str) -> scan.Scan:
        run = find(name, device)

        def counted(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> Tensor:
            flops.append(9 * u.numel() * A.shape[-1] + 2 * u.numel())
            return run(u, dt, A, *rest)

        return counted

    with mock.patch.object(scan, "find_backend", find_counted):
        yield flops


def measure_one(name: str, N: int, device: str, threads: int, repeats: int) -> dict[str, float]:
    """Parameters, FLOPs, seconds and bytes of one method at one size."""
    step = prepare(name, N, device, threads)
    parameters = sum(p.numel() for p in make_model(name, device)[0].parameters() if p.requires_grad)
    flops = count_flops(step)
    seconds = interleaved_medians({name: step}, repeats, budget=math.inf)[name]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = float(torch.cuda.max_memory_allocated() - before)
    else:
        peak = peak_rss(prepare, name, N, device, threads)
    return {"parameters": parameters, "flops": flops, "seconds": seconds, "peak": peak}


def measure_limited(name: str, N: int, options: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own; NaN where it took too long or failed, of which the reason is told."""
    arguments = [name, str(N), options.device, str(options.threads), str(options.repeats)]
    command = [sys.executable, "-m", "benchmarks.cost", "one", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = child.communicate(timeout=options.limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its own children, too
        child.communicate()
        tell(f"{name}, N {N}: more than {options.limit} s")
        return {}
    if child.returncode:
        tell(f"{name}, N {N}: {errors.strip().splitlines()[-1] if errors.strip() else f'ended by {child.returncode}'}")
        return {}
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    seconds, gflops, megabytes = found["seconds"], found["flops"] / 1e9, found["peak"] / 1e6
    tell(f"{name}, N {N}: {number(seconds)} s, {number(gflops)} GFLOPs, {number(megabytes)} MB")
    return found


def measure(options: argparse.Namespace) -> None:
    rows = []
    for name, (label, settings) in comparison_rows().items():
        if not settings:
            tell(f"{name} is not measured: {NAMED_MODELS.name} has no such model")
            continue
        for N in sorted(options.sizes):
            found = measure_limited(name, N, options)
            rows.append({"model": name, "label": label, "N": N, **found})
            if not found:
                break  # a larger slide takes no less
    keys = ["model", "label", "N", "parameters", "flops", "seconds", "peak"]
    costs = pd.DataFrame(rows).reindex(columns=keys)
    if options.csv:
        costs.to_csv(options.csv, index=False)
    facts = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": " ".join(["python", "-m", "benchmarks.cost", *sys.argv[1:]]),
        "table": table(costs, sorted(options.sizes)),
    }
    text = NOTE.format(**vars(options) | facts)
    print(text)
    if options.write:
        write_section(options.write, f"methods on {options.device}", text)


def table(costs: pd.DataFrame, sizes: list[int]) -> str:
    """A row a method: parameters, then FLOPs, seconds and memory of each size."""
    units = {"flops": (1e9, "GFLOPs"), "seconds": (1.0, "s"), "peak": (1e6, "MB")}
    header = ["method", "parameters"] + [f"{unit}, {N:,}" for _, unit in units.values() for N in sizes]
    rows = []
    for label, of_model in costs.groupby("label", sort=False):
        by_size = of_model.set_index("N").reindex(sizes)
        cells = [number(value / unit) for key, (unit, _) in units.items() for value in by_size[key].to_list()]
        rows.append([str(label), f"{of_model['parameters'].max() / 1e6:.2f}", *cells])
    return markdown_table(header, rows)


def figure(options: argparse.Namespace) -> None:
    """Seconds a slide against what the method reaches; the area of a bubble are its FLOPs."""
    import matplotlib as mpl

    from gmmamba.charts import cost_figure
    from gmmamba.figures import STYLE

    costs = pd.read_csv(options.costs).query("N == @options.size").dropna()
    reached = pd.read_csv(options.table)
    reached["model"] = reached["experiment"].str.rsplit(".", n=1).str[0]
    drawn = costs.merge(reached[["model", f"{options.metric}_mean"]], on="model")
    if drawn.empty:
        raise SystemExit(f"{options.costs} (N = {options.size}) and {options.table} have no method in common")
    reached_by = dict(zip(drawn["label"], drawn[f"{options.metric}_mean"], strict=True))
    picture = cost_figure(drawn, reached_by, {"auroc": "AUROC", "accuracy": "accuracy"}[options.metric], options.size)
    with mpl.rc_context(STYLE):
        picture.savefig(options.output, metadata={"Date": None} if options.output.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command_name", required=True)
    sub = commands.add_parser("measure", help="every method at every size")
    sub.set_defaults(run=measure)
    sub.add_argument("--sizes", type=integers, default=[1000, 10_000, 50_000], help="instances, N")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sub.add_argument("--threads", type=int, default=2)
    sub.add_argument("--repeats", type=int, default=3)
    sub.add_argument("--limit", type=float, default=300, help="seconds that one size of one method may take")
    sub.add_argument("--csv", type=Path, help="the numbers, for the figure")
    sub.add_argument("--write", type=Path, metavar="PAGE", help="put the table into its section of this page")
    sub = commands.add_parser("figure", help="what the methods cost and reach")
    sub.set_defaults(run=figure)
    sub.add_argument("--costs", type=Path, required=True, help="what measure --csv wrote")
    sub.add_argument("--table", type=Path, required=True, help="results/{dataset}/tables/methods.csv")
    sub.add_argument("--metric", choices=["auroc", "accuracy"], default="auroc")
    sub.add_argument("--size", type=int, default=10_000, help="instances, N")
    sub.add_argument("--output", type=Path, required=True)
    sub = commands.add_parser("one", help="one method at one size, as JSON: what measure starts")
    sub.set_defaults(run=lambda o: print(json.dumps(measure_one(o.name, o.N, o.device, o.threads, o.repeats))))
    sub.add_argument("name")
    sub.add_argument("N", type=int)
    sub.add_argument("device")
    sub.add_argument("threads", type=int)
    sub.add_argument("repeats", type=int)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
