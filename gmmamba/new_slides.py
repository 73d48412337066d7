"""New slides, to be predicted: which there are in a folder, or in a sheet without labels. Files are not opened."""

from __future__ import annotations

from pathlib import Path

from gmmamba.cohort import SAFE_ID, Slide, mask_problem, mpp_of, reason_to_exclude
from gmmamba.csv_files import SPREADSHEETS, read_csv, rows_by_line
from gmmamba.sheets import SLIDE_SUFFIXES, find_slides, safe_ids
from slidestore import StoreError


class SlidesError(StoreError):
    """Slides that cannot be listed or prepared; the message names what, and the remedy."""


class NoSlidesError(SlidesError):
    """A folder in which there is no slide."""


def list_slides(source: Path, mpp: float | None = None) -> list[Slide]:
    """The slides to predict: of a slide's file, a folder (searched through; folders of .dcm files are slides), or a
    sheet.

    A sheet is a CSV with the column `path`, relative to it, and optional `slide_id, label, mpp, magnification, mask,
    exclude` as in a cohort's. Raises SlidesError for a source without slides and for a sheet with errors, all of them
    named by line. mpp: of level 0, in µm per pixel, for slides whose row gives none.
    """
    if source.suffix.lower() in (".csv", ".tsv", *SPREADSHEETS):
        return _of_sheet(source, mpp)
    if not source.exists():
        raise SlidesError(f"{source} does not exist: give a slide, a folder of slides, or a sheet (.csv)")
    if source.is_dir():
        dicom = sorted({path.parent for path in source.rglob("*.dcm")})
        paths = sorted([*find_slides(source).slides, *dicom])
    else:
        paths = [source]
    if not paths:
        raise NoSlidesError(f"{source} holds no slide ({', '.join(SLIDE_SUFFIXES)}, or folders of .dcm files)")
    ids = safe_ids([path.name for path in paths])
    source_of_mpp = None if mpp is None else "config"
    return [
        Slide(name, name, "", path, mpp=mpp, mpp_source=source_of_mpp) for name, path in zip(ids, paths, strict=True)
    ]


def _of_sheet(sheet: Path, general_mpp: float | None) -> list[Slide]:
    try:
        table = read_csv(sheet, SlidesError)
    except FileNotFoundError as error:
        raise SlidesError(f"{sheet} does not exist") from error
    if "path" not in table:
        raise SlidesError(f"{sheet} has no column 'path', but {', '.join(map(str, table.columns))}")
    rows = {line: row for line, row in rows_by_line(table).items() if not reason_to_exclude(row.get("exclude", ""))}
    ids = safe_ids([Path(row["path"]).name for row in rows.values()])
    slides: dict[str, Slide] = {}
    problems = []
    for (line, row), from_name in zip(rows.items(), ids, strict=True):
        slide_id, place = row.get("slide_id") or from_name, f"line {line}"
        path, mask = sheet.parent / row["path"], sheet.parent / row["mask"] if row.get("mask") else None
        try:
            mpp, source = mpp_of(row, general_mpp)
        except ValueError as error:
            problems.append(f"{place}: slide {slide_id}: {error}")
            mpp = source = None
        if not row["path"] or not path.exists():
            problems.append(f"{place}: slide {slide_id}: no such file: {path} (mend the path, or fill 'exclude')")
        if not SAFE_ID.fullmatch(slide_id):
            problems.append(f"{place}: slide_id {slide_id!r} must be made of letters, digits, '.', '_' and '-'")
        if slide_id in slides:
            problems.append(f"{place}: slide_id {slide_id!r} stands in line {slides[slide_id].line} already")
        if mask and (problem := mask_problem(mask)):
            problems.append(f"{place}: slide {slide_id}: {problem}")
        slides[slide_id] = Slide(slide_id, slide_id, row.get("label", ""), path, line, mpp, source, mask=mask)
    if not rows:
        problems.append("it lists no slide")
    if problems:
        raise SlidesError(f"{sheet} cannot be used: {'; '.join(problems)}")
    return list(slides.values())
