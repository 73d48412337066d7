"""The CSV files that people bring: sheets, label tables, splits. Read as text, or refused in words."""

from pathlib import Path
from typing import cast

import pandas as pd

SPREADSHEETS = (".xlsx", ".xls", ".ods")


def read_csv(path: Path, error: type[ValueError]) -> pd.DataFrame:
    """Its cells as strings, stripped, absent ones "". The index is the line, counted from 1; blank lines are left out.

    Cells are parted by commas, semicolons (as Excel saves CSV in half of Europe) or tabs: what the first line has most.

    Raises `error` for what is no CSV in UTF-8, and for lines with more cells than there are columns; FileNotFoundError.
    """
    if path.suffix.lower() in SPREADSHEETS:
        raise error(f"{path} is a spreadsheet: save it as CSV (UTF-8) and give that")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
        table = pd.read_csv(
            path, sep=max(",;\t", key=header.count), dtype=str, keep_default_na=False, skip_blank_lines=False,
            encoding="utf-8-sig",
        )  # fmt: skip
    except UnicodeDecodeError as unreadable:
        raise error(f'{path} is not in UTF-8: save it again as "CSV UTF-8" ({unreadable})') from unreadable
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as unreadable:
        raise error(f"{path} is not a CSV file: {unreadable}") from unreadable
    if not isinstance(table.index, pd.RangeIndex):  # pandas then shifts the columns by one, without a word
        raise error(f"{path}: the lines have more cells than the first one has names; quote cells with commas")
    table.index += 2
    table = table.apply(lambda column: column.str.strip())
    return table[(table != "").any(axis=1)]


def rows_by_line(table: pd.DataFrame) -> dict[int, dict[str, str]]:
    """The rows of a table of `read_csv`: line -> column -> cell."""
    return cast(dict[int, dict[str, str]], table.to_dict("index"))
