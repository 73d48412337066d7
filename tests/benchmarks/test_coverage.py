"""The simulation behind docs/statistics.md: its AUROCs are the pipeline's, its truth is true, its intervals hold."""

import numpy as np
import pytest

from benchmarks.coverage import DESIGNS, coverage, distance, draw, weighted_aurocs
from gmmamba.evaluation import bootstrap_counts
from gmmamba.scores import ranking_scores


@pytest.mark.parametrize("name", DESIGNS)
def test_simulated_studies_have_the_auroc_that_is_to_be_held(name: str) -> None:
    design, rng = DESIGNS[name], np.random.default_rng(0)
    positive = np.arange(2000) < 600
    scores = draw(design, positive, distance(design, 0.9), rng)
    assert scores.shape == (design.seeds, 2000, design.slides)
    counts = np.r_[np.ones((1, 2000)), bootstrap_counts(2000, 3)]
    for of_seed in scores:
        values = weighted_aurocs(of_seed, positive, counts)
        assert values[0] == pytest.approx(0.9, abs=0.015)
        weights = counts.repeat(design.slides, axis=1)
        expected = ranking_scores(positive.repeat(design.slides), of_seed.ravel(), weights)[0]
        assert values == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("n", [40, 200])
@pytest.mark.parametrize("name", DESIGNS)
def test_95_percent_intervals_hold_95_percent(name: str, n: int) -> None:
    for auroc in (0.7, 0.95):
        held, percentile = coverage(DESIGNS[name], n, 0.5, auroc, studies=2000, seed=1)
        assert held == pytest.approx(0.95, abs=0.03)  # 0.02, and what 2000 studies leave to chance
        assert held > percentile
