"""95 % intervals of pooled scores from a bootstrap over patients, and corrections for many comparisons.

Scores that end at 1 (accuracy, F1, AUROC, ...) get Wilson's score interval for as many observations as the bootstrap
says they are worth, n = v(1 - v) / variance. For the accuracy of one slide a patient that is Wilson's interval itself;
several slides of a patient, and seeds, are worth what they vary.

Why not the bootstrap's percentiles: they are too narrow near 1. A new study would find errors that this one, and so
every resample of it, does not have; an AUROC of 1 would get the interval 1 to 1, by BCa, too. For 40 patients and a
true AUROC of 0.95 percentiles cover it in 85 to 90 of 100 studies. Two more corrections keep it at 95 ± 2 there,
by simulation (benchmarks/coverage.py; docs/statistics.md has the table): the variance is shrunk by the weight of half a
patient towards that of independent patients, and the quantile is Student's, with the degrees
of freedom that Welch and Satterthwaite give samples of as many patients as each class has.

Brier score and log loss have no such end: symmetric on the log scale, v·exp(± q·sd / v). That of the
ECE, which ends at 1, on the logit scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t

from gmmamba.scores import LOSSES

LEVEL = 0.95
PRIOR = 0.5  # patients that count with the variance of independent ones, beside those that were bootstrapped


def interval(name: str, value: float, samples: np.ndarray, patients: Mapping[str, int]) -> tuple[float, float]:
    """The 95 % interval of the pooled score `name`; nan where the score or its spread is undefined.

    samples: (B,), the score in bootstrap samples of patients, nan where it is undefined in a sample; patients: the
    number of patients of each class, in the order of the classes.
    """
    defined, total = samples[np.isfinite(samples)], sum(patients.values())
    counts = patients_behind(name, patients)
    shares = 1 / np.maximum(np.array(counts, np.float64), 1)
    if not np.isfinite(value) or len(defined) < len(samples) / 2 or total < 2:
        return np.nan, np.nan
    freedom = shares.sum() ** 2 / (shares**2 / np.maximum(1 / shares - 1, 1)).sum()  # Welch and Satterthwaite
    quantile, variance = float(t.ppf((1 + LEVEL) / 2, freedom)), float(defined.var(ddof=1))
    if name == "ece":
        if not 0 < value < 1:
            return np.nan, np.nan
        spread = quantile * np.sqrt(variance) / (value * (1 - value))
        return float(expit(logit(value) - spread)), float(expit(logit(value) + spread))
    if name in LOSSES:
        factor = np.exp(quantile * np.sqrt(variance) / value) if value > 0 else np.nan
        return value / factor, value * factor
    # For an AUROC near 1 this is what Hanley and McNeil's variance (1982) says, but for 1/2 patient.
    worth = len(counts) ** 2 / shares.sum()
    shrunk = (value * total + PRIOR / 2) / (total + PRIOR)
    variance = (variance * total + PRIOR * shrunk * (1 - shrunk) / worth) / (total + PRIOR)
    return wilson(value, value * (1 - value) / variance if 0 < value < 1 else worth, quantile)


def wilson(value: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a share `value` of `n` observations, n > 0."""
    square = quantile**2 / n
    middle = (value + square / 2) / (1 + square)
    half = np.sqrt(value * (1 - value) * square + square**2 / 4) / (1 + square)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def patients_behind(name: str, patients: Mapping[str, int]) -> list[int]:
    """The patients that a score rests on: all, those of one class, or of each class where it needs every one."""
    classes, total = list(patients), sum(patients.values())
    kind, _, of = name.rstrip("]").partition("[")
    of = of or (classes[1] if len(classes) == 2 else "")
    if kind in ("accuracy", *LOSSES):
        return [total]
    if of and kind in ("f1", "f1_positive", "sensitivity"):
        return [patients[of]]
    if of and kind == "specificity":
        return [total - patients[of]]
    if of and kind in ("auroc", "auprc"):
        return [patients[of], total - patients[of]]
    return list(patients.values())


def holm(p: Sequence[float]) -> np.ndarray:
    """P values corrected for all that stand together (Holm 1979), in their order; nan stays nan and does not count."""
    values = np.asarray(p, np.float64)
    corrected = np.full(len(values), np.nan)
    order = np.argsort(values)[: np.isfinite(values).sum()]
    scaled = values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected
