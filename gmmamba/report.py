"""report: one page that shows what ran on a dataset and what came out, and the tables behind it.

Reads the slide tables, splits.csv, and of every experiment metrics.csv and, of each run, history.csv, model.json,
predictions.csv and attention.npz; thumbnails, stores and groups of the example slides. Writes

report.html     self-contained: pictures are embedded, nothing is fetched
table.csv       one row an experiment: `experiment, method, runs`, <metric>_mean and <metric>_sd each
accounting.csv  one row a cohort: `dataset, cohort, in_sheet, excluded, failed, not_tested, predicted`, where
                in_sheet = excluded + failed + not_tested + predicted; not_tested are ready slides that no test part
                holds (none for a k-fold)
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from gmmamba import __version__, figures
from gmmamba.evaluation import probabilities_of, read_predictions
from gmmamba.metrics import METRICS
from gmmamba.slide_tables import read_slide_tables
from gmmamba.splits import PARTS
from slidestore import open_store
from slidestore.atomic import replace_when_whole
from slidestore.groups import read_groups
from slidestore.settings import from_dict

METRIC_NAMES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro-F1",
    "f1_positive": "F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
}
COUNTS = ("in_sheet", "excluded", "failed", "not_tested", "predicted")
PACKAGES = ("numpy", "scikit-learn", "pandas", "zarr")


@dataclass(frozen=True)
class ReportSettings:
    title: str = "Whole-slide classification"
    example_slides: int = 3


@dataclass(frozen=True)
class Run:
    """One fold and seed of an experiment: its folder, its test predictions and what was kept."""

    folder: Path
    fold: int
    seed: int
    test: pd.DataFrame
    history: pd.DataFrame
    card: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A test slide to be shown: where it comes from and why it was chosen."""

    slide_id: str
    fold: int
    seed: int
    why: str


def report(
    dataset: str,
    experiments: Sequence[Mapping[str, Any]],
    folds: Sequence[int],
    seeds: Sequence[int],
    classes: list[str],
    encoder: Mapping[str, Any],
    slide_tables: Mapping[str, Path],
    splits: Path,
    groups: Mapping[tuple[str, str], Path],
    results: Path,
    settings: Mapping[str, Any],
    output: Path,
    table: Path,
    accounting: Path,
    config: Mapping[str, Any],
) -> None:
    """Write report.html (`output`), table.csv (`table`) and accounting.csv (`accounting`); see the module.

    experiments: as training was given them, in the order of the table's rows. encoder: name, model, weights, ...
    slide_tables: cohort -> CSV. groups: (cohort, grouping) -> npz. results: the dataset's folder, which holds
    {experiment}/fold{fold}_seed{seed}/. config: what else the page shows as the resolved
    configuration, besides encoder and experiments; all of it JSON values.

    Raises ValueError where predictions are missing for a slide of a test part.
    """
    chosen = from_dict(ReportSettings, settings, "report")
    slides = read_slide_tables(slide_tables)
    parts = pd.read_csv(splits, dtype=str, keep_default_na=False)
    runs = {str(e["name"]): read_runs(results / str(e["name"]), folds, seeds) for e in experiments}
    check_complete(runs, parts)

    counts = count_slides(dataset, slides, parts, folds)
    times_tested = (parts[[f"fold{fold}" for fold in folds]] == "test").sum(axis=1)
    scores = score_table(experiments, results)
    page = _template().render(
        title=chosen.title,
        dataset=dataset,
        classes=classes,
        encoder=encoder,
        patients=parts["patient_id"].nunique(),
        folds=folds,
        seeds=seeds,
        counts=counts.to_dict("records"),
        total={name: int(counts[name].sum()) for name in COUNTS},
        lost=slides[slides["status"] != "ready"].to_dict("records"),
        tested_again=int((times_tested > 1).sum()),
        split_rows=describe_splits(parts, folds, classes),
        metrics={m: name for m, name in METRIC_NAMES.items() if not scores[f"{m}_mean"].isna().all()},
        scores=format_scores(scores),
        per_run=[
            {"experiment": e["name"], **row}
            for e in experiments
            for row in _read_metrics(results / str(e["name"])).to_dict("records")
            if row["fold"] not in ("mean", "sd")
        ],
        roc=roc_figures(runs, classes),
        examples=example_rows(experiments, runs, classes, slides, groups, chosen.example_slides),
        training=[
            (name, figures.training_figure(name, [r.history for r in rs], [r.card["best_epoch"] for r in rs],
                                           figures.colour_of(i)))
            for i, (name, rs) in enumerate(runs.items())
        ],
        kept={name: [run.card["best_epoch"] for run in rs] for name, rs in runs.items()},
        config=json.dumps({"encoder": encoder, **config, "experiments": experiments}, indent=2),
        versions={"python": platform.python_version(), "gmmamba": __version__} | {p: version(p) for p in PACKAGES},
        trained_on=sorted({f"{r.card['device']}, torch {r.card['torch_version']}" for rs in runs.values() for r in rs}),
    )  # fmt: skip
    with replace_when_whole(table) as part:
        scores.to_csv(part, index=False)
    with replace_when_whole(accounting) as part:
        counts.to_csv(part, index=False)
    with replace_when_whole(output) as part:
        part.write_text(page, encoding="utf-8")


def read_runs(folder: Path, folds: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    runs = []
    for fold in folds:
        for seed in seeds:
            run = folder / f"fold{fold}_seed{seed}"
            predictions = read_predictions(run / "predictions.csv")
            card = json.loads((run / "model.json").read_text())
            test = predictions[predictions["part"] == "test"].reset_index(drop=True)
            runs.append(Run(run, fold, seed, test, pd.read_csv(run / "history.csv"), card))
    return runs


def check_complete(runs: Mapping[str, Sequence[Run]], parts: pd.DataFrame) -> None:
    """Raise ValueError unless every run predicts exactly the slides of its fold's test part."""
    for experiment_runs in runs.values():
        for run in experiment_runs:
            expected = set(parts.loc[parts[f"fold{run.fold}"] == "test", "slide_id"])
            if differing := sorted(expected ^ set(run.test["slide_id"])):
                raise ValueError(
                    f"{run.folder / 'predictions.csv'} and the test part of fold {run.fold} differ in "
                    f"{len(differing)} slides (first: {differing[0]}): predict this run anew"
                )


def count_slides(dataset: str, slides: pd.DataFrame, parts: pd.DataFrame, folds: Sequence[int]) -> pd.DataFrame:
    """accounting.csv: what became of the slides of each cohort's sheet."""
    tested = parts[(parts[[f"fold{fold}" for fold in folds]] == "test").any(axis=1)]
    rows = []
    for cohort, members in slides.groupby("cohort", sort=False):
        status = members["status"].value_counts()
        predicted = int((tested["cohort"] == cohort).sum())
        rows.append(
            {
                "dataset": dataset,
                "cohort": cohort,
                "in_sheet": len(members),
                "excluded": int(status.get("excluded", 0)),
                "failed": int(status.get("failed", 0)),
                "not_tested": int(status.get("ready", 0)) - predicted,
                "predicted": predicted,
            }
        )
    return pd.DataFrame(rows)


def _read_metrics(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv", dtype={"fold": str, "seed": str})


def score_table(experiments: Sequence[Mapping[str, Any]], results: Path) -> pd.DataFrame:
    """table.csv: mean and sd of each metric over the runs of each experiment."""
    rows = []
    for experiment in experiments:
        metrics = _read_metrics(results / str(experiment["name"])).set_index("fold")
        row = {
            "experiment": experiment["name"],
            "method": experiment["method"],
            "runs": int((~metrics.index.isin(["mean", "sd"])).sum()),
        }
        for name in METRICS:
            row |= {f"{name}_mean": metrics.at["mean", name], f"{name}_sd": metrics.at["sd", name]}
        rows.append(row)
    return pd.DataFrame(rows)


def format_scores(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of the result table: "0.912 ± 0.034" a metric, with the best of each column marked."""
    rows: list[dict[str, Any]] = []
    best = {name: f"{scores[f'{name}_mean'].max():.3f}" for name in METRICS}
    for row in scores.to_dict("records"):
        cells = {}
        for name in METRICS:
            mean, sd = f"{row[f'{name}_mean']:.3f}", row[f"{name}_sd"]
            cells[name] = {"text": mean if np.isnan(sd) else f"{mean} ± {sd:.3f}", "best": mean == best[name]}
        rows.append({"experiment": row["experiment"], "method": row["method"], "cells": cells})
    return rows


def describe_splits(parts: pd.DataFrame, folds: Sequence[int], classes: list[str]) -> list[dict[str, Any]]:
    """Slides and patients of every part and class, a row a fold; and the cohorts tested, where not all are."""
    rows = []
    for fold in folds:
        cells = []
        for part in PARTS:
            for name in classes:
                members = parts[(parts[f"fold{fold}"] == part) & (parts["label"] == name)]
                cells.append({"slides": len(members), "patients": members["patient_id"].nunique()})
        tested = parts.loc[parts[f"fold{fold}"] == "test", "cohort"].unique().tolist()
        some = set(tested) < set(parts["cohort"])
        rows.append({"fold": fold, "cells": cells, "cohorts": tested if some else []})
    return rows


def roc_figures(runs: Mapping[str, Sequence[Run]], classes: list[str]) -> list[tuple[str, str]]:
    """(experiment, picture) each."""
    curves = {
        name: np.stack([figures.roc_on_grid(*probabilities_of(run.test, classes)) for run in rs])
        for name, rs in runs.items()
    }
    means = {name: curve.mean(axis=0) for name, curve in curves.items()}
    return [
        (name, figures.roc_figure(name, curve, [m for n, m in means.items() if n != name], figures.colour_of(i)))
        for i, (name, curve) in enumerate(curves.items())
    ]


def choose_examples(runs: Sequence[Run], classes: list[str], wanted: int) -> list[Example]:
    """Test slides worth seeing, of the runs of one experiment, the same ones every time.

    In turn: the most confident correct slide of each class (the positive one first), then the most confident error,
    then the second of each, until there are `wanted` different ones. Each slide counts in its first run only.
    """
    tables = [run.test.assign(fold=run.fold, seed=run.seed) for run in runs]
    table = pd.concat(tables).drop_duplicates("slide_id")
    table["confidence"] = table[[f"prob_{name}" for name in classes]].max(axis=1)
    table = table.sort_values(["confidence", "slide_id"], ascending=[False, True])
    correct = table["true"] == table["predicted"]
    queues = [(f"confident and right: {name}", table[correct & (table["true"] == name)]) for name in classes[::-1]]
    queues.append(("confident and wrong", table[~correct]))
    found = []
    for turn in range(len(table)):
        for why, queue in queues:
            if turn < len(queue):
                row = queue.iloc[turn]
                found.append(Example(row["slide_id"], int(row["fold"]), int(row["seed"]), why))
    return found[:wanted]


def example_rows(
    experiments: Sequence[Mapping[str, Any]],
    runs: Mapping[str, Sequence[Run]],
    classes: list[str],
    slides: pd.DataFrame,
    groups: Mapping[tuple[str, str], Path],
    wanted: int,
) -> list[dict[str, Any]]:
    """The example slides with their pictures: the slide, each grouping, each experiment's attention."""
    attentive = [e for e in experiments if looks_somewhere(runs[e["name"]][0])]
    if not attentive:
        return []
    by_id = slides[slides["status"] == "ready"].set_index("slide_id")
    shown = {label: classes[1] if len(classes) == 2 else label for label in classes}  # whose probability, by label
    read = cache(read_groups)  # a file has the groups of all slides of its cohort
    rows = []
    for example in choose_examples(runs[attentive[0]["name"]], classes, wanted):
        slide: dict[Any, str] = by_id.loc[example.slide_id].to_dict()
        store = open_store(Path(slide["store"]))
        attributes = store.attributes
        assert attributes.patch_px_level0 is not None, "a ready slide has patches"
        assert attributes.level0_width is not None, "a ready slide has a size"
        drawn = figures.SlidePictures(
            Path(slide["thumbnail"]), store.coords, attributes.patch_px_level0, attributes.level0_width
        )
        name = example.slide_id
        pictures = [
            {"uri": figures.jpeg(drawn.plain), "caption": "slide", "note": slide["label"], "alt": f"Slide {name}"}
        ]
        for grouping in dict.fromkeys(e["grouping"] for e in attentive if e["grouping"]):
            _, labels = read(groups[slide["cohort"], grouping])[example.slide_id]
            note = f"{len(np.unique(labels))}, {grouping}"
            alt = f"The groups of patches of slide {name}"
            pictures.append({"uri": figures.jpeg(drawn.groups(labels)), "caption": "groups", "note": note, "alt": alt})
        for experiment in attentive:
            run = next(r for r in runs[experiment["name"]] if (r.fold, r.seed) == (example.fold, example.seed))
            attention = np.load(run.folder / "attention.npz")[example.slide_id]
            predicted = run.test.set_index("slide_id").loc[example.slide_id]
            of = shown[slide["label"]]
            pictures.append(
                {
                    "uri": figures.jpeg(drawn.attention(attention)),
                    "caption": experiment["name"],
                    "note": f"P({of}) = {predicted[f'prob_{of}']:.2f}",
                    "alt": f"Attention of {experiment['name']} on slide {name}, called {predicted['predicted']}",
                }
            )
        rows.append(
            {
                "slide_id": example.slide_id,
                "label": slide["label"],
                "why": example.why,
                "by": attentive[0]["name"],
                "fold": example.fold,
                "n_patches": len(store.coords),
                "pictures": pictures,
            }
        )
    return rows


def looks_somewhere(run: Run) -> bool:
    """Whether a model prefers patches at all: mean pooling gives each the same, which is no picture."""
    with np.load(run.folder / "attention.npz") as attention:
        return any(np.ptp(attention[slide_id]) > 0 for slide_id in attention.files)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def summary(folder: Path) -> None:
    """Print the result table and the accounting of a dataset's folder, and where its report is."""
    scores = pd.read_csv(folder / "table.csv")
    counts = pd.read_csv(folder / "accounting.csv")
    shown = [name for name in METRICS if not scores[f"{name}_mean"].isna().all()]
    table = pd.DataFrame(
        {METRIC_NAMES[name]: [row["cells"][name]["text"] for row in format_scores(scores)] for name in shown},
        index=list(scores["experiment"]),
    )
    print(f"Test slides, mean ± sd over {scores['runs'].max()} runs:\n{table.to_string()}\n")
    print(f"Slides:\n{counts.to_string(index=False)}\n")
    print(f"Report: {folder / 'report.html'}")
