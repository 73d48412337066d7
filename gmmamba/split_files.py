"""Splits in files that people can read and edit, in two forms.

ours   one CSV with `slide_id, fold0, fold1, ...` whose cells are train, val, test, or empty for a slide that the fold
       leaves out; results/{dataset}/splits.csv is one. Where it has `patient_id` or `label`, they must be the sheet's
CLAM   a folder of splits_0.csv, splits_1.csv, ..., each with the columns `train, val, test` of slide ids

Found before any job: unknown slides, a patient in two parts, a part without one of the classes. Slides that are in no
fold are found when the dataset is split: only then it is known which could be read, and splits.csv has no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from gmmamba.csv_files import read_csv, rows_by_line
from slidestore.atomic import replace_when_whole
from slidestore.settings import nearest

PARTS = ("train", "val", "test")
SHOWN = 5  # problems of a kind; the others are counted


class SplitError(ValueError):
    """Slides that cannot be split as asked; the message names the class, the slide or the file, and the remedy."""


class Member(NamedTuple):
    """Whose a slide is."""

    patient_id: str
    label: str


def read_split_file(path: Path, scheme: str) -> pd.DataFrame:
    """The parts by slide_id, columns fold0, fold1, ..., every cell one of PARTS or "", and `patient_id` and `label`
    where the file has them. scheme: file or clam. Raises SplitError."""
    return read_clam(path) if scheme == "clam" else read_own(path)


def read_own(path: Path) -> pd.DataFrame:
    """See `read_split_file`."""
    if path.is_dir():
        raise SplitError(f"{path} is a folder: name a CSV (slide_id, fold0, ...), or use the scheme clam")
    if not path.is_file():
        raise SplitError(f"{path} does not exist")
    table = read_csv(path, SplitError)
    folds = [name for name in table.columns if re.fullmatch(r"fold\d+", name)]
    wanted = [f"fold{i}" for i in range(len(folds))]
    if "slide_id" not in table or not folds or set(folds) != set(wanted):
        raise SplitError(
            f"{path} must have the columns slide_id, fold0, fold1, ... without a gap; it has {', '.join(table.columns)}"
        )
    for line, row in rows_by_line(table).items():
        for fold in wanted:
            if row[fold] not in ("", *PARTS):
                raise SplitError(f"{path}, line {line}: {fold} is {row[fold]!r}, none of {', '.join(PARTS)} or empty")
    twice = table.loc[table["slide_id"].duplicated(), "slide_id"]
    for slide_id in twice:
        raise SplitError(f"{path}: slide {slide_id} stands there twice: leave one line")
    given = [name for name in ("patient_id", "label") if name in table]
    return table.set_index("slide_id")[[*wanted, *given]]


def read_clam(folder: Path) -> pd.DataFrame:
    """See `read_split_file`; folder: with splits_0.csv and so on."""
    if folder.is_file():
        raise SplitError(
            f"{folder} is a file: name the folder of splits_0.csv, splits_1.csv, ..., or use the scheme file"
        )
    found = {
        int(match[1]): path
        for path in folder.glob("splits_*.csv")
        if (match := re.fullmatch(r"splits_(\d+)\.csv", path.name))
    }
    if not found or sorted(found) != list(range(len(found))):
        names = ", ".join(path.name for path in found.values()) or "none"
        raise SplitError(f"{folder} must have splits_0.csv, splits_1.csv, ... without a gap; it has {names}")
    folds = {}
    for fold, path in sorted(found.items()):
        table = read_csv(path, SplitError)
        for part in PARTS:
            if part not in table:
                raise SplitError(f"{path} has no column {part!r}; CLAM's are train, val, test")
        parts: dict[str, str] = {}
        for part in PARTS:
            for cell in filter(None, table[part]):
                # CLAM writes ids that are numbers as floats, where a column has an empty cell
                slide_id = cell.removesuffix(".0") if re.fullmatch(r"\d+\.0", cell) else cell
                if slide_id in parts:
                    raise SplitError(f"{path}: slide {slide_id} stands in {parts[slide_id]} and in {part}")
                parts[slide_id] = part
        folds[f"fold{fold}"] = pd.Series(parts, dtype=str)
    return pd.DataFrame(folds).fillna("").rename_axis("slide_id")


def write_own(table: pd.DataFrame, path: Path) -> None:
    """Write a table of `read_split_file` in our form."""
    with replace_when_whole(path) as part:
        table.to_csv(part)


def write_clam(table: pd.DataFrame, folder: Path) -> None:
    """Write a table of `read_split_file` in CLAM's form: a splits_k.csv a fold, columns as long as the longest."""
    folder.mkdir(parents=True, exist_ok=True)
    for fold in fold_names(table):
        columns = {part: pd.Series(table.index[table[fold] == part]) for part in PARTS}
        with replace_when_whole(folder / f"splits_{fold.removeprefix('fold')}.csv") as part:
            pd.DataFrame(columns).to_csv(part)


def fold_names(table: pd.DataFrame) -> list[str]:
    return [name for name in table.columns if name.startswith("fold")]


def split_file_problems(
    table: pd.DataFrame,
    slides: Mapping[str, Member],
    classes: Sequence[str],
    path: Path,
    left_out: Sequence[str] = (),
    complete: bool = True,
) -> list[str]:
    """What is wrong with a table of `read_split_file` for these slides (by slide_id); `left_out` are slides of the
    sheets that take no part, and may stand in the file. complete: whether every slide must be in a fold."""
    problems = shortened(f"{path}: ", _membership_problems(table, slides, left_out))
    if complete:
        placed = table.reindex(list(slides))[fold_names(table)].fillna("")
        nowhere = placed.index[(placed == "").all(axis=1)]
        problems += shortened(
            f"{path}: ",
            [f"slide {slide_id} is in no fold: give it parts, or fill 'exclude' in the sheet" for slide_id in nowhere],
        )
    table = table[table.index.isin(list(slides))]
    patient = pd.Series({slide_id: slides[slide_id].patient_id for slide_id in table.index}, dtype=str)
    label = pd.Series({slide_id: slides[slide_id].label for slide_id in table.index}, dtype=str)
    for fold in fold_names(table):
        parts = table.loc[table[fold] != "", fold]
        torn = []
        for name, own in parts.groupby(patient[parts.index]):
            if own.nunique() > 1:
                where = "; ".join(f"{slide_id} in {part}" for slide_id, part in own.items())
                torn.append(f"patient {name} is in two parts of {fold}: {where}; give all slides of a patient one part")
        problems += shortened(f"{path}: ", torn)
        held = set(zip(parts, label[parts.index], strict=True))
        problems += [
            f"{path}: {fold} has no slide of class {name!r} in its {part} part"
            for part in PARTS
            for name in classes
            if (part, name) not in held
        ]
    return problems


def _membership_problems(table: pd.DataFrame, slides: Mapping[str, Member], left_out: Sequence[str]) -> Iterator[str]:
    for slide_id in table.index:
        if slide_id not in slides and slide_id not in left_out:
            yield f"slide {slide_id!r} is in no sheet of the dataset; {nearest(slide_id, slides, 'take it out')}"
    for column in ("patient_id", "label"):
        for slide_id, given in zip(table.index, table[column], strict=True) if column in table else ():
            if slide_id in slides and given != (own := getattr(slides[slide_id], column)):
                yield f"slide {slide_id} has {column} {given!r}, the sheet says {own!r}: make them one"


def shortened(prefix: str, problems: Iterator[str] | list[str]) -> list[str]:
    """At most SHOWN problems of a kind, and how many more there are."""
    found = [prefix + problem for problem in problems]
    return found[:SHOWN] + ([f"{prefix}{len(found) - SHOWN} more of the same kind"] if len(found) > SHOWN else [])
