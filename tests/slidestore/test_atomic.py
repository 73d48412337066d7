"""Outputs appear whole or not at all."""

from pathlib import Path

import pytest

from slidestore.atomic import replace_when_whole


def test_the_output_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    with replace_when_whole(path) as part:
        part.write_text("half")
        assert not path.exists()
        part.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_output(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replace_when_whole(path) as part:
        part.write_text(f"half {1 / 0}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_job_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    (tmp_path / ".b.txt.part").write_text("left by a killed job")
    with replace_when_whole(path) as part:
        assert not part.exists()
        part.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_when_whole(tmp_path / "b.txt"):
        pass
