"""Arguments that several subcommands of the command line share, and the forms that their values have."""

import argparse
from pathlib import Path


def label_class(text: str) -> tuple[str, str]:
    """LABEL=CLASS"""
    label, equals, name = text.rpartition("=")
    if not (label and equals and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=CLASS")
    return label.strip(), name.strip()


def cohort_file(text: str) -> tuple[str, Path]:
    """COHORT=FILE"""
    cohort, _, path = text.partition("=")
    return cohort, Path(path)


def grouping_file(text: str) -> tuple[tuple[str, str], Path]:
    """COHORT/GROUPING=FILE"""
    key, _, path = text.partition("=")
    cohort, _, grouping = key.partition("/")
    return (cohort, grouping), Path(path)


def add_cohort(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--cohort", required=True)
    sub.add_argument("--sheet", type=Path, required=True)


def add_tiles(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--tiles", type=Path, required=True, help="folder of what tile_slide wrote")


def add_stores(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--stores", type=Path, required=True, help="folder of the stores of one encoder")
    sub.add_argument("--encoder", required=True)


def add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--fold", type=int, required=True)
    sub.add_argument("--seed", type=int, required=True)
    sub.add_argument("--splits", type=Path, required=True)
    sub.add_argument("--slide-table", type=cohort_file, action="append", required=True, metavar="COHORT=CSV")
    sub.add_argument("--groups", type=cohort_file, action="append", default=[], metavar="COHORT=NPZ")
    sub.add_argument("--threads", type=int, default=1)
