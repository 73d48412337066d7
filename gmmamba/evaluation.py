"""evaluate: the metrics of one experiment, from the predictions of all its folds and seeds.

Reads predictions.csv of each fold and seed; writes metrics.csv: `fold, seed, n` (test slides) and the metrics of
`gmmamba.metrics`, one row a run, then the rows fold = mean and fold = sd over the runs (sd with n - 1).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gmmamba.metrics import METRICS, classification_metrics
from slidestore.atomic import replace_when_whole


def read_predictions(path: Path) -> pd.DataFrame:
    """A predictions.csv; names are strings even where they look like numbers, probabilities bit for bit."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    probabilities = [name for name in table.columns if name.startswith("prob_")]
    return table.astype({"fold": int, "seed": int} | dict.fromkeys(probabilities, float))  # exact, unlike read_csv's


def probabilities_of(predictions: pd.DataFrame, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The true class indices (S,) and the probabilities (S, C) in the order of `classes`."""
    true = np.array([classes.index(name) for name in predictions["true"]])
    return true, predictions[[f"prob_{name}" for name in classes]].to_numpy(np.float64)


def evaluate(predictions: Sequence[Path], classes: list[str], output: Path) -> None:
    """Write metrics.csv of one experiment to `output`; only test slides count."""
    rows = []
    for path in predictions:
        table = read_predictions(path)
        test = table[table["part"] == "test"]
        metrics = classification_metrics(*probabilities_of(test, classes))
        rows.append({"fold": test["fold"].iloc[0], "seed": test["seed"].iloc[0], "n": len(test), **metrics})
    runs = pd.DataFrame(rows).sort_values(["fold", "seed"]).astype({"fold": str, "seed": str, "n": str})
    values = runs[list(METRICS)]
    # skipna would quietly average over fewer folds than the table says.
    mean, sd = values.mean(skipna=False), values.std(ddof=1, skipna=False)
    summary = pd.DataFrame([{"fold": "mean", **mean}, {"fold": "sd", **sd}])
    with replace_when_whole(output) as part:
        pd.concat([runs, summary]).to_csv(part, index=False)
