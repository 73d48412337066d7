"""The variance of AUROCs and of their differences after DeLong et al. (1988), for patients with several slides.

Each slide's share in the AUROC is its placement: the share of the slides of the other kind that it is on the right side
of. DeLong's variance is that of the placements; here they are summed up by patient first (Obuchowski 1997), so that
slides of one patient count as one observation; with one slide a patient it is DeLong's own. The macro AUROC of more
than two classes, and the mean over pools (seeds), are means of AUROCs: placements are averaged patient by patient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, rankdata

from gmmamba.evaluation import Units, patients_of

ROUNDING = 1e-12  # far below what one pair of slides weighs


def auroc_parts(pooled: Sequence[Units], n_classes: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The AUROC, mean over pools and for more than two classes over classes; what each patient of `patients_of` adds to
    its error, (patients,) with sum 0; and the class of each, (patients,). nan where a pool lacks a class."""
    patients = patients_of(pooled)
    values, parts, labels = [], np.zeros(len(patients)), np.zeros(len(patients), int)
    ones = [1] if n_classes == 2 else range(n_classes)
    for pool in pooled:
        owner = np.searchsorted(patients, pool.patients)
        labels[owner] = pool.true
        for c in ones:
            positive, scores = pool.true == c, pool.probabilities[:, c]
            if positive.all() or not positive.any():
                return np.nan, np.full(len(patients), np.nan), labels
            placed = placements(positive, scores)
            value = placed[positive].mean()
            each = (placed - value) / np.where(positive, positive.sum(), (~positive).sum())
            parts += np.bincount(owner, each, len(patients)) / (len(pooled) * len(ones))
            values.append(value)
    return float(np.mean(values)), parts, labels


def placements(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(S,): of a positive the share of negatives below it, of a negative that of positives above it, ties half."""
    placed = np.empty(len(scores))
    overall = rankdata(scores)
    for kind in (positive, ~positive):
        share = (overall[kind] - rankdata(scores[kind])) / (~kind).sum()
        placed[kind] = share if kind is positive else 1 - share
    return placed


def delong_variance(parts: np.ndarray, labels: np.ndarray) -> float:
    """The variance of what has these parts: an AUROC, or a difference of two, whose parts are subtracted.

    For two classes each has its n / (n - 1), as in DeLong; for more, where a patient counts in both, all have one.
    """
    groups = [labels == label for label in np.unique(labels)]
    if len(groups) != 2:
        groups = [np.ones(len(labels), bool)]
    if min(map(np.sum, groups)) < 2:
        return np.nan
    return float(sum((parts[g] ** 2).sum() * g.sum() / (g.sum() - 1) for g in groups))


def delong_difference(
    first: tuple[float, np.ndarray, np.ndarray], second: tuple[float, np.ndarray, np.ndarray]
) -> tuple[float, float, float, float]:
    """AUROC of `first` minus that of `second` (each of `auroc_parts`, on the same patients), its 95 % interval, and the
    two-sided p value of no difference. Where every patient's part is the same, p is 1 if the AUROCs are, too; else, as
    for a perfect model and a constant one, the variance is no measure, and interval and p are nan."""
    difference = first[0] - second[0]
    sd = float(np.sqrt(delong_variance(first[1] - second[1], first[2])))
    half = norm.ppf(0.975) * sd
    if sd < ROUNDING:
        return (difference, np.nan, np.nan, np.nan) if abs(difference) > ROUNDING else (0.0, 0.0, 0.0, 1.0)
    return difference, difference - half, difference + half, float(2 * norm.sf(abs(difference) / sd))
