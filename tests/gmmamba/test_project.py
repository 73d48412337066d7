"""`gmmamba run`: Snakemake with this workflow, and with bars where they can move."""

import sys
from pathlib import Path
from typing import Any

import pytest

from gmmamba.__main__ import main
from gmmamba.project import PROJECT


@pytest.mark.parametrize(
    ("terminal", "arguments", "bars"),
    [
        (True, ["--cores", "2", "-n", "results/a/contact_sheet.html"], True),
        (False, ["--cores", "2"], False),
        (True, ["--workflow-profile", "slurm"], False),
        (True, ["--logger", "snkmt", "--cores", "2"], False),
    ],
)
def test_run_is_snakemake(terminal: bool, arguments: list[str], bars: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execv", lambda program, command: started.extend([program, *command]))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    main(["run", *arguments])
    shown = ["--logger", "rich"] if bars else []
    snakefile = [
        "--snakefile",
        str(PROJECT / "Snakefile"),
    ]  # after the loggers, which would take a target for another one
    assert started == [sys.executable, sys.executable, "-m", "snakemake", *shown, *snakefile, *arguments]
    assert Path(snakefile[1]).is_file()
