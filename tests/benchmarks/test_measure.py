"""What the benchmarks share. Without torch, so that the processes started here are quick."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measure import interleaved_medians, peak_rss, write_section


def test_repeats_take_turns_after_a_warm_up_and_a_long_run_stands_alone() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "AB"}
    assert set(interleaved_medians(steps, repeats=2, budget=100)) == {"A", "B"}
    assert "".join(calls) == "AB" * 3
    calls.clear()
    assert min(interleaved_medians(steps, repeats=2, budget=0).values()) > 0
    assert "".join(calls) == "AB"


def allocation(megabytes: int) -> Callable[[], object]:
    held = np.ones(4_000_000)
    return lambda: np.ones(megabytes * 125_000).sum() + held[0]


def test_peak_memory_is_that_of_the_step_alone() -> None:
    np.ones(40_000_000)  # what this process needed before does not count
    assert peak_rss(allocation, 64) == pytest.approx(64e6, abs=8e6)


def test_a_new_section_is_added_to_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for name, text in (("a", "1"), ("b", "2"), ("a", r"\3")):
        write_section(page, name, text)
    lines = [line for line in page.read_text().splitlines() if line and not line.startswith("<!--")]
    assert lines == ["# Performance", r"\3", "2"]
