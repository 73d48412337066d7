"""The runs of a dataset's experiments as the report reads them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gmmamba.evaluation import probabilities_of, read_predictions


@dataclass(frozen=True)
class Run:
    """One fold and seed of an experiment: its folder, its test predictions and what was kept."""

    folder: Path
    fold: int
    seed: int
    test: pd.DataFrame
    history: pd.DataFrame
    card: dict[str, Any]


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


def pooled_predictions(runs: Sequence[Run], classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """True class indices (S,) and probabilities (S, C) of the test slides of all runs."""
    return probabilities_of(pd.concat([run.test for run in runs]), classes)


def read_metrics(folder: Path) -> pd.DataFrame:
    """metrics.csv of an experiment's folder; the last rows are fold = mean and fold = sd."""
    return pd.read_csv(folder / "metrics.csv", dtype={"fold": str, "seed": str})


def of_runs(metrics: pd.DataFrame) -> pd.DataFrame:
    return metrics[~metrics["fold"].isin(["mean", "sd"])]


def called(runs: Sequence[Run], metrics: pd.DataFrame, classes: list[str]) -> np.ndarray:
    """Class indices (S,) that the test slides of all runs are called, by the threshold that each run's validation
    part chose (metrics.csv), in the order of `pooled_predictions`."""
    chosen = thresholds(metrics)
    return np.concatenate([called_above(run.test, chosen[run.fold, run.seed], classes) for run in runs])


def thresholds(metrics: pd.DataFrame) -> dict[tuple[int, int], float]:
    """The threshold of slides of each (fold, seed); nan for more than two classes."""
    rows = of_runs(metrics).to_dict("records")
    return {(int(row["fold"]), int(row["seed"])): float(row["threshold"]) for row in rows}


def called_above(predictions: pd.DataFrame, threshold: float, classes: list[str]) -> np.ndarray:
    """Class indices (S,) that slides are called by the threshold of their run; 0.5 and nan: the most probable class."""
    _, P = probabilities_of(predictions, classes)
    if len(classes) == 2 and threshold != 0.5:
        return (P[:, 1] > threshold).astype(int)
    return P.argmax(axis=1)


def check_finished(folder: Path) -> None:
    """FileNotFoundError where `folder` is not that of a dataset whose report is finished; it names those near it."""
    if (folder / "report.json").is_file():
        return
    near = [*folder.glob("*/report.json"), *folder.parent.glob("report.json"), *folder.parent.glob("*/report.json")]
    there = f": {', '.join(sorted(str(file.parent) for file in near))}" if near else ", such as results/demo"
    raise FileNotFoundError(
        f"{folder} has no report.json: give the folder of a dataset whose report is finished{there}"
    )
