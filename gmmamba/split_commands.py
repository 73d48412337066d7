"""Command of `gmmamba` for files of splits: `splits export | import`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands of this module to the parser; command: (name, what it runs, help) -> its parser."""
    sub = command("splits", splits, "splits.csv to CLAM's splits_k.csv (export), or these to a file like it (import)")
    sub.add_argument("direction", choices=["export", "import"])
    sub.add_argument("splits", type=Path, help="splits.csv, or the folder of the splits_k.csv")
    sub.add_argument("--output", type=Path, required=True, help="the other of the two")


def splits(options: argparse.Namespace) -> None:
    from gmmamba.split_files import fold_names, read_split_file, write_clam, write_own

    if options.direction == "export":
        table = read_split_file(options.splits, "file")
        write_clam(table, options.output)
    else:
        table = read_split_file(options.splits, "clam")
        write_own(table, options.output)
    print(f"{len(table)} slides, {len(fold_names(table))} folds: {options.output}")
