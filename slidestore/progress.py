"""Progress of long work: a bar on a terminal, in a log a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 15.0  # between the lines of a log; work that is done sooner leaves none
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, about {remaining} left{postfix}"


class Lines:
    """What tqdm takes for a terminal, where each of its bars is a line of its own."""

    def __init__(self, log: TextIO) -> None:
        self.log = log

    def write(self, text: str) -> None:
        if line := text.strip():
            self.log.write(f"{line}\n")

    def flush(self) -> None:
        self.log.flush()


def progress_bar(steps: Iterable[Any] | None = None, **settings: Any) -> "tqdm[Any]":
    """tqdm's bar; `settings` are tqdm's. Where stderr is no terminal, a line every `SECONDS`."""
    if sys.stderr.isatty():
        return tqdm(steps, **settings)
    now_and_then = {"mininterval": SECONDS, "maxinterval": SECONDS, "miniters": 1, "delay": SECONDS}
    in_log = {"file": Lines(sys.stderr), "bar_format": LINE, "leave": False, **now_and_then}
    return tqdm(steps, **in_log, **settings)  # type: ignore[call-overload]
