"""Progress in a log: whole lines, and none for what is done soon."""

import re

import pytest

from slidestore import progress
from slidestore.progress import progress_bar


def test_a_log_has_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(progress_bar(range(3), desc="training", unit="epochs")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # done within SECONDS

    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with progress_bar(desc="S1", unit="patches", total=200) as bar:
        for _ in range(2):
            bar.update(100)
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"S1: \d+ of 200 patches, 00:00 gone, about [\d:?]+ left", line) for line in lines)
    assert lines[-1].startswith("S1: 200 of 200 patches")


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(progress_bar(range(3), desc="training"))
    assert "\rtraining: 100%" in capsys.readouterr().err
