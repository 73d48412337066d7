"""compare: every two experiments of a dataset on the same test slides.

Reads the predictions.csv of their runs; writes comparisons.csv, one row a pair, level and score:

    first, second, level (slide or patient), metric, difference (first - second), low, high (95 %), p, p_holm, test

test = bootstrap: the middle 95 % of the differences in bootstrap samples of patients, the same samples for both, and
the p value at whose level that interval would reach 0. test = delong, for AUROC besides: see gmmamba.delong. p_holm
corrects for all pairs of the same level, metric and test. Pools and scores are those of gmmamba.evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gmmamba.delong import auroc_parts, delong_difference
from gmmamba.evaluation import (
    LEVELS,
    Evaluation,
    EvaluationError,
    Units,
    bootstrap_counts,
    evaluation_of,
    patients_of,
    pooled_scores,
    pools,
    read_predictions,
    run_units,
)
from gmmamba.intervals import holm
from gmmamba.scores import OVERALL
from slidestore.atomic import replace_when_whole

COLUMNS = ["first", "second", "level", "metric", "difference", "low", "high", "p", "p_holm", "test"]
Runs = dict[str, list[pd.DataFrame]]  # by experiment: the predictions.csv of each run, in an order that all share


def read_runs(files: Mapping[str, Sequence[Path]]) -> Runs:
    """The runs of several experiments. EvaluationError unless all tested the same slides, folds and seeds."""
    runs = {name: [read_predictions(path) for path in paths] for name, paths in files.items()}
    for tables in runs.values():
        tables.sort(key=lambda table: (table["fold"].iloc[0], table["seed"].iloc[0]))
    (first, reference), *others = ((name, _tested(tables)) for name, tables in runs.items())
    for name, tested in others:
        if not tested.equals(reference):
            raise EvaluationError(f"{first} and {name} tested other slides, folds or seeds: predict both anew")
    return runs


def _tested(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    keys = ["fold", "seed", "cohort", "slide_id", "patient_id", "true"]
    table = pd.concat(tables)
    return table.loc[table["part"] == "test", keys].sort_values(keys, ignore_index=True)


def runs_in(folder: Path, experiments: Sequence[str], only: Sequence[str] = ()) -> dict[str, list[Path]]:
    """The predictions.csv of experiments of a dataset's folder: of the runs named in `only`, such as fold0_seed0, else
    of all runs that each of them has, and that the folder's report.json names where it is there (others are left from a
    configuration that had more folds or seeds). FileNotFoundError where there are none."""
    found = {
        name: {path.parent.name: path for path in sorted((folder / name).glob("fold*_seed*/predictions.csv"))}
        for name in experiments
    }
    for name, paths in found.items():
        for missing in sorted(set(only) - set(paths)):
            raise FileNotFoundError(f"{folder / name / missing / 'predictions.csv'} does not exist: run it first")
        if not paths:
            raise FileNotFoundError(f"{folder / name} has no fold*_seed*/predictions.csv: run the experiment first")
    made_of = _report_of(folder)
    current = [f"fold{fold}_seed{seed}" for fold in made_of.get("folds", ()) for seed in made_of.get("seeds", ())]
    shared = [
        run
        for run in next(iter(found.values()))
        if all(run in paths for paths in found.values()) and (not current or run in current)
    ]
    if not (wanted := list(only) or shared):
        raise FileNotFoundError(f"{', '.join(experiments)} have no fold and seed in common: run one of them for more")
    return {name: [paths[run] for run in wanted] for name, paths in found.items()}


def _report_of(folder: Path) -> dict[str, Any]:
    """What the report of a dataset was made of; empty where there is none yet."""
    manifest = folder / "report.json"
    return json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}


def evaluation_in(folder: Path) -> tuple[Evaluation, str]:
    """How a dataset's folder was evaluated, by its report.json, and a sentence that says so; the defaults where there
    is no report yet, or one that does not say."""
    made_of, manifest = _report_of(folder), folder / "report.json"
    if "evaluation" in made_of:
        found, where = evaluation_of(made_of["evaluation"]), f"as {manifest} has it"
    else:
        found, where = Evaluation(), f"the default, as {manifest} does not say: --settings for another"
    return found, f"evaluation: threshold {found.threshold}, patients {found.patient} ({where})"


def classes_of(table: pd.DataFrame) -> list[str]:
    """The classes of a predictions.csv, in their order."""
    return [name.removeprefix("prob_") for name in table.columns if name.startswith("prob_")]


def pooled_runs(runs: Runs, classes: list[str], settings: Evaluation, level: str) -> dict[str, list[Units]]:
    """The pools of each experiment."""
    return {
        name: pools([run_units(table, classes, settings, level) for table in tables]) for name, tables in runs.items()
    }


def compare_pairs(
    pooled: Mapping[str, list[Units]], classes: list[str], pairs: Sequence[tuple[str, str]]
) -> pd.DataFrame:
    """The rows of comparisons.csv of these pairs of experiments and one level, but for `level`."""
    whole = {name: pooled_scores(units, classes) for name, units in pooled.items()}
    counts = bootstrap_counts(len(patients_of(next(iter(pooled.values())))))
    sampled = {name: pooled_scores(units, classes, counts) for name, units in pooled.items()}
    parts = {name: auroc_parts(units, len(classes)) for name, units in pooled.items()}
    rows: list[tuple[object, ...]] = []
    for first, second in pairs:
        for metric in OVERALL:
            difference = float(whole[first][metric][0] - whole[second][metric][0])
            if np.isfinite(difference):
                low, high, p = bootstrap_difference(sampled[first][metric] - sampled[second][metric])
                rows.append((first, second, metric, difference, low, high, p, "bootstrap"))
        if np.isfinite(parts[first][0]):
            rows.append((first, second, "auroc", *delong_difference(parts[first], parts[second]), "delong"))
    table = pd.DataFrame(rows, columns=[c for c in COLUMNS if c not in ("level", "p_holm")])
    table["p_holm"] = table.groupby(["metric", "test"])["p"].transform(lambda p: holm(list(p)))
    return table


def bootstrap_difference(differences: np.ndarray) -> tuple[float, float, float]:
    """The middle 95 % of the differences that are defined, and the two-sided p value of no difference."""
    defined = differences[np.isfinite(differences)]
    low, high = np.quantile(defined, [0.025, 0.975])
    tail = min((defined <= 0).sum(), (defined >= 0).sum()) + 1  # + 1: this study is a sample, too
    return float(low), float(high), min(1.0, 2 * float(tail) / (len(defined) + 1))


def compare(files: Mapping[str, Sequence[Path]], settings: Evaluation, output: Path) -> None:
    """Write comparisons.csv of these experiments (name -> the predictions.csv of its runs) to `output`."""
    table = pd.DataFrame(columns=COLUMNS)
    if len(files) > 1:
        runs, pairs = read_runs(files), list(combinations(files, 2))
        classes = classes_of(next(iter(runs.values()))[0])
        table = pd.concat(
            compare_pairs(pooled_runs(runs, classes, settings, level), classes, pairs).assign(level=level)
            for level in LEVELS
        )
    with replace_when_whole(output) as part:
        table[COLUMNS].to_csv(part, index=False)


def comparison_page(files: Mapping[str, Sequence[Path]], settings: Evaluation) -> str:
    """A Markdown table of experiments, the first of which the others are compared with, on the level of slides.

    AUROC over folds is the mean ± sd of the test folds of all seeds; the other columns are those of pools.
    """
    runs = read_runs(files)
    reference, *others = files
    classes = classes_of(runs[reference][0])
    pooled = pooled_runs(runs, classes, settings, "slide")
    table = compare_pairs(pooled, classes, [(name, reference) for name in others])
    bootstrapped = {
        (row["first"], row["metric"]): row for row in table.to_dict("records") if row["test"] == "bootstrap"
    }

    def difference(name: str, metric: str) -> str:
        row = bootstrapped.get((name, metric))
        return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if row else ""

    header = ["experiment", "runs", "AUROC over folds", "AUROC", "accuracy", "log loss", "difference in AUROC",
              "difference in log loss", "p of the AUROC (DeLong, Holm)"]  # fmt: skip
    rows = []
    for name, units in pooled.items():
        each = [pooled_scores([run_units(run, classes, settings, "slide")], classes)["auroc"][0] for run in runs[name]]
        values = pooled_scores(units, classes)
        p = table.loc[(table["first"] == name) & (table["test"] == "delong"), "p_holm"]
        rows.append([
            name, str(len(each)), f"{np.mean(each):.3f} ± {np.std(each, ddof=1) if len(each) > 1 else np.nan:.3f}",
            *(f"{values[of][0]:.3f}" for of in ("auroc", "accuracy", "log_loss")),
            difference(name, "auroc"), difference(name, "log_loss"),
            "".join("–" if np.isnan(value) else f"{value:.3g}" for value in p),
        ])  # fmt: skip
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
