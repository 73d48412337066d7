"""evaluate: how well one experiment does on its test slides, run by run and pooled, for slides and for patients.

Reads predictions.csv of each fold and seed. Writes

metrics.csv  a row a run: `fold, seed, n` (test slides), the scores of `gmmamba.scores`, `threshold`; then the same of
             patients: `patients` (how many), patient_<score>, patient_threshold. After the runs the rows fold = mean
             and fold = sd over them (sd with n - 1)
pooled.csv   `level` (slide or patient), `metric, value, low, high` (95 %), `n`: the slides or patients tested

A pool is the test units of all folds of a seed; where every fold tests the same slides, those of one fold. A pooled
value is the mean over pools. Its interval comes from drawing as many patients as there are with replacement, each with
all its slides, in all pools: slides of a patient, and seeds, are no further evidence. docs/statistics.md has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from gmmamba.intervals import interval
from gmmamba.scores import score_names, scores
from slidestore.atomic import replace_when_whole
from slidestore.settings import from_dict

SAMPLES = 5000  # of the bootstrap
BLOCK = 2_000_000  # weights at a time: memory
LEVELS = ("slide", "patient")
Threshold = Literal["argmax", "youden", "f1"]
PatientRule = Literal["mean", "geometric_mean", "max"]


class EvaluationError(ValueError):
    """Predictions that cannot be evaluated as asked; the message names the run or the setting, and the remedy."""


@dataclass(frozen=True)
class Evaluation:
    """How probabilities become calls, and slides become patients.

    threshold  of P(positive), above which a unit is called positive, chosen on each run's validation part: argmax is
               0.5 and, as the only one for more than two classes, the most probable class; youden has the highest
               sensitivity + specificity; f1 the highest F1 of the positive class
    patient    a patient's probabilities from those of the slides: mean; geometric_mean (of each class, scaled to sum
               1); max of the positive class, of more than two classes of each, scaled to sum 1

    Raises EvaluationError for other values.
    """

    threshold: Threshold = "argmax"
    patient: PatientRule = "mean"

    def __post_init__(self) -> None:
        for name, kind in (("threshold", Threshold), ("patient", PatientRule)):
            if (value := getattr(self, name)) not in (known := get_args(kind)):
                raise EvaluationError(f"evaluation.{name}: {value!r} is none of {', '.join(known)}")


def evaluation_of(settings: Any) -> Evaluation:
    """From `evaluation` of the configuration, parsed. Raises EvaluationError for unknown keys and values."""
    if not isinstance(settings, Mapping):
        raise EvaluationError(f'evaluation: {settings!r} is no mapping such as {{"threshold": "youden"}}')
    try:
        return from_dict(Evaluation, settings, "evaluation")
    except EvaluationError:
        raise
    except ValueError as error:
        raise EvaluationError(str(error)) from error


@dataclass(frozen=True)
class Units:
    """Tested slides or patients: names and the patient of each (S,), true and called class indices (S,), probabilities
    (S, C); the threshold is nan for more than two classes."""

    fold: int
    seed: int
    names: np.ndarray
    patients: np.ndarray
    true: np.ndarray
    probabilities: np.ndarray
    called: np.ndarray
    threshold: float


def read_predictions(path: Path) -> pd.DataFrame:
    """A predictions.csv; names are strings even where they look like numbers, probabilities bit for bit."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    probabilities = [name for name in table.columns if name.startswith("prob_")]
    return table.astype({"fold": int, "seed": int} | dict.fromkeys(probabilities, float))  # exact, unlike read_csv's


def probabilities_of(predictions: pd.DataFrame, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The true class indices (S,) and the probabilities (S, C) in the order of `classes`."""
    true = np.array([classes.index(name) for name in predictions["true"]], dtype=int)
    return true, predictions[[f"prob_{name}" for name in classes]].to_numpy(np.float64)


def run_units(run: pd.DataFrame, classes: list[str], settings: Evaluation, level: str) -> Units:
    """The test units of one run, a predictions.csv; the threshold comes from its validation units of the same level.

    Raises EvaluationError where a threshold is asked for that the validation part cannot give.
    """
    if level == "patient":
        run = patient_rows(run, classes, settings.patient)
    test = run[run["part"] == "test"]
    true, P = probabilities_of(test, classes)
    fold, seed = int(test["fold"].iloc[0]), int(test["seed"].iloc[0])
    called, threshold = P.argmax(1), 0.5 if len(classes) == 2 else np.nan
    if settings.threshold != "argmax":
        held, held_P = probabilities_of(run[run["part"] == "val"], classes)
        if len(classes) != 2 or set(held) != {0, 1}:
            raise EvaluationError(
                f"fold {fold}, seed {seed}: a threshold by {settings.threshold} needs two classes, and validation "
                f"slides of both: set evaluation.threshold: argmax, or mend the split"
            )
        threshold = choose_threshold(held == 1, held_P[:, 1], settings.threshold)
        called = (P[:, 1] > threshold).astype(int)
    patients = test["patient_id"].to_numpy()
    names = patients if level == "patient" else test["slide_id"].to_numpy()
    return Units(fold, seed, names, patients, true, P, called, threshold)


def patient_rows(run: pd.DataFrame, classes: list[str], rule: str) -> pd.DataFrame:
    """One row a patient and part, with the patient's probabilities: see `Evaluation`."""
    columns = [f"prob_{name}" for name in classes]
    by = run.groupby(["part", "patient_id"], sort=True)
    classes_of = by["true"].nunique()
    for _, patient in classes_of.index[classes_of > 1]:
        raise EvaluationError(f"patient {patient} has slides of two classes: a patient must have one label")
    if rule == "mean":
        P = by[columns].mean()
    elif rule == "geometric_mean":
        logs = run[columns].clip(lower=np.finfo(float).tiny).apply(np.log)  # of slides sure of 0 and of 1: 0.5
        P = logs.groupby([run["part"], run["patient_id"]], sort=True).mean().apply(np.exp)
    else:
        P = by[columns].max()
        if len(classes) == 2:
            P[columns[0]] = 1 - P[columns[1]]
    P = P.div(P.sum(axis=1), axis=0)
    return by[["true", "fold", "seed"]].first().join(P).reset_index()


def choose_threshold(positive: np.ndarray, probability: np.ndarray, rule: str) -> float:
    """The threshold that is best on these units: 0, 0.5, 1 or half-way between neighbouring probabilities; of several
    equally good ones the nearest to 0.5.

    positive: (S,) bool, of both kinds; probability: (S,). A unit is called positive above the threshold.
    """
    distinct = np.unique(probability)
    candidates = np.unique(np.r_[0.0, 0.5, 1.0, (distinct[1:] + distinct[:-1]) / 2])
    called = probability > candidates[:, None]
    hit, wrong = (called & positive).sum(1), (called & ~positive).sum(1)
    if rule == "youden":  # as integers, so that equally good ones are equal
        value = hit * (~positive).sum() - wrong * positive.sum()
    else:
        value = 2 * hit / (called.sum(1) + positive.sum())
    best = candidates[value == value.max()]
    return float(best[np.abs(best - 0.5).argmin()])


def pools(runs: Sequence[Units]) -> list[Units]:
    """The units of all folds of each seed together, or of each run where every fold of a seed tests the same slides."""
    found = []
    for _, group in groupby(sorted(runs, key=lambda run: (run.seed, run.fold)), key=lambda run: run.seed):
        of_seed = list(group)
        tested = {frozenset(run.names) for run in of_seed}
        found += [[run] for run in of_seed] if len(tested) == 1 else [of_seed]
    return [_together(parts) for parts in found]


def _together(parts: Sequence[Units]) -> Units:
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("names", "patients", "true", "probabilities", "called")
    }
    return replace(parts[0], threshold=np.nan, **joined)


def pooled_scores(
    pooled: Sequence[Units], classes: list[str], counts: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Each score, the mean over pools, for each row of `counts`: (B,). counts: (B, patients), how often each patient of
    `patients_of` counts; once each if not given (B = 1)."""
    if counts is None:
        counts = np.ones((1, len(patients_of(pooled))), np.uint16)
    owners = [np.searchsorted(patients_of(pooled), pool.patients) for pool in pooled]
    blocks = []
    widest = max(counts.shape[1], *(len(pool.names) for pool in pooled))
    for block in np.array_split(counts, -(-len(counts) * widest // BLOCK)):
        values = [
            scores(pool.true, pool.probabilities, pool.called, classes, block[:, owner])
            for pool, owner in zip(pooled, owners, strict=True)
        ]
        blocks.append({name: np.mean([of[name] for of in values], axis=0) for name in values[0]})
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def patients_of(pooled: Sequence[Units]) -> np.ndarray:
    """The names of all patients tested, sorted."""
    return np.unique(np.concatenate([pool.patients for pool in pooled]))


def bootstrap_counts(patients: int, samples: int = SAMPLES) -> np.ndarray:
    """How often each patient is drawn, (samples, patients), where as many are drawn as there are, with replacement: the
    same each time, and so for every experiment on these patients."""
    rng = np.random.default_rng(0)
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=samples).astype(np.uint16)


def pooled_table(pooled: Sequence[Units], classes: list[str]) -> pd.DataFrame:
    """pooled.csv of one level: `metric, value, low, high, n`."""
    values = pooled_scores(pooled, classes)
    samples = pooled_scores(pooled, classes, bootstrap_counts(len(patients_of(pooled))))
    labels = {patient: label for pool in pooled for patient, label in zip(pool.patients, pool.true, strict=True)}
    per_class = dict(zip(classes, np.bincount(list(labels.values()), minlength=len(classes)), strict=True))
    n = len(np.unique(np.concatenate([pool.names for pool in pooled])))
    rows = []
    for name in score_names(classes):
        value = float(values[name][0])
        low, high = interval(name, value, samples[name], per_class)
        rows.append({"metric": name, "value": value, "low": low, "high": high, "n": n})
    return pd.DataFrame(rows)


def evaluate(
    predictions: Sequence[Path], classes: list[str], settings: Evaluation, metrics: Path, pooled: Path
) -> None:
    """Write metrics.csv (`metrics`) and pooled.csv (`pooled`) of one experiment; only test slides count."""
    tables = [read_predictions(path) for path in predictions]
    units = {level: [run_units(table, classes, settings, level) for table in tables] for level in LEVELS}
    rows = []
    for slides, patients in zip(units["slide"], units["patient"], strict=True):
        row: dict[str, float] = {"fold": slides.fold, "seed": slides.seed, "n": len(slides.names)}
        row |= _scores_of(slides, classes) | {"threshold": slides.threshold, "patients": len(patients.names)}
        row |= {f"patient_{name}": value for name, value in _scores_of(patients, classes).items()}
        rows.append(row | {"patient_threshold": patients.threshold})
    counts = ["fold", "seed", "n", "patients"]
    runs = pd.DataFrame(rows).sort_values(["fold", "seed"])
    values = runs.drop(columns=counts)
    # skipna would quietly average over fewer folds than the table says.
    mean, sd = values.mean(skipna=False), values.std(ddof=1, skipna=False)
    summary = pd.DataFrame([{"fold": "mean", **mean}, {"fold": "sd", **sd}])
    together = pd.concat([pooled_table(pools(units[level]), classes).assign(level=level) for level in LEVELS])
    with replace_when_whole(metrics) as part:
        pd.concat([runs.astype(dict.fromkeys(counts, str)), summary]).to_csv(part, index=False)
    with replace_when_whole(pooled) as part:
        together[["level", "metric", "value", "low", "high", "n"]].to_csv(part, index=False)


def _scores_of(units: Units, classes: list[str]) -> dict[str, float]:
    values = scores(units.true, units.probabilities, units.called, classes)
    return {name: float(value[0]) for name, value in values.items()}
