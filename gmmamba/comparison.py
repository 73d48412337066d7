"""Experiments on the same test slides: pooled metrics, and bootstrap intervals of their differences.

S test slides, C classes. Reads the predictions.csv of runs; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

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


def values(pools: Pooled, weights: np.ndarray) -> np.ndarray:
    """AUROC (macro), accuracy and log loss, each the mean over seeds, for each row of weights (B, S): (B, 3). NaN where
    a class has no weight."""
    total, rows = weights.sum(1), []
    for true, P in pools:
        classes = range(P.shape[1] - 1, 0 if P.shape[1] == 2 else -1, -1)
        auroc = np.mean([weighted_auroc(true == c, P[:, c], weights) for c in classes], axis=0)
        loss = -np.log(P[np.arange(len(true)), true])
        rows.append([auroc, weights @ (P.argmax(1) == true) / total, weights @ loss / total])
    return np.mean(rows, axis=0).T


def weighted_auroc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share of pairs of a positive and another slide in which the positive has the higher score, ties half.

    positive: (S,) bool; scores: (S,); weights: (B, S), how often each slide counts. One value for each row, (B,).
    """
    ours, others = scores[positive][:, None], scores[~positive]
    ahead = (ours > others) + (ours == others) / 2
    W, V = weights[:, positive], weights[:, ~positive]
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: no such pair
        return np.asarray(((W @ ahead) * V).sum(1) / (W.sum(1) * V.sum(1)))


def bootstrap_samples(table: pd.DataFrame, samples: int = SAMPLES) -> np.ndarray:
    """How often each slide counts (samples, S) where as many patients as there are are drawn with replacement: the same
    for every experiment."""
    patients = table.loc[table["seed"] == table["seed"].min(), "patient_id"]
    owner, names = pd.factorize(patients, sort=True)
    drawn = np.random.default_rng(0).integers(len(names), size=(samples, len(names)))
    counts = np.stack([np.bincount(draw, minlength=len(names)) for draw in drawn])
    return counts[:, owner].astype(np.float64)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the differences that are defined."""
    low, high = np.nanquantile(differences, [0.025, 0.975])
    return float(low), float(high)
