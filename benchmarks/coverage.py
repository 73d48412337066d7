"""How often the 95 % interval of a pooled AUROC holds the true AUROC, in simulated studies.

    python -m benchmarks.coverage --write docs/statistics.md

A study has n patients, some with tumour; a slide's score is normal, of the same spread in both classes. Designs:

one slide          a slide a patient
folds and seeds    three slides a patient, whose scores correlate with 0.5 within the class; five folds whose models
                   score higher or lower than each other (shifts of -0.4 to 0.4 standard deviations; the AUROC to be
                   held is that of all ranked together); two seeds of each model, whose scores correlate with 0.8

Coverage is in %, of the interval of gmmamba.intervals and of plain percentiles of the same bootstrap samples.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import product, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from benchmarks.measure import markdown_table, write_section
from gmmamba.evaluation import bootstrap_counts
from gmmamba.intervals import interval

AUROCS = (0.7, 0.9, 0.95, 0.98)
SAMPLES = 400  # of the bootstrap; its variance is all that the interval takes from it


class Design(NamedTuple):
    """slides a patient, their correlation, the shift of each fold's scores, seeds and their correlation."""

    slides: int = 1
    within: float = 0.0
    shifts: tuple[float, ...] = (0.0,)
    seeds: int = 1
    between_seeds: float = 1.0


DESIGNS = {
    "one slide": Design(),
    "folds and seeds": Design(3, 0.5, (-0.4, -0.2, 0.0, 0.2, 0.4), 2, 0.8),
}


def distance(design: Design, auroc: float) -> float:
    """How far apart the classes' means must be for the pooled AUROC, in standard deviations."""
    differences = np.subtract.outer(design.shifts, design.shifts) / np.sqrt(2)
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if norm.cdf(middle / np.sqrt(2) + differences).mean() < auroc else (low, middle)
    return low


def draw(design: Design, positive: np.ndarray, apart: float, rng: np.random.Generator) -> np.ndarray:
    """Scores (seeds, n, slides) of one study of patients (n,) that are positive or not, the folds stratified."""
    n = len(positive)
    fold = np.empty(n, int)
    for kind in (positive, ~positive):
        fold[kind] = np.arange(kind.sum()) % len(design.shifts)
    shared = rng.normal(size=(n, 1)) * np.sqrt(design.within)
    patient_and_slide = shared + rng.normal(size=(n, design.slides)) * np.sqrt(1 - design.within)
    own = rng.normal(size=(design.seeds, n, design.slides))
    scores = np.sqrt(design.between_seeds) * patient_and_slide + np.sqrt(1 - design.between_seeds) * own
    return np.asarray(scores + (apart * positive + np.array(design.shifts)[fold])[:, None])


def weighted_aurocs(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B,): what gmmamba.scores.ranking_scores says for scores (n, slides) without ties and counts (B, n) of patients,
    faster, as all patients have as many slides."""
    ours, others, slides = scores[positive], scores[~positive], scores.shape[1]
    ahead = sum((ours[:, [i]] > others[:, j]).astype(float) for i in range(slides) for j in range(slides)) / slides**2
    W, V = counts[:, positive], counts[:, ~positive]
    with np.errstate(invalid="ignore"):
        return np.asarray(((W @ ahead) * V).sum(1) / (W.sum(1) * V.sum(1)))


def coverage(design: Design, n: int, share: float, auroc: float, studies: int, seed: int) -> tuple[float, float]:
    """The share of `studies` whose interval, and whose percentiles, hold `auroc`."""
    rng = np.random.default_rng(seed)
    positive = np.arange(n) < round(n * share)
    counts = np.r_[np.ones((1, n)), bootstrap_counts(n, SAMPLES)]
    apart, held = distance(design, auroc), np.zeros(2)
    patients = {"normal": int(n - positive.sum()), "tumour": int(positive.sum())}
    for _ in range(studies):
        scores = draw(design, positive, apart, rng)
        values = np.mean([weighted_aurocs(of_seed, positive, counts) for of_seed in scores], axis=0)
        low, high = interval("auroc", float(values[0]), values[1:], patients)
        below, above = np.nanquantile(values[1:], [0.025, 0.975])
        held += low <= auroc <= high, below <= auroc <= above
    return float(held[0]) / studies, float(held[1]) / studies


def row(n: int, name: str, share: float, studies: int) -> list[str]:
    """A row of the table; `share` of the patients has tumour."""
    found = [coverage(DESIGNS[name], n, share, auroc, studies, seed=n) for auroc in AUROCS]
    cells = [f"{100 * ours:.1f} ({100 * percentile:.1f})" for ours, percentile in found]
    return [str(n), name, f"{100 * share:.0f} %", *cells]


def table(studies: int) -> str:
    settings = list(product((40, 200), DESIGNS, (0.5, 0.25)))
    rows = []
    with ProcessPoolExecutor() as pool:
        for cells in pool.map(row, *zip(*settings, strict=True), repeat(studies)):
            rows.append(cells)
            print(*cells, sep="  ", flush=True)
    header = ["patients", "design", "with tumour", *(f"AUROC {auroc}" for auroc in AUROCS)]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--studies", type=int, default=1000, help="simulated for each cell")
    parser.add_argument("--write", type=Path, metavar="MD", help="put the table into this page")
    options = parser.parse_args()
    found = table(options.studies)
    if options.write:
        note = f"{options.studies} studies a cell, so ± {196 * np.sqrt(0.05 * 0.95 / options.studies):.1f} by chance."
        write_section(options.write, "coverage", f"{found}\n\n{note}")


if __name__ == "__main__":
    main()
