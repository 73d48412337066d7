"""What a slide costs: FLOPs by hand, a limit that holds, and a figure of what was measured."""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import cost
from gmmamba.charts import cost_figure

ROOT = Path(__file__).parents[2]


def mixer(n: int, width: int = 512, state: int = 16) -> int:
    """Counted by hand: a BiMamba on n instances; and D u of both scans."""
    inner, rank = 2 * width, width // 16
    products = width * 2 * inner + 2 * inner * (rank + 2 * state) + 2 * rank * inner + inner * width
    return 2 * n * products + 2 * (9 * n * inner * state + 2 * n * inner)


def test_flops_of_gmmamba_are_those_of_the_formula() -> None:
    def flops(N: int) -> float:
        return cost.count_flops(cost.prepare("gmmamba", N, "cpu", threads=1))

    attention = 2 * (512 * 128 + 128)  # the head that pools; the feature itself is a sum
    per_instance = (flops(300) - flops(100)) / 200
    assert per_instance == pytest.approx(2 * mixer(1) + attention, rel=2e-3)


def test_flops_of_a_fourier_transform() -> None:
    x = torch.randn(3, 64)
    transforms = 2.5 * 3 * 64 * math.log2(64)
    assert cost.count_flops(lambda: torch.fft.rfft(x)) == transforms
    assert cost.count_flops(lambda: torch.fft.irfft(torch.fft.rfft(x), 64)) == 2 * transforms


def test_one_method_is_measured_in_a_process_of_its_own_which_ends_in_time() -> None:
    options = argparse.Namespace(device="cpu", threads=1, repeats=1, limit=200)
    found = cost.measure_limited("abmil", 100, options)
    assert found["parameters"] == 395_139  # as measured of its published code
    assert found["flops"] == pytest.approx(0.788e8, rel=1e-2)
    assert found["seconds"] > 0
    options.limit = 0.1
    assert cost.measure_limited("abmil", 100, options) == {}
    rows = [{"label": "ABMIL", "N": 100, **found}, {"label": "Slow", "N": 100}]
    lines = cost.table(pd.DataFrame(rows), [100]).splitlines()
    assert lines[0] == "| method | parameters | GFLOPs, 100 | s, 100 | MB, 100 |"
    assert lines[2].startswith("| ABMIL | 0.40 | 0.0788 | ")
    assert lines[3].endswith("| – | – | – |")


def test_the_figure_is_drawn_from_the_table_of_a_dataset(tmp_path: Path) -> None:
    costs = {"model": ["abmil", "gmmamba"], "label": ["ABMIL", "GMMamba"], "N": 1000, "parameters": 1.0,
             "flops": [1e9, 8e9], "seconds": [0.1, 1.0], "peak": 1.0}  # fmt: skip
    pd.DataFrame(costs).to_csv(tmp_path / "cost.csv", index=False)
    reached = {"experiment": ["abmil.unified", "gmmamba.unified"], "auroc_mean": [0.8, 0.9]}
    pd.DataFrame(reached).to_csv(tmp_path / "methods.csv", index=False)
    command = [sys.executable, "-m", "benchmarks.cost", "figure", "--costs", str(tmp_path / "cost.csv"), "--size"]
    command += ["1000", "--table", str(tmp_path / "methods.csv"), "--output", str(tmp_path / "cost.svg")]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ)
    assert "<svg" in (tmp_path / "cost.svg").read_text()


def test_names_of_like_methods_are_written_beside_each_other() -> None:
    names = ["CLAM-MB", "CLAM-SB", "GMMamba"]
    costs = pd.DataFrame({"label": names, "seconds": [0.1, 0.11, 2.0], "flops": [1e9, 1e9, 8e9]})
    figure = cost_figure(costs, dict(zip(names, [0.9, 0.9, 0.5], strict=True)), "AUROC", 1000)
    written = [text for text in figure.axes[0].texts if text.get_text()]
    assert [text.get_text() for text in written] == names
    first, second, alone = (text.get_window_extent() for text in written)
    assert not first.overlaps(second)
    assert not alone.overlaps(second)
    assert written[2].get_position() == (0, 0)  # on its bubble
