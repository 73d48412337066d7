"""Label tables in the forms that people have, read into rows of one kind.

Forms, by the columns that each must have:

clam              case_id, slide_id, label            CLAM's; ACMIL's too, with its split in `split_info`
sheet             patient_id, slide_id, label         this project's own, for slides that moved or other classes
slideflow         patient, slide                      annotations; `site` if there, the label in the one column left
stamp             PATIENT                             the clini table; the label in the one column left
stamp-slides      PATIENT, FILENAME                   the slide table that goes with it
gdc-clinical      case_submitter_id, primary_diagnosis (or cases.submitter_id, diagnoses.primary_diagnosis)
gdc-sample-sheet  Case ID, File Name                  which file is whose

The columns of any other table can be named. Tables are CSV in UTF-8, with a line of column names
(`gmmamba.csv_files`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmmamba.csv_files import read_csv, rows_by_line
from gmmamba.split_files import PARTS

# What tables write where a label is not known; GDC writes '--.
BLANK = {"", "'--", "--", "na", "n/a", "nan", "none", "not reported", "not available", "unknown"}
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"} | {p: p for p in PARTS}


class SheetError(ValueError):
    """A slide sheet cannot be made of this folder and these tables; the message says what was found, and the remedy."""


@dataclass(frozen=True)
class Form:
    """The columns of a kind of table. `slide`, `label`, `split` and `site` may be absent; `left`: the label may be
    the one column that is left; `primary`: rows that say false there are of another disease."""

    name: str
    patient: str
    slide: str = ""
    label: str = ""
    split: str = ""
    site: str = ""
    left: bool = False
    primary: str = ""

    def required(self) -> set[str]:
        return {self.patient, self.slide, self.label} - {""}


FORMS = (
    Form("clam", patient="case_id", slide="slide_id", label="label", split="split_info"),
    Form("sheet", patient="patient_id", slide="slide_id", label="label", split="split", site="site"),
    Form("slideflow", patient="patient", slide="slide", site="site", left=True),
    Form("stamp", patient="PATIENT", left=True),
    Form("stamp-slides", patient="PATIENT", slide="FILENAME"),
    Form("gdc-clinical", "case_submitter_id", label="primary_diagnosis", primary="diagnosis_is_primary_disease"),
    Form(
        "gdc-clinical",
        patient="cases.submitter_id",
        label="diagnoses.primary_diagnosis",
        primary="diagnoses.diagnosis_is_primary_disease",
    ),
    Form("gdc-sample-sheet", patient="Case ID", slide="File Name"),
)


@dataclass(frozen=True)
class LabelRow:
    """A line of a table; "" for what it does not say."""

    patient: str
    slide: str
    label: str
    split: str
    site: str
    line: int
    tissue: str = ""  # what GDC says of the sample, such as "Solid Tissue Normal"


@dataclass(frozen=True)
class LabelTable:
    """A table that was read: its form, its columns, and that of its labels ("" if it has none)."""

    path: Path
    form: str
    columns: list[str]
    label_column: str
    rows: list[LabelRow]


def read_label_table(path: Path, form: str | None = None, columns: Mapping[str, str] | None = None) -> LabelTable:
    """Read a table in one of `FORMS`: the named one, or the one that its columns show.

    columns: patient, slide, label, split -> the name of that column, instead of the form's; those that this table
    lacks do not count. Raises SheetError for a table that cannot be read, or whose form is unknown or ambiguous.
    """
    table = read_csv(path, SheetError)
    found = [str(name) for name in table.columns]
    named: dict[str, Any] = {role: name for role, name in (columns or {}).items() if name in found}
    chosen = replace(_form(path, found, form, named), **named)
    if columns and "label" in columns and "label" not in named:
        chosen = replace(chosen, label="", left=False)  # the label is in another table
    if missing := sorted(chosen.required() - set(found)):
        raise SheetError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {_listed(found)}")
    if chosen.left and not chosen.label:
        left = [name for name in found if name not in (chosen.patient, chosen.slide, chosen.site, chosen.split)]
        left = [name for name in left if name and not name.startswith("Unnamed: ")]  # a column of row numbers
        chosen = replace(chosen, label=left[0] if len(left) == 1 else "")

    def cell(row: Mapping[Any, str], column: str) -> str:
        value = row.get(column, "").strip()
        return "" if value.casefold() in BLANK else value

    rows = []
    for line, row in rows_by_line(table).items():
        if row.get(chosen.primary, "").strip().casefold() == "false":
            continue
        split = cell(row, chosen.split)
        if split and split.casefold() not in SPLIT_NAMES:
            raise SheetError(f"{path}, line {line}: {chosen.split} {split!r} is none of {', '.join(SPLIT_NAMES)}")
        rows.append(
            LabelRow(
                cell(row, chosen.patient), cell(row, chosen.slide), cell(row, chosen.label),
                SPLIT_NAMES.get(split.casefold(), ""), cell(row, chosen.site), line,
                cell(row, "Sample Type") or cell(row, "Tissue Type"),
            )
        )  # fmt: skip
    return LabelTable(path, chosen.name, found, chosen.label, rows)


def _form(path: Path, found: Sequence[str], wanted: str | None, named: dict[str, Any]) -> Form:
    """The form that is wanted or, without one, the only one that the columns found allow."""
    # Shown by a column of its own, the others may be named; and not a form of which another one has all, and more.
    shown = [form for form in FORMS if form.required() & set(found)]
    candidates = [form for form in shown if replace(form, **named).required() <= set(found)]
    candidates = [f for f in candidates if not any(f.required() < other.required() for other in candidates)]
    # Of forms that take the same columns, where these are named, the first will do.
    candidates = list({frozenset(replace(f, **named).required()): f for f in reversed(candidates)}.values())[::-1]
    if wanted is not None:
        of_name = [form for form in FORMS if form.name == wanted]
        if not of_name:
            raise SheetError(
                f"unknown form {wanted!r}; the forms are {', '.join(dict.fromkeys(f.name for f in FORMS))}"
            )
        return next((form for form in of_name if form in candidates), of_name[0])
    if len(candidates) == 1:
        return candidates[0]
    if not candidates and {"patient", "label"} <= set(named):
        return Form("columns as named", named["patient"])
    known = "\n".join(f"  {form.name}: {', '.join(sorted(form.required()))}" for form in FORMS)
    what = f"several forms ({', '.join(form.name for form in candidates)})" if candidates else "no form that is known"
    raise SheetError(
        f"{path} has the columns of {what}: {_listed(found)}\nSay which with --form, or name the columns with "
        f"--patient-column, --label-column and, if there is one, --slide-column. Where each slide is a patient of its "
        f"own, name the slides' column for both. The forms:\n{known}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
