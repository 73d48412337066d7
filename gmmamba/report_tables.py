"""The tables of the report: accounting, splits, scores with intervals, comparisons, calls."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gmmamba.metrics import METRICS
from gmmamba.report_runs import Run, called, of_runs, pooled_predictions, read_metrics
from gmmamba.split_files import PARTS

METRIC_NAMES = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "f1_positive": "F1",
    "macro_f1": "Macro-F1",
    "balanced_accuracy": "Balanced accuracy",
    "auprc": "AUPRC",
}  # in the order of the paper's tables, which have the first three
MORE_NAMES = {
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "brier": "Brier score ↓",
    "log_loss": "Log loss ↓",
    "ece": "ECE ↓",
    "f1": "F1",
}
WORST_ROWS = 50
COUNTS = ("in_sheet", "excluded", "failed", "not_tested", "predicted")


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


def score_table(experiments: Sequence[Mapping[str, Any]], results: Path) -> pd.DataFrame:
    """table.csv: of each metric and experiment, mean and sd over the runs, and the pooled value with its interval."""
    rows = []
    for experiment in experiments:
        folder = results / str(experiment["name"])
        metrics = read_metrics(folder).set_index("fold")
        pooled = read_pooled(folder, "slide")
        row = {
            "experiment": experiment["name"],
            "method": experiment["method"],
            "runs": int((~metrics.index.isin(["mean", "sd"])).sum()),
        }
        for name in METRICS:
            row |= {f"{name}_mean": metrics.at["mean", name], f"{name}_sd": metrics.at["sd", name]}
            row |= {f"{name}_{key}": pooled.at[name, column] for key, column in
                    (("pooled", "value"), ("low", "low"), ("high", "high"))}  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def read_pooled(folder: Path, level: str) -> pd.DataFrame:
    """pooled.csv of an experiment's folder, of one level (slide or patient): `value, low, high, n` by metric."""
    table = pd.read_csv(folder / "pooled.csv")
    return table[table["level"] == level].set_index("metric").drop(columns="level")


def format_scores(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of the result table: "0.912 ± 0.034" a metric, with the best of each column marked, and the pooled
    value with its interval."""
    rows: list[dict[str, Any]] = []
    best = {name: f"{scores[f'{name}_mean'].max():.3f}" for name in METRICS}
    for row in scores.to_dict("records"):
        cells = {}
        for name in METRICS:
            mean, sd = f"{row[f'{name}_mean']:.3f}", row[f"{name}_sd"]
            cells[name] = {
                "text": mean if np.isnan(sd) else f"{mean} ± {sd:.3f}",
                "best": mean == best[name],
                "pooled": with_interval(row[f"{name}_pooled"], row[f"{name}_low"], row[f"{name}_high"]),
            }
        rows.append({"experiment": row["experiment"], "method": row["method"], "cells": cells})
    return rows


def with_interval(value: float, low: float, high: float) -> dict[str, str]:
    """`value` and `interval`; dashes for what is undefined."""
    return {
        "value": "–" if np.isnan(value) else f"{value:.3f}",
        "interval": "–" if np.isnan(low) else f"[{low:.3f}, {high:.3f}]",
    }


def pooled_rows(names: Sequence[str], results: Path, level: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The pooled values of experiments with their intervals: `experiment, n, cells` (in the order of `metrics`)."""
    rows = []
    for name in names:
        table = read_pooled(results / name, level)
        cells = [with_interval(*table.loc[metric, ["value", "low", "high"]]) for metric in metrics]
        rows.append({"experiment": name, "n": int(table["n"].max()), "cells": cells})
    return rows


def shown_metrics(scores: pd.DataFrame, n_classes: int) -> dict[str, str]:
    """The metrics of the result table with their names: those of the paper's tables first. F1 is of the positive class
    of two, else the mean over classes."""
    other_f1 = "macro_f1" if n_classes == 2 else "f1_positive"
    return {m: name for m, name in METRIC_NAMES.items() if m != other_f1 and not scores[f"{m}_mean"].isna().all()}


def further_metrics(pooled: pd.DataFrame, shown: Collection[str], n_classes: int) -> tuple[list[str], list[str]]:
    """The metrics of pooled.csv that the result table does not have: of all classes, and of single ones."""
    found = [name for name in pooled.index[pooled["value"].notna()] if name not in shown]
    of_class = [name for name in found if "[" in name]
    if n_classes == 2:  # sensitivity and specificity of either are those of the other, and in the first list
        of_class = [name for name in of_class if name.startswith("f1[")]
    return [name for name in found if "[" not in name], of_class


def full_name(metric: str) -> str:
    """Of a metric, or of one of a class, such as f1[tumour]."""
    kind, _, of = metric.rstrip("]").partition("[")
    name = MORE_NAMES.get(kind) or METRIC_NAMES.get(kind, kind)
    return f"{name} of {of}" if of else name


def comparison_rows(comparisons: pd.DataFrame) -> list[dict[str, Any]]:
    """The differences in AUROC of every two experiments, each with its interval, test and p value.

    Of the tests of a pair the one for AUROC (DeLong's) where it has a p value. comparisons: comparisons.csv.
    """
    found = comparisons[(comparisons["metric"] == "auroc") & (comparisons["level"] == "slide")]
    found = found.iloc[np.argsort((found["test"] != "delong") | found["p"].isna(), kind="stable")]
    found = found.drop_duplicates(["first", "second"]).sort_index()
    return [
        {
            "first": row["first"],
            "second": row["second"],
            "difference": f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            "p": p_value(row["p"]),
            "p_holm": p_value(row["p_holm"]),
            "told_apart": bool(row["p_holm"] < 0.05),
            "test": {"delong": "DeLong", "bootstrap": "bootstrap"}[row["test"]],
        }
        for row in found.to_dict("records")
    ]


def p_value(p: float) -> str:
    if np.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def run_rows(experiments: Sequence[Mapping[str, Any]], results: Path) -> list[dict[str, Any]]:
    """metrics.csv of every run, with the experiment's name."""
    return [
        {"experiment": e["name"], **{str(key): value for key, value in row.items()}}
        for e in experiments
        for row in of_runs(read_metrics(results / str(e["name"]))).to_dict("records")
    ]


def confusion(runs: Sequence[Run], metrics: pd.DataFrame, classes: list[str]) -> list[dict[str, Any]]:
    """A row a true class: `name`, `n` and, for each class, how many are called so, `count` and `share` of the row."""
    true, _ = pooled_predictions(runs, classes)
    calls = called(runs, metrics, classes)
    rows = []
    for c, name in enumerate(classes):
        counts = np.bincount(calls[true == c], minlength=len(classes))
        n = int(counts.sum())
        cells = [{"count": int(count), "share": float(count / n) if n else 0.0} for count in counts]
        rows.append({"name": name, "n": n, "cells": cells})
    return rows


def wrong_calls(
    runs: Mapping[str, Sequence[Run]], metrics: Mapping[str, pd.DataFrame], classes: list[str]
) -> pd.DataFrame:
    """The test slides that some run calls wrong: `slide_id, patient_id, true, folds`, P(true class) of each experiment
    (the mean over its runs) and `mean`, over experiments; the most wrong first."""
    columns, wrong = {}, pd.Series(dtype=bool)
    facts = pd.DataFrame()
    for name, of_experiment in runs.items():
        table = pd.concat([run.test.assign(fold=run.fold) for run in of_experiment], ignore_index=True)
        true, P = pooled_predictions(of_experiment, classes)
        table["right"] = P[np.arange(len(true)), true]
        table["wrong"] = called(of_experiment, metrics[name], classes) != true
        by = table.groupby("slide_id", sort=True)
        columns[name] = by["right"].mean()
        wrong = by["wrong"].any() if wrong.empty else wrong | by["wrong"].any()
        folds = by["fold"].unique().map(lambda folds: ", ".join(map(str, sorted(folds))))
        facts = by[["patient_id", "true"]].first().assign(folds=folds)
    right = pd.DataFrame(columns)
    found = facts.join(right).assign(mean=right.mean(axis=1))[wrong]
    return found.sort_values("mean", kind="stable").reset_index()
