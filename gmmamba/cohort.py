"""Slide sheets: one CSV a cohort, checked line by line before any job starts.

Columns: ``slide_id, patient_id, label, path`` and optional ``mpp`` (µm per pixel of level 0), ``magnification``
(objective power, taken as mpp = 10 / magnification), ``split`` (train, val, test), ``exclude`` (a reason, or yes),
``site`` (where the slide comes from), ``mask`` (a file that says where the slide's tissue is) and ``tiling.<key>`` (the
slide's own value of that key of `tiling`). Paths are absolute or relative to the sheet. Further columns are ignored,
unless they look misspelt.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmmamba.csv_files import read_csv, rows_by_line
from gmmamba.leakage import named_by_class, same_files
from gmmamba.split_files import PARTS, Member, SplitError, shortened
from gmmamba.splits import FILES, GOES_BY, SplitSettings, parts_of_file, patient_folds
from slidestore.foreign import ForeignFiles
from slidestore.settings import nearest

REQUIRED = ["slide_id", "patient_id", "label", "path"]
OPTIONAL = ["mpp", "magnification", "split", "exclude", "site", "mask"]
TILING = "tiling."  # begins the columns that override a key of `tiling`
MASK_SUFFIXES = (".geojson", ".json", ".png", ".tif", ".tiff")
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

TORN = {  # what a patient that a split scheme cannot place has, and the remedy
    "column": ("two parts", "give all slides of a patient the same one"),
    "external": (
        "slides on both sides of the split",
        "fill 'exclude' for those on one side, or, if these are different people, give them different patient_ids",
    ),
    "leave_one_cohort_out": (
        "slides in several cohorts",
        "fill 'exclude' for those in all but one, or, if these are different people, give them different patient_ids",
    ),
    "site_preserved": (
        "slides from several sites",
        "give the patient one site, or fill 'exclude' for the slides from the others",
    ),
}


@dataclass(frozen=True)
class Slide:
    """One row of a sheet. `mpp` is of level 0, in µm per pixel, None where the file must say; `line` counts from 1.

    `mask` is the file that says where tissue is, None where it is to be found; `tiling` has the row's own values of
    keys of the config's `tiling`.
    """

    slide_id: str
    patient_id: str
    label: str
    path: Path
    line: int = 0
    mpp: float | None = None
    mpp_source: str | None = None  # "sheet" or "config"
    split: str = ""
    site: str = ""
    exclude: str = ""  # the reason, empty for slides that take part
    mask: Path | None = None
    tiling: dict[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class CohortPlan:
    """Slides of one sheet and how they are tiled. `slides` includes the excluded ones. `features` is empty unless they
    come from another tool: then by encoder, as in the config."""

    name: str
    sheet: Path
    slides: dict[str, Slide]
    tiling: dict[str, Any]
    encoders: list[str]
    features: dict[str, dict[str, Any]]

    def foreign_files(self, encoder: str, slide_id: str) -> ForeignFiles:
        """The files of another tool with the features of one slide. ValueError where its format needs `patches`."""
        source, stem = self.features[encoder], self.slides[slide_id].path.stem
        paths = {
            key: source[key] and Path(source[key].replace("{slide_id}", slide_id).replace("{stem}", stem))
            for key in ("path", "patches")
        }
        return ForeignFiles(source["format"], **paths)

    def tiling_of(self, slide: Slide) -> dict[str, Any]:
        """The tiling settings of one slide: the cohort's, and what the slide's row says otherwise."""
        return {**self.tiling, **slide.tiling}


def read_sheet(
    sheet: Path,
    cohort: str,
    mpp: float | None = None,
    magnification: float | None = None,
    tiling_keys: Collection[str] = (),
    need_files: bool = True,
) -> tuple[dict[str, Slide], list[str]]:
    """The slides of a sheet by id, and the problems found (all of them, each naming the line and the remedy).

    `mpp` and `magnification` are the cohort's own, used for slides whose row gives neither. `tiling_keys` are the keys
    that columns ``tiling.<key>`` may have; where there are none, these columns are not looked at. `need_files`: whether
    the slides that take part must be there.
    """
    if not sheet.is_file():
        return {}, [f"cohorts.{cohort}.sheet: {sheet} does not exist"]
    try:
        table = read_csv(sheet, ValueError)
    except ValueError as error:
        return {}, [str(error)]
    problems = list(_column_problems(sheet, list(table.columns), tiling_keys))
    if problems:
        return {}, problems

    slides: dict[str, Slide] = {}
    absent: list[str] = []
    if mpp is None and magnification is not None:
        mpp = 10 / magnification
    for line, cells in rows_by_line(table).items():
        place, slide_id = f"{sheet}, line {line}", cells["slide_id"]
        try:
            scale, source = mpp_of(cells, mpp)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            scale = source = None
        path = sheet.parent / cells["path"]
        if not cells["path"] and not need_files:
            path = sheet.parent / slide_id / "no path in the sheet"  # and not the sheet's folder, which exists
        exclude = reason_to_exclude(cells.get("exclude", ""))
        if not SAFE_ID.fullmatch(slide_id):
            problems.append(f"{place}: slide_id {slide_id!r} must be made of letters, digits, '.', '_' and '-'")
        if slide_id in slides:
            problems.append(f"{place}: slide_id {slide_id!r} stands in line {slides[slide_id].line} already")
            continue
        if not cells["patient_id"]:
            problems.append(f"{place}: slide {slide_id} has no patient_id (repeat the slide_id if there is none)")
        if need_files and (not cells["path"] or (not exclude and not path.exists())):
            absent.append(f"{place}: slide {slide_id}: no such file: {path} (mend the path, or fill 'exclude')")
        mask = sheet.parent / cells["mask"] if cells.get("mask") else None
        if mask and not exclude and (problem := mask_problem(mask)):
            problems.append(f"{place}: slide {slide_id}: {problem}")
        if (split := cells.get("split", "")) not in ("", *PARTS):
            problems.append(f"{place}: split {split!r} is none of {', '.join(PARTS)}")
        slides[slide_id] = Slide(
            slide_id, cells["patient_id"], cells["label"], path, line, scale, source, split, cells.get("site", ""),
            exclude, mask, {key: _value(cells[TILING + key]) for key in tiling_keys if cells.get(TILING + key)},
        )  # fmt: skip
    problems += shortened("", absent)  # of a whole cohort in another place, each slide is one
    if not slides:
        problems.append(f"{sheet} lists no slide")
    return slides, problems


def mpp_of(cells: Mapping[str, str], general: float | None) -> tuple[float | None, str | None]:
    """µm per pixel of level 0 of the slide of a row, or else `general`; and who says so, "sheet" or "config".

    Raises ValueError for a cell that is no number.
    """
    if not (cell := cells.get("mpp") or cells.get("magnification")):
        return general, None if general is None else "config"
    try:
        number = float(cell)
        return (number if cells.get("mpp") else 10 / number), "sheet"
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{cell!r} is not a number (mpp in µm per pixel, or magnification such as 20)") from error


def reason_to_exclude(cell: str) -> str:
    """What a cell of the column `exclude` says; empty where the slide takes part."""
    if cell.lower() in ("", "0", "no", "false"):
        return ""
    return "excluded in the sheet" if cell.lower() in ("1", "yes", "true", "x") else cell


def mask_problem(mask: Path) -> str | None:
    if mask.suffix.lower() not in MASK_SUFFIXES:
        return f"mask {mask} is none of {', '.join(MASK_SUFFIXES)}"
    return None if mask.is_file() else f"no such mask: {mask} (mend the path, or empty the cell)"


def _value(cell: str) -> int | float | str:
    """A cell as the config would have it: a number where it is one; "224.0", as spreadsheets write it, is 224."""
    try:
        number = float(cell)
    except ValueError:
        return cell
    if not math.isfinite(number):
        return cell
    return int(number) if number.is_integer() else number


def _column_problems(sheet: Path, columns: list[str], tiling_keys: Collection[str]) -> Iterator[str]:
    known = REQUIRED + OPTIONAL + [TILING + key for key in tiling_keys]
    extra = [c for c in columns if c not in known and (tiling_keys or not c.startswith(TILING))]
    for column in REQUIRED:
        if column not in columns:
            close = difflib.get_close_matches(column, extra, n=1)
            yield f"{sheet} has no column {column!r}" + (f" ({close[0]!r} is misspelt?)" if close else "")
    for column in extra:
        close = difflib.get_close_matches(column.lower(), known, n=1, cutoff=0.8)
        if column.startswith(TILING):
            hint = f"did you mean {close[0]!r}?" if close else f"keys of `tiling`: {', '.join(tiling_keys)}"
            yield f"{sheet}: unknown column {column!r}, {hint}"
        elif close and close[0] not in columns:
            yield f"{sheet}: unknown column {column!r}, did you mean {close[0]!r}?"


def check_dataset(
    name: str, cohorts: list[tuple[str, Path, list[Slide]]], classes: list[str], split: SplitSettings
) -> tuple[list[str], list[str]]:
    """Problems that show only when the sheets of a dataset are put together (`cohorts`: name, sheet, slides), and
    warnings, which do not name the dataset."""
    problems: list[str] = []
    goes_by = GOES_BY.get(split.scheme)
    by_id = defaultdict(list)
    paths: list[tuple[str, str, Path]] = []
    labels_of: dict[str, dict[str, str]] = defaultdict(dict)  # patient -> label -> the first slide and where it stands
    unknown: dict[str, list[str]] = defaultdict(list)  # by label
    given_of: dict[str, dict[str, str]] = defaultdict(dict)  # the same for what the split scheme goes by
    for cohort, sheet, slides in cohorts:
        for slide in (slide for slide in slides if not slide.exclude):
            place = f"{sheet}, line {slide.line}"
            by_id[slide.slide_id].append(place)
            paths.append((slide.patient_id, f"{slide.slide_id} ({place})", slide.path))
            if slide.label not in classes:
                known = f"datasets.{name}.classes: {', '.join(classes)}"
                hint = nearest(slide.label, classes, otherwise="")
                hint = f"{hint} ({known})" if hint else known
                unknown[slide.label].append(
                    f"{place}: slide {slide.slide_id} has the unknown label {slide.label!r}, {hint}"
                )
            labels_of[slide.patient_id].setdefault(slide.label, f"{slide.slide_id} ({place})")
            if goes_by:
                given = split.goes_by(cohort, slide.split, slide.site)
                given_of[slide.patient_id].setdefault(given, f"{slide.slide_id} ({place})")
                if not given:
                    problems.append(
                        f"{place}: slide {slide.slide_id} has no {goes_by!r}, which datasets.{name}.split asks for "
                        f"(scheme {split.scheme})"
                    )
    problems += [problem for found in unknown.values() for problem in shortened("", found)]
    problems += [
        f"datasets.{name}: no slide of cohort {cohort} takes part, see {sheet}: mend its 'exclude', or take it out"
        for cohort, sheet, slides in cohorts
        if all(slide.exclude for slide in slides)
    ]
    for slide_id, places in by_id.items():
        if len(places) > 1:
            problems.append(f"datasets.{name}: slide_id {slide_id!r} is in several cohorts: {'; '.join(places)}")
    doubles, warnings = same_files(paths)
    problems += [f"datasets.{name}: {problem}" for problem in doubles]
    warnings = shortened("", warnings)
    warnings += named_by_class({patient: next(iter(at.values())) for patient, at in labels_of.items()}, classes)
    problems += _torn_patients(f"datasets.{name}", labels_of, "two labels", "mend the sheet")
    problems += _torn_patients(f"datasets.{name}.split", given_of, *TORN.get(split.scheme, ("", "")))
    if problems:
        return problems, warnings
    patients = {patient: next(iter(labels)) for patient, labels in labels_of.items()}
    problems += [f"datasets.{name}: no slide has the label {c!r}" for c in classes if c not in patients.values()]
    if not problems:
        given_by_patient = {patient: next(iter(values)) for patient, values in given_of.items()}
        try:
            if split.scheme in FILES:
                everyone = [slide for _, _, slides in cohorts for slide in slides]
                taking_part = {s.slide_id: Member(s.patient_id, s.label) for s in everyone if not s.exclude}
                parts_of_file(split, taking_part, classes, [s.slide_id for s in everyone if s.exclude], complete=False)
            else:
                patient_folds(patients, classes, split, given_by_patient)
        except SplitError as error:
            problems += [f"datasets.{name}: {problem}" for problem in str(error).split("\n")]
    return problems, warnings


def _torn_patients(where: str, values_of: dict[str, dict[str, str]], what: str, remedy: str) -> Iterator[str]:
    """The patients with more than one value, of patient -> value -> a slide and its place."""
    for patient, values in values_of.items():
        if len(values) > 1:
            found = "; ".join(f"{value!r} for {slide}" for value, slide in values.items())
            yield f"{where}: patient {patient} has {what}: {found}; {remedy}"
