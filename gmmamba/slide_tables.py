"""The slide tables of a dataset's cohorts (gmmamba.accounting writes them), read together."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd


def read_slide_tables(slide_tables: Mapping[str, Path]) -> pd.DataFrame:
    """The slide tables of several cohorts as one, with a column `cohort`; every value a string, absent ones ""."""
    tables = [
        pd.read_csv(path, dtype=str, keep_default_na=False).assign(cohort=cohort)
        for cohort, path in slide_tables.items()
    ]
    return pd.concat(tables, ignore_index=True)
