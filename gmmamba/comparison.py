"""Experiments on the same test slides: pooled metrics, and bootstrap intervals of their differences.

S test slides, C classes. Reads the predictions.csv of runs; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from gmmamba.evaluation import probabilities_of, read_predictions

SAMPLES = 2000
Pooled = list[tuple[np.ndarray, np.ndarray]]  # for each seed: true classes (S,) and probabilities (S, C)


def read_test(files: Sequence[Path]) -> pd.DataFrame:
    """The test slides of the runs of an experiment, seed by seed, in an order that experiments share."""
    table = pd.concat(read_predictions(file) for file in files)
    return table[table["part"] == "test"].sort_values(["seed", "fold", "slide_id"], ignore_index=True)


def check_same_slides(tables: dict[str, pd.DataFrame]) -> None:
    """Raise ValueError unless all experiments tested the same slides in the same folds and seeds."""
    keys = ["seed", "fold", "cohort", "slide_id"]
    (first, reference), *others = tables.items()
    for name, table in others:
        if not table[keys].equals(reference[keys]):
            raise ValueError(f"{first} and {name} tested other slides, folds or seeds: predict both anew")


def pooled(table: pd.DataFrame, classes: list[str]) -> Pooled:
    """The test slides of all folds, as each is tested once a seed (in repeated random splits, once a draw)."""
    return [probabilities_of(of_seed, classes) for _, of_seed in table.groupby("seed")]


def values(pools: Pooled, chosen: np.ndarray) -> np.ndarray:
    """AUROC (macro), accuracy and log loss of the chosen slides, each the mean over seeds; NaN without a class."""
    rows = []
    for true, probabilities in pools:
        y, P = true[chosen], probabilities[chosen]
        classes = range(P.shape[1] - 1, 0 if P.shape[1] == 2 else -1, -1)
        whole = len(np.unique(y)) == P.shape[1]
        auroc = np.mean([roc_auc_score(y == c, P[:, c]) for c in classes]) if whole else np.nan
        rows.append([auroc, np.mean(P.argmax(1) == y), -np.log(P[np.arange(len(y)), y]).mean()])
    return np.mean(rows, axis=0)


def bootstrap_samples(table: pd.DataFrame, samples: int = SAMPLES) -> list[np.ndarray]:
    """Indices of slides, of as many patients as there are, drawn with replacement: the same for every experiment."""
    patients = table[table["seed"] == table["seed"].min()]["patient_id"].to_numpy()
    slides_of = {patient: np.flatnonzero(patients == patient) for patient in np.unique(patients)}
    rng = np.random.default_rng(0)
    return [np.concatenate([slides_of[p] for p in rng.choice(list(slides_of), len(slides_of))]) for _ in range(samples)]


def sampled_values(pools: Pooled, samples: Sequence[np.ndarray]) -> np.ndarray:
    """`values` of each sample, (samples, 3)."""
    return np.array([values(pools, sample) for sample in samples])


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the differences that are defined."""
    low, high = np.nanquantile(differences, [0.025, 0.975])
    return float(low), float(high)
