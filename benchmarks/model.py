"""`make bench`: GMMamba's speed and memory against the published procedure, and against its own linear layers.

Prints a Markdown table; `--write PAGE` puts it into that page. `--sizes 1000,4000 --groups 10` makes a short run.

Shapes: N instances, G groups.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path

import torch

from benchmarks.measure import cpu_name, interleaved_medians, markdown_table, write_section
from benchmarks.published import SCANS
from benchmarks.steps import KMEANS, LINEAR, Cell, available_backends, peak_memory, prepare

ORACLE, ORACLE_SIZE = "torch", 1000
STEPS = {False: "forward", True: "forward + backward"}

NOTE = """\
**{device}**, {threads} threads, torch {torch}, {date}; float32, D = 512, 2 classes, one slide a step; medians of
{repeats} interleaved runs after a warm-up. `{command}`

{table}

*Published* is the published procedure, rebuilt in `benchmarks/published.py`: k-means at each step, then group by group,
with the scan as its reference computes it, and with that scan's tensors *unbound* first, the fastest such loop in pure
PyTorch. Ours has grouped the slide before. *Linear* are the matrix products of the mixers and heads alone. Peak memory
is what a first step needs beyond model and slide, in a process of its own. – is not measured: by extrapolation from the
smaller sizes a run would take more than {budget:g} s or {memory:.0f} GB. The scan `torch` is the readable one, measured
up to N = 1000 only.
"""


@dataclass
class Result:
    """NaN where memory did not suffice."""

    seconds: float
    peak: float
    """Bytes."""


def measure(options: argparse.Namespace, backends: list[str]) -> dict[Cell, Result]:
    """Every cell that can be afforded; progress goes to standard error."""
    results: dict[Cell, Result] = {}
    for G, train, N in product(options.groups, (False, True), sorted(options.sizes)):
        runners = [*SCANS, *(b for b in backends if b != ORACLE or N <= ORACLE_SIZE), KMEANS, LINEAR]
        cells = [Cell(runner, N, G, train, options.device, options.threads) for runner in runners]
        cells = [cell for cell in cells if affordable(cell, results, options.budget, options.memory * 1e9)]
        tell(f"N {N}, G {G}, {STEPS[train]} of {', '.join(cell.runner for cell in cells)} …")
        peaks = {cell: 0.0 if cell.runner in (KMEANS, LINEAR) else peak_memory(cell) for cell in cells}
        ready = {cell: prepare(cell) for cell in cells if math.isfinite(peaks[cell])}
        times = interleaved_medians(ready, options.repeats, options.budget)
        del ready  # the next peaks may need the memory
        for cell in cells:
            results[cell] = Result(times.get(cell, math.nan), peaks[cell])
            seconds, megabytes = number(results[cell].seconds), number(peaks[cell] / 1e6)
            tell(f"N {N}, G {G}, {STEPS[train]}, {cell.runner}: {seconds} s, {megabytes} MB")
    return results


def tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def affordable(cell: Cell, results: dict[Cell, Result], budget: float, memory: float) -> bool:
    """Whether a run stays within the budget (s) and the memory (bytes), judged from the smaller sizes.

    Time by the power law of the last two, as quadratic from a single one; memory in proportion. The smallest size is
    always run.
    """
    known = [(smaller.N, result) for smaller, result in results.items() if replace(smaller, N=cell.N) == cell]
    if not known:
        return True
    (N, last), power = known[-1], 2.0
    if len(known) > 1:
        n, before = known[-2]
        power = max(1.0, math.log(last.seconds / before.seconds) / math.log(N / n))
    return last.seconds * (cell.N / N) ** power <= budget and last.peak * cell.N / N <= memory


def table(results: dict[Cell, Result], backends: list[str]) -> str:
    """A row for each N, G, step and backend of ours."""
    header = "N,G,step,scan,s,published s,÷ ours,unbound s,÷ ours,of these k-means s,linear s,ours ÷ linear"
    header += ",peak MB,published MB,unbound MB"
    rows = []
    for cell, ours in sorted(results.items(), key=lambda item: (item[0].N, item[0].G, item[0].train)):
        if cell.runner in backends:
            reference, unbound, kmeans, linear = (
                results.get(replace(cell, runner=runner), Result(math.nan, math.nan))
                for runner in (*SCANS, KMEANS, LINEAR)
            )
            values = [ours.seconds, reference.seconds, reference.seconds / ours.seconds]
            values += [unbound.seconds, unbound.seconds / ours.seconds]
            values += [kmeans.seconds, linear.seconds, ours.seconds / linear.seconds]
            values += [result.peak / 1e6 for result in (ours, reference, unbound)]
            rows.append([str(cell.N), str(cell.G), STEPS[cell.train], cell.runner, *map(number, values)])
    return markdown_table(header.split(","), rows)


def number(value: float) -> str:
    """Three digits, or a dash for what was not measured."""
    return "–" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=integers, default=[1000, 4000, 12_000, 50_000, 100_000], help="instances, N")
    parser.add_argument("--groups", type=integers, default=[1, 10, 20], help="groups, G")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=200, help="seconds that one run may take")
    parser.add_argument("--memory", type=float, help="GB that one run may take (default: 80 %% of all)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into its section of this page")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if options.memory is None:
        ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        options.memory = 0.8e-9 * (torch.cuda.mem_get_info()[1] if options.device == "cuda" else ram)
    backends = available_backends(options.device)
    facts = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.model", *sys.argv[1:]]),
        "table": table(measure(options, backends), backends),
    }
    text = NOTE.format(**vars(options) | facts)
    if options.device == "cuda":
        from benchmarks.cuda import precision_and_epochs

        text += "\n" + precision_and_epochs([backend for backend in backends if backend != ORACLE])
    print(text)
    if options.write:
        groups = ", ".join(map(str, options.groups))
        write_section(options.write, f"model on {options.device}, G = {groups}", text)


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
