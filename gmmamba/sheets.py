"""sheet: the slide sheet of a cohort, from a folder of slides and a label table.

Reads the names of the files in the folder (GDC's folders with one slide each, a flat folder, any other) and the tables
(`gmmamba.label_tables`); writes the sheet (`gmmamba.cohort`): `slide_id, patient_id, label, path` and, where there are
any, `split, site, exclude`. Every slide found is a row: one that cannot be used has its reason in `exclude`.

A slide and a line of a table belong together when they have the same name, whatever its case and suffix, or else the
same patient. TCGA barcodes (TCGA-AA-BBBB-01Z-00-DX1) give patient, site (AA, the tissue source site), sample type (01)
and kind of section (DX diagnostic; TS, BS, MS frozen).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from gmmamba.cohort import SAFE_ID
from gmmamba.label_tables import LabelRow, LabelTable, SheetError, read_label_table
from slidestore.atomic import replace_when_whole
from slidestore.settings import nearest

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi")
NAME_SUFFIXES = (*SLIDE_SUFFIXES, ".h5", ".pt")  # tables may name feature files
PREPARATION = "preparation.json"  # of an output folder of `gmmamba predict`; of one by Snakemake, these two:
PREDICTED = {"predictions.csv", "members.csv"}
UNFINISHED = (".partial", ".part", ".crdownload", ".tmp")
TCGA = re.compile(r"(TCGA-(\w\w)-\w{4})(?:-(\d\d)[A-Z]?-\w\w-([A-Z]{2})\w*)?(?=\W|$)", re.IGNORECASE)
SAMPLE_TYPES = {"01": "primary tumour", "02": "recurrence", "05": "new primary", "06": "metastasis"}
NAMED = 5  # names that the summary gives of a kind, unless asked for all


@dataclass(frozen=True)
class Found:
    """What a folder holds. `others`: number of other files by suffix; `unfinished`: downloads and links to nowhere."""

    slides: list[Path]
    unfinished: list[Path]
    others: Counter[str]


@dataclass(frozen=True)
class SheetRow:
    """A row of the sheet; `exclude` is its reason, and `why` the kind of reason, which the summary counts."""

    slide_id: str
    patient_id: str
    label: str
    path: Path
    split: str
    site: str
    exclude: str = ""
    why: str = ""


@dataclass
class Labels:
    """The lines of all tables: by the slide's name, and by patient in tables that name no slide."""

    tables: list[LabelTable]
    of_slide: dict[str, list[LabelRow]] = field(default_factory=lambda: defaultdict(list))
    of_patient: dict[str, list[LabelRow]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for table in self.tables:
            for row in table.rows:
                if row.slide:
                    self.of_slide[slide_key(row.slide)].append(row)
                elif row.patient:
                    self.of_patient[row.patient].append(row)

    def lines_of(self, key: str) -> list[LabelRow]:
        """The lines of the slide of that name; of a TCGA slide also where they lack the part after the first dot."""
        return self.of_slide.get(key) or (self.of_slide.get(key.split(".")[0], []) if TCGA.match(key) else [])


@dataclass(frozen=True)
class Sheet:
    """A sheet and what to say about it: `notes` is (kind, names) of what is not in it or was changed on the way."""

    rows: list[SheetRow]
    found: Found
    tables: list[LabelTable]
    sample_types: Counter[str]
    notes: list[tuple[str, list[str]]]

    def summary(self, all_names: bool = False) -> str:
        """Counts by class, and every kind of slide that was excluded or left out, by number and name."""
        taking_part = [row for row in self.rows if not row.exclude]
        others = ", ".join(f"{suffix} {count}" for suffix, count in sorted(self.found.others.items()))
        lines = [f"{len(self.found.slides)} slides found" + (f"; other files: {others}" if others else "")]
        for table in self.tables:
            labels = f"labels from column {table.label_column!r}" if table.label_column else "no labels"
            lines.append(f"{table.path.name}: {len(table.rows)} lines, form {table.form}, {labels}")
        patients = {row.patient_id for row in taking_part}
        lines.append(f"{len(self.rows)} rows written, {len(taking_part)} slides of {len(patients)} patients take part:")
        for label, count in Counter(row.label for row in taking_part).most_common():
            of_label = {row.patient_id for row in taking_part if row.label == label}
            lines.append(f"{count:7}  {label} ({len(of_label)} patients)")
        excluded = defaultdict(list)
        for row in self.rows:
            if row.exclude:
                excluded[row.why].append(row.slide_id)
        if excluded:
            lines.append("Excluded, with the reason in the sheet:")
            lines += [_counted(why, names, all_names) for why, names in excluded.items()]
        if noted := [(kind, names) for kind, names in self.notes if names]:
            lines.append("To know:")
            lines += [_counted(kind, names, all_names) for kind, names in noted]
        if self.sample_types:
            types = (f"{code} ({SAMPLE_TYPES.get(code, 'other')}) {n}" for code, n in sorted(self.sample_types.items()))
            lines.append(f"TCGA sample types: {', '.join(types)}")
        return "\n".join(lines)


def _counted(kind: str, names: Sequence[str], all_names: bool) -> str:
    shown = names if all_names else names[:NAMED]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return f"{len(names):7}  {kind}: {', '.join(shown)}{more}"


def write_sheet(sheet: Sheet, output: Path) -> None:
    """Write the sheet as CSV; paths below its folder are relative to it, others absolute. Keeps a file that exists.

    Raises SheetError where `output` is there already.
    """
    if output.exists():
        raise SheetError(f"{output} is there already, perhaps edited: remove it, or choose another --output")
    table = pd.DataFrame([vars(row) for row in sheet.rows]).drop(columns="why")
    table["path"] = [_path_in_sheet(row.path, output) for row in sheet.rows]
    empty = [name for name in ("split", "site", "exclude") if not table[name].any()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with replace_when_whole(output) as part:
        table.drop(columns=empty).to_csv(part, index=False)


def _path_in_sheet(path: Path, sheet: Path) -> str:
    absolute, folder = Path(os.path.abspath(path)), Path(os.path.abspath(sheet.parent))  # noqa: PTH100 (keeps links)
    text = str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)
    return f"./{text}" if text[0].isspace() else text  # cells lose space at their ends


def build_sheet(
    folder: Path,
    tables: Iterable[Path],
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    mapping: Mapping[str, str] | None = None,
    frozen: bool = False,
) -> Sheet:
    """The sheet of the slides in `folder` (searched through, links followed once) with the labels of `tables`.

    form, columns: as in `read_label_table`. mapping: label of the tables -> class; with it, slides of other labels are
    excluded. frozen: frozen TCGA sections take part too.

    Raises SheetError for tables that cannot be read, that have no labels, or that fit no slide.
    """
    found = find_slides(folder)
    if not found.slides:
        others = ", ".join(f"{suffix} {count}" for suffix, count in found.others.items()) or "none"
        raise SheetError(f"{folder} holds no slide ({', '.join(SLIDE_SUFFIXES)}); other files: {others}")
    labels = Labels([read_label_table(path, form, columns) for path in tables])
    _check_columns(labels.tables, columns or {})

    copies = defaultdict(list)
    for path in sorted(found.slides, key=lambda path: -path.stat().st_size):  # an unfinished copy is the smaller one
        copies[slide_key(path.name)].append(path)
    kept = sorted(paths[0] for paths in copies.values())
    again = [path for paths in copies.values() for path in paths[1:]]
    ids = dict(zip([*kept, *again], safe_ids([path.name for path in [*kept, *again]]), strict=True))
    rows = [sheet_row(ids[path], path, labels, mapping or {}, frozen) for path in kept]
    row_of = {slide_key(row.path.name): row for row in rows}
    for path in again:
        first = row_of[slide_key(path.name)]
        reason = f"the same slide as {first.path} ({first.path.stat().st_size} bytes, this one {path.stat().st_size})"
        rows.append(replace(first, slide_id=ids[path], path=path, exclude=reason, why="second copy of a slide"))
    rows = exclude_torn_patients(rows)
    if all(row.exclude for row in rows):
        reasons = "\n".join(f"  {why}: {slide_id}" for why, slide_id in {row.why: row.slide_id for row in rows}.items())
        lines = [*labels.of_slide, *labels.of_patient]
        raise SheetError(
            f"none of the {len(rows)} slides takes part; the reasons, with a slide of each:\n{reasons}\nThe tables "
            f"name {', '.join(lines[:3])}: are they of these slides?"
        )
    return Sheet(rows, found, labels.tables, _sample_types(rows), _notes(rows, found, labels, mapping or {}))


def find_slides(folder: Path) -> Found:
    """Every slide below `folder`, by path, but for what `gmmamba predict` wrote there: heat maps are no slides.

    Links to folders are followed, each folder is entered once.
    """
    if not folder.is_dir():
        raise SheetError(f"{folder} is not a folder")
    slides, unfinished, others = [], [], Counter[str]()
    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in entered:  # a link back: a loop, or the same folder by another way
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        if PREPARATION in files or set(files) >= PREDICTED:
            if Path(parent) != folder:
                folders.clear()
                continue
            folders[:] = [name for name in folders if name not in ("slides", "tiles", "features", "logs")]
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            suffix = path.suffix.lower()
            if suffix in UNFINISHED or (suffix in SLIDE_SUFFIXES and not path.is_file()):
                unfinished.append(path)
            elif suffix in SLIDE_SUFFIXES and not name.startswith("._"):  # ._x.svs: what macOS leaves on other disks
                slides.append(path)
            else:
                others[suffix or "without suffix"] += 1
    return Found(sorted(slides), unfinished, others)


def slide_key(name: str) -> str:
    """By what slides and tables are matched: the file's name without folder and suffix, in one case and composition."""
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    return unicodedata.normalize("NFC", _stem(name)).strip().casefold()


def _stem(name: str) -> str:
    return next((name[: -len(suffix)] for suffix in NAME_SUFFIXES if name.lower().endswith(suffix)), name)


def safe_ids(names: Sequence[str]) -> list[str]:
    """A slide_id for each file name: without suffix, made of what `SAFE_ID` allows, and of its own in any case.

    Names that are safe as they are keep their id; of equal ones, the later get -2, -3 and so on.
    """
    ids: dict[int, str] = {}
    taken: set[str] = set()
    stems = [_stem(name) for name in names]
    for index in sorted(range(len(stems)), key=lambda i: SAFE_ID.fullmatch(stems[i]) is None):
        wanted = stems[index]
        if not SAFE_ID.fullmatch(wanted):
            plain = unicodedata.normalize("NFKD", wanted).encode("ascii", "ignore").decode()
            wanted = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-") or "slide"
        slide_id, number = wanted, 1
        while slide_id.casefold() in taken:
            number += 1
            slide_id = f"{wanted}-{number}"
        taken.add(slide_id.casefold())
        ids[index] = slide_id
    return [ids[index] for index in range(len(names))]


def sheet_row(slide_id: str, path: Path, labels: Labels, mapping: Mapping[str, str], frozen: bool) -> SheetRow:
    """The row of one slide, excluded with the reason where it cannot take part."""
    barcode = TCGA.match(path.name)
    lines = labels.lines_of(slide_key(path.name))
    normal = [line.tissue for line in lines if "normal" in line.tissue.casefold()]
    patients = _different(line.patient for line in lines) or ([barcode[1].upper()] if barcode else [])
    lines = lines + [line for patient in patients for line in labels.of_patient.get(patient, [])]
    given = _different(line.label for line in lines)
    classes = list(dict.fromkeys(mapping.get(label, "" if mapping else label) for label in given))
    splits = _different(line.split for line in lines) or [""]
    sites = _different(line.site for line in lines) or ([barcode[2].upper()] if barcode else [""])

    sample, section = (barcode[3], barcode[4]) if barcode and barcode[3] else ("", "")
    why = exclude = ""
    if section and section.upper() != "DX" and not frozen:
        exclude = f"not a diagnostic section but a frozen one ({section.upper()})"
        why = f"{exclude}; with --frozen it takes part"
    elif "10" <= sample <= "19":
        why = exclude = f"sample type {sample} is normal tissue"
    elif normal:
        why = exclude = f"{normal[0]!r} is normal tissue"
    elif not lines:
        why = exclude = f"no line in {' or '.join(table.path.name for table in labels.tables)}"
    elif not given:
        why = exclude = "no label in its line"
    elif len(classes) > 1:
        why, exclude = "two labels", f"two labels: {', '.join(given)}"
    elif not classes[0]:
        why = exclude = f"label {given[0]!r} is not mapped to a class"
    elif len(patients) != 1:
        why, exclude = "not one patient", f"not one patient: {', '.join(patients) or 'none given'}"
    elif len(splits) > 1:
        why, exclude = "two parts of the split", f"two parts of the split: {', '.join(splits)}"
    label = classes[0] if len(classes) == 1 else ""
    patient = patients[0] if patients else slide_id  # a sheet has one in every row
    return SheetRow(slide_id, patient, label, path, splits[0], sites[0], exclude, why)


def _different(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def exclude_torn_patients(rows: Sequence[SheetRow]) -> list[SheetRow]:
    """The same rows, those of patients whose slides have different labels excluded."""
    labels_of: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if not row.exclude:
            labels_of[row.patient_id].setdefault(row.label, row.slide_id)
    result = []
    for row in rows:
        labels = labels_of[row.patient_id]
        if not row.exclude and len(labels) > 1:
            both = ", ".join(f"{label} ({slide_id})" for label, slide_id in labels.items())
            reason = f"patient {row.patient_id} has two labels: {both}"
            row = replace(row, exclude=reason, why="patient with two labels")
        result.append(row)
    return result


def _check_columns(tables: Sequence[LabelTable], columns: Mapping[str, str]) -> None:
    found = "; ".join(f"{table.path}: {', '.join(map(repr, table.columns))}" for table in tables)
    for role, name in columns.items():
        if not any(name in table.columns for table in tables):
            raise SheetError(f"--{role}-column {name!r} is in no table; the columns of {found}")
    if not any(table.label_column for table in tables):
        raise SheetError(f"which column is the label? Name it with --label-column; the columns of {found}")


def _sample_types(rows: Sequence[SheetRow]) -> Counter[str]:
    barcodes = (TCGA.match(row.path.name) for row in rows if not row.exclude)
    return Counter(barcode[3] for barcode in barcodes if barcode and barcode[3])


def _notes(
    rows: Sequence[SheetRow], found: Found, labels: Labels, mapping: Mapping[str, str]
) -> list[tuple[str, list[str]]]:
    """What is not in the sheet, or other than in the folder and the tables: (kind, names) each."""
    seen = {id(line) for row in rows for line in labels.lines_of(slide_key(row.path.name))}
    patients = {row.patient_id for row in rows}
    missing = [lines[0].slide for lines in labels.of_slide.values() if not any(id(line) in seen for line in lines)]
    known = {line.label for table in labels.tables for line in table.rows if line.label}
    unused = [
        f"{label!r}" + (f" ({hint})" if (hint := nearest(label, known, otherwise="")) else "")
        for label in mapping
        if label not in known
    ]
    blank = [
        f"{t.path.name} line {row.line}" for t in labels.tables for row in t.rows if not (row.slide or row.patient)
    ]
    return [
        ("slide in a table but not in the folder", missing),
        ("patient in a table without a slide in the folder", [p for p in labels.of_patient if p not in patients]),
        ("slide in several lines of the tables", [ls[0].slide for ls in labels.of_slide.values() if len(ls) > 1]),
        ("line without slide and patient", blank),
        ("unfinished download, or link to nowhere", [str(path) for path in found.unfinished]),
        ("mapped label that no line has", unused),
        (
            "slide_id other than the file's name, which has unsafe characters",
            [f"{row.slide_id} ({row.path.name})" for row in rows if not SAFE_ID.fullmatch(_stem(row.path.name))],
        ),
    ]
