"""Experiments of one dataset against a reference among them, on the same test slides.

    python -m benchmarks.compare results/tiles1 abmil max gmmamba

Prints a Markdown table, a row for each experiment; the first is the reference. The AUROC over folds is the mean ± sd of
the test folds of all seeds. The others pool the test slides of all folds, as each slide is tested once a seed, and
average over seeds; the differences come with 95 % intervals of 2000 bootstrap samples of patients, the same for both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from benchmarks.measure import markdown_table
from gmmamba.evaluation import probabilities_of, read_predictions
from gmmamba.metrics import classification_metrics

SAMPLES = 2000
Pooled = list[tuple[np.ndarray, np.ndarray]]  # for each seed: true classes (S,) and probabilities (S, C)


def read_test(folder: Path) -> pd.DataFrame:
    """The test slides of all folds and seeds of an experiment."""
    files = sorted(folder.glob("fold*_seed*/predictions.csv"))
    if not files:
        raise SystemExit(f"{folder} has no fold*_seed*/predictions.csv: run the experiment first")
    table = pd.concat(read_predictions(file) for file in files)
    return table[table["part"] == "test"].sort_values(["seed", "slide_id"])


def values(pooled: Pooled, chosen: np.ndarray) -> np.ndarray:
    """AUROC (macro), accuracy and log loss of the chosen slides, each the mean over seeds; NaN without a class."""
    rows = []
    for true, probabilities in pooled:
        y, P = true[chosen], probabilities[chosen]
        classes = range(P.shape[1] - 1, 0 if P.shape[1] == 2 else -1, -1)
        whole = len(np.unique(y)) == P.shape[1]
        auroc = np.mean([roc_auc_score(y == c, P[:, c]) for c in classes]) if whole else np.nan
        rows.append([auroc, np.mean(P.argmax(1) == y), -np.log(P[np.arange(len(y)), y]).mean()])
    return np.mean(rows, axis=0)


def compare(folder: Path, experiments: list[str]) -> str:
    tables = {name: read_test(folder / name) for name in experiments}
    reference = tables[experiments[0]]
    classes = [c.removeprefix("prob_") for c in reference.columns if c.startswith("prob_")]
    patients = reference[reference["seed"] == reference["seed"].min()]["patient_id"].to_numpy()
    slides_of = {patient: np.flatnonzero(patients == patient) for patient in np.unique(patients)}
    rng = np.random.default_rng(0)
    samples = [
        np.concatenate([slides_of[p] for p in rng.choice(list(slides_of), len(slides_of))]) for _ in range(SAMPLES)
    ]
    seeds = set.intersection(*(set(table["seed"]) for table in tables.values()))
    pooled = {
        name: [probabilities_of(t, classes) for seed, t in table.groupby("seed") if seed in seeds]
        for name, table in tables.items()
    }
    sampled = {name: np.array([values(p, sample) for sample in samples]) for name, p in pooled.items()}

    everything, rows = np.arange(len(patients)), []
    for name, table in tables.items():
        runs = [run for (_, seed), run in table.groupby(["fold", "seed"]) if seed in seeds]
        folds = [classification_metrics(*probabilities_of(run, classes))["auroc"] for run in runs]
        auroc, accuracy, loss = values(pooled[name], everything)
        row = [name, str(len(runs)), f"{np.mean(folds):.3f} ± {np.std(folds, ddof=1):.3f}"]
        row += [f"{auroc:.3f}", f"{accuracy:.3f}", f"{loss:.3f}"]
        for metric in (0, 2):
            difference = (auroc, accuracy, loss)[metric] - values(pooled[experiments[0]], everything)[metric]
            low, high = np.nanquantile((sampled[name] - sampled[experiments[0]])[:, metric], [0.025, 0.975])
            row.append("" if name == experiments[0] else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append(row)
    header = ["experiment", "runs", "AUROC over folds", "AUROC", "accuracy", "log loss"]
    return markdown_table([*header, "difference in AUROC", "difference in log loss"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="results/{dataset}")
    parser.add_argument("experiments", nargs="+", help="the first is the reference")
    options = parser.parse_args()
    print(compare(options.folder, options.experiments))


if __name__ == "__main__":
    main()
