"""What every benchmark shares: interleaved timing, peak memory in a fresh process, the machine, a section of a page."""

from __future__ import annotations

import math
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from slidestore.atomic import replace_when_whole

Step = Callable[[], object]
Clock = Callable[[], float]
Name = TypeVar("Name")


def interleaved_medians(
    steps: Mapping[Name, Step], repeats: int, budget: float, clock: Clock = time.perf_counter
) -> dict[Name, float]:
    """Median seconds of each step, run in turns A B A B … after one warm-up each.

    clock: time.process_time counts the CPU seconds of all threads, for a machine that others use too.

    Where a warm-up alone took more than its share of `budget` (seconds, for the repeats of one step), it stands for
    the step: what runs for minutes needs no warm-up.
    """
    warm = {name: seconds(step, clock) for name, step in steps.items()}
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            if warm[name] * repeats < budget:
                times[name].append(seconds(step, clock))
    return {name: statistics.median(times[name] or [warm[name]]) for name in steps}


def seconds(step: Step, clock: Clock = time.perf_counter) -> float:
    start = clock()
    step()
    return clock() - start


def peak_rss(prepare: Callable[..., Step], *arguments: object) -> float:
    """Bytes that a fresh process needs for one run of the step beyond what it held before; NaN if it is killed.

    It is forked from a server that has only imported: no earlier measurement, nor its own start, counts.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak_rss, prepare, *arguments).result()
        except BrokenProcessPool:
            return math.nan


def _peak_rss(prepare: Callable[..., Step], *arguments: object) -> float:
    step = prepare(*arguments)
    statm = Path("/proc/self/statm")
    before = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else _highest_rss()
    step()
    return max(0, _highest_rss() - before)


def _highest_rss() -> int:
    """Bytes; macOS counts in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_name() -> str:
    """The processor's model name as Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(page: Path, name: str, text: str) -> None:
    """Replace the section `name` of the Markdown page, between its markers, or add it; the rest stays as it is."""
    first, last = f"<!-- {name}: begin, written by make bench -->", f"<!-- {name}: end -->"
    old = page.read_text() if page.exists() else "# Performance\n"
    section = f"{first}\n{text}\n{last}"
    pattern = f"{re.escape(first)}.*?{re.escape(last)}"
    new, found = re.subn(pattern, lambda _: section, old, flags=re.DOTALL)
    with replace_when_whole(page) as part:
        part.write_text(new if found else f"{old}\n{section}\n")
