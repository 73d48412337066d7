"""Placeholder cohorts of the paper at full size: empty slide files and true labels, for checks that open no slide.

    python -m benchmarks.placeholders FOLDER --labels ../shared/data/labels [--cohorts bracs tcga-brca ...]

Each cohort becomes a project: FOLDER/{name}/ with config.yaml (a copy of config/{name}.yaml), the slide sheet made by
`gmmamba.sheets`, and slides/, laid out as they are downloaded.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from gmmamba.sheets import Sheet, build_sheet, write_sheet

CONFIGS = Path(__file__).parents[1] / "config"


@dataclass(frozen=True)
class Placeholder:
    """How a cohort is made: its label table, whose labels are which classes; no table: it is made up."""

    table: str | None
    mapping: Mapping[str, str] = field(default_factory=dict)


COHORTS = {
    "tcga-brca": Placeholder("tcga_brca_acmil.csv"),
    "tcga-esca": Placeholder(None, {"Squamous cell carcinoma, NOS": "SCC", "Adenocarcinoma, NOS": "ADC"}),
    "bracs": Placeholder(
        "bracs_acmil.csv",
        dict(zip("0123456", ["benign"] * 3 + ["atypical"] * 2 + ["malignant"] * 2, strict=True)),
    ),
    "tcga-lung": Placeholder("tcga_lung_slideflow.csv", {"adenocarcinoma": "LUAD", "squamous": "LUSC"}),
}


def make_cohort(folder: Path, name: str, labels: Path) -> Sheet:
    """Make the project of the cohort `name` (a key of `COHORTS`) in `folder`, and return its sheet.

    labels: the folder of the label tables. Writes config.yaml, {name}.csv and slides/ (as many empty files as the table
    has slides). The labels of tcga-esca are made up, in the paper's numbers: 90 SCC and 66 ADC, a slide a patient.
    """
    cohort = COHORTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if cohort.table is None:
        table = folder / "clinical.tsv"
        rows = [(f"TCGA-{i // 10:02d}-{i:04d}", list(cohort.mapping)[i >= 90]) for i in range(156)]
        pd.DataFrame(rows, columns=["case_submitter_id", "primary_diagnosis"]).to_csv(table, sep="\t", index=False)
        slides = [f"{i:08x}/{patient}-01Z-00-DX1.{i:08X}.svs" for i, (patient, _) in enumerate(rows)]
    else:
        table = labels / cohort.table
        slides = list(slide_files(pd.read_csv(table, dtype=str, keep_default_na=False)))
    for slide in slides:
        path = folder / "slides" / slide
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    sheet = build_sheet(folder / "slides", [table], mapping=cohort.mapping)
    write_sheet(sheet, folder / f"{name}.csv")
    shutil.copy(CONFIGS / f"{name}.yaml", folder / "config.yaml")
    return sheet


def slide_files(table: pd.DataFrame) -> Iterator[str]:
    """Where each slide of a table lies: in BRACS's own folders, or in one folder each as gdc-client leaves them."""
    for index, row in enumerate(table.to_dict("records")):
        if "full_path" in row:
            yield str(row["full_path"]).split("BRACS_WSI/")[1]
        else:
            yield f"{index:08x}/{row.get('slide', row.get('slide_id'))}.svs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", type=Path, required=True, help="folder of the label tables")
    parser.add_argument("--cohorts", nargs="+", choices=COHORTS, default=list(COHORTS))
    options = parser.parse_args()
    for name in options.cohorts:
        print(f"{name}\n{make_cohort(options.folder / name, name, options.labels).summary()}\n")


if __name__ == "__main__":
    main()
