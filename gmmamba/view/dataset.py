"""The slides of a finished dataset as the viewer lists them: what each is, what was predicted, where its files are.

Reads report.json in results/{dataset} (which files the report was made of), the slide tables, the slide sheets, the
metrics.csv of every experiment (thresholds) and the predictions.csv of every run. Relative paths are relative to the
folder that holds `results`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmmamba.cohort import Slide, read_sheet
from gmmamba.evaluation import read_predictions
from gmmamba.report_runs import called_above, check_finished, read_metrics, thresholds
from gmmamba.slide_tables import read_slide_tables


@dataclass(frozen=True)
class Tested:
    """What one run (an experiment's fold and seed) predicted of a slide of its test part; probabilities by class.

    called: the class, by the threshold of the run, as in the report and in metrics.csv.
    """

    experiment: str
    fold: int
    seed: int
    called: str
    probabilities: dict[str, float]
    attention: Path  # attention.npz of the run


@dataclass(frozen=True)
class ListedSlide:
    """A slide of the dataset. `path` is its file as the sheet says, None where the sheet names none any more.

    status: ready, failed or excluded; reason: why it took no part; store: its features, None unless it is ready;
    outlines: GeoJSON of its tissue, which imported features do not have; foci: foci.csv beside the sheet, where known.
    """

    slide_id: str
    patient_id: str
    cohort: str
    label: str
    status: str
    reason: str
    path: Path | None
    store: Path | None
    outlines: Path
    foci: Path
    tested: tuple[Tested, ...]

    def no_picture(self) -> str:
        """Why there is no picture of the slide; empty where its file is there."""
        if self.path is None:
            return f"its sheet (cohort {self.cohort}) names no file for it"
        return "" if self.path.exists() else f"no such file: {self.path}"


@dataclass(frozen=True)
class ViewedDataset:
    """groups: (cohort, grouping) -> npz. experiments: name -> grouping or None, in the report's order."""

    name: str
    classes: list[str]
    experiments: dict[str, str | None]
    groups: dict[tuple[str, str], Path]
    slides: dict[str, ListedSlide]


def read_dataset(folder: Path) -> ViewedDataset:
    """The dataset whose results are in `folder`. Raises FileNotFoundError unless its report is finished."""
    check_finished(folder)
    folder = folder.resolve()
    manifest = folder / "report.json"
    made_of = json.loads(manifest.read_text(encoding="utf-8"))
    project = folder.parent.parent
    tested = read_tested(folder, made_of)
    sheets = {cohort: project / path for cohort, path in made_of["sheets"].items()}
    rows = {cohort: sheet_rows(sheet, cohort) for cohort, sheet in sheets.items()}
    tables = {cohort: project / path for cohort, path in made_of["slide_tables"].items()}
    slides = {}
    for row in read_slide_tables(tables).to_dict("records"):
        slide_id, cohort = row["slide_id"], row["cohort"]
        listed = rows[cohort].get(slide_id)
        slides[slide_id] = ListedSlide(
            slide_id, row["patient_id"], cohort, row["label"], row["status"], row["reason"],
            path=project / listed.path if listed else None,
            store=project / row["store"] if row["status"] == "ready" else None,
            outlines=project / Path(row["thumbnail"]).with_name(f"{slide_id}.geojson"),
            foci=sheets[cohort].with_name("foci.csv"),
            tested=tuple(tested.get(slide_id, ())),
        )  # fmt: skip
    groups = {(cohort, grouping): project / path for cohort, grouping, path in made_of["groups"]}
    return ViewedDataset(made_of["dataset"], made_of["classes"], made_of["experiments"], groups, slides)


def sheet_rows(sheet: Path, cohort: str) -> dict[str, Slide]:
    """The sheet's rows that have a path. A sheet that is gone has none; its problems are not the viewer's."""
    slides, _ = read_sheet(sheet, cohort, need_files=False)
    return {slide_id: slide for slide_id, slide in slides.items() if slide.path.name != "no path in the sheet"}


def read_tested(folder: Path, made_of: dict[str, Any]) -> dict[str, list[Tested]]:
    """What every run predicted of its test slides, by slide, in the order of experiments, folds and seeds."""
    tested: dict[str, list[Tested]] = {}
    for experiment in made_of["experiments"]:
        chosen = thresholds(read_metrics(folder / experiment))
        for fold in made_of["folds"]:
            for seed in made_of["seeds"]:
                run = folder / experiment / f"fold{fold}_seed{seed}"
                table = read_predictions(run / "predictions.csv")
                test = table[table["part"] == "test"]
                calls = called_above(test, chosen[fold, seed], made_of["classes"])
                for row, call in zip(test.to_dict("records"), calls, strict=True):
                    probabilities = {name: row[f"prob_{name}"] for name in made_of["classes"]}
                    tested.setdefault(row["slide_id"], []).append(
                        Tested(experiment, fold, seed, made_of["classes"][call], probabilities, run / "attention.npz")
                    )
    return tested
