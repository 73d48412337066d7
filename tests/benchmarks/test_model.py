"""`make bench`: what it counts, what it leaves out, and that a short run ends in a table."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model import Result, affordable
from benchmarks.steps import LINEAR, Cell, prepare

ROOT = Path(__file__).parents[2]
MARK = "<!-- model on cpu, G = 2: "


def test_a_short_run_writes_its_table_and_spares_what_was_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"# Speed\n\nBefore.\n\n{MARK}begin, written by make bench -->\nold\n{MARK}end -->\n\nAfter.\n")
    options = ["--sizes", "60", "--groups", "2", "--threads", "1", "--repeats", "1", "--write"]
    run = [sys.executable, "-m", "benchmarks.model", *options, str(page)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # interpreted, Triton would be measured: for an hour
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True, env=environment)
    text = page.read_text()
    assert text.startswith("# Speed\n\nBefore.\n")
    assert text.endswith(" -->\n\nAfter.\n")
    assert "\nold\n" not in text

    header, rule, *rows = (
        [field.strip() for field in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    )
    assert len(rows) >= 4  # two steps of two scans at least
    for row in rows:
        assert len(row) == len(header) == len(rule)
        assert row[:2] == ["60", "2"]
        assert row[2] in ("forward", "forward + backward")
        numbers = [float(field) for field in row[4:]]
        assert min(numbers) > 0
        values = dict(zip(header[4:6], numbers, strict=False))
        assert numbers[2] == pytest.approx(values["published s"] / values["s"], rel=0.02)  # of three digits each


def test_costly_cells_are_left_out_by_extrapolation() -> None:
    def cell(N: int, runner: str = "unbound") -> Cell:
        return Cell(runner, N, 10, True, "cpu", 2)

    one = {cell(1000): Result(1.0, 1e9)}
    assert affordable(cell(4000), {}, budget=0, memory=0)  # the smallest is always run
    assert affordable(cell(4000), one, budget=16, memory=4e9)
    assert not affordable(cell(4000), one, budget=15, memory=4e9)  # quadratic until known better
    assert not affordable(cell(4000), one, budget=16, memory=3.9e9)
    assert affordable(cell(4000, "reference"), one, budget=0, memory=0)
    two = one | {cell(2000): Result(2.0, 2e9)}
    assert affordable(cell(8000), two, budget=8, memory=8e9)
    killed = one | {cell(2000): Result(math.nan, math.nan)}
    assert not affordable(cell(3000), killed, budget=1e9, memory=1e12)


@pytest.mark.parametrize("train", [False, True])
def test_the_floor_counts_every_matrix_product(train: bool) -> None:
    def mixer(n: int) -> int:  # 2 FLOPs a multiply-add
        return 2 * n * 512 * 2048 + 4 * n * 1024 * 64 + 4 * n * 32 * 1024 + 2 * n * 1024 * 512

    def head(n: int) -> int:
        return 2 * n * (512 * 128 + 128)

    with_gradient = mixer(10) + mixer(7) + head(7)  # 3 of 10 are masked
    step = prepare(Cell(LINEAR, 10, 2, train, "cpu", 1))
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == with_gradient * (3 if train else 1) + head(10)
