from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from gmmamba.comparison import weighted_auroc
from gmmamba.evaluation import evaluate
from gmmamba.metrics import METRICS, classification_metrics, selection_score

CLASSES = ["normal", "tumour"]


def test_binary_metrics_by_hand() -> None:
    # Positive scores .9 .4 against negative .6 .2 .1: 5 of 6 pairs in order; at 0.5: TP 1, FN 1, FP 1, TN 2.
    true = np.array([1, 1, 0, 0, 0])
    positive = np.array([0.9, 0.4, 0.6, 0.2, 0.1])
    metrics = classification_metrics(true, np.stack([1 - positive, positive], axis=1))
    assert tuple(metrics) == METRICS
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics["f1_positive"] == pytest.approx(2 / (2 + 1 + 1))
    assert metrics["macro_f1"] == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert metrics["auroc"] == pytest.approx(5 / 6)
    assert metrics["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)  # precision at each positive: 1/1, 2/3
    assert selection_score(metrics, 2) == pytest.approx(0.5 + 5 / 6)


def test_three_classes_by_hand() -> None:
    true = np.array([0, 1, 2, 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.2, 0.6, 0.2]])
    metrics = classification_metrics(true, probabilities)  # predicted 0, 0, 2, 1
    assert metrics["accuracy"] == pytest.approx(2 / 4)
    assert metrics["balanced_accuracy"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert np.isnan(metrics["f1_positive"])
    # One versus the rest: class 0 3 of 3 pairs, class 1 (.3 against .1 .2 .6) 2 of 3, class 2 3.5 of 4 (a tie).
    assert metrics["auroc"] == pytest.approx((1 + 2 / 3 + 3.5 / 4) / 3)
    assert selection_score(metrics, 3) == pytest.approx(metrics["auroc"] + metrics["macro_f1"])


@pytest.mark.filterwarnings("error")
def test_one_class_only_leaves_ranking_undefined() -> None:
    metrics = classification_metrics(np.array([0, 0]), np.array([[0.9, 0.1], [0.8, 0.2]]))
    assert metrics["accuracy"] == 1
    for name in ("balanced_accuracy", "auroc", "auprc", "f1_positive", "macro_f1"):
        assert np.isnan(metrics[name]), name


def predictions(path: Path, fold: int, positive: list[float]) -> Path:
    true = ["tumour", "normal", "tumour", "normal"]
    table = pd.DataFrame({"slide_id": list("abcd"), "patient_id": list("abcd"), "cohort": "x", "fold": fold, "seed": 0})
    table["part"] = ["test", "test", "test", "val"]  # the validation slide must not count
    table["true"] = true
    table["predicted"] = ["tumour" if p > 0.5 else "normal" for p in positive]
    table["prob_normal"], table["prob_tumour"] = [1 - p for p in positive], positive
    table.to_csv(path, index=False)
    return path


def test_evaluate_writes_a_row_a_run_then_mean_and_sd(tmp_path: Path) -> None:
    files = [
        predictions(tmp_path / "1.csv", 1, [0.9, 0.7, 0.8, 0.99]),
        predictions(tmp_path / "0.csv", 0, [0.9, 0.1, 0.8, 0.99]),
    ]
    evaluate(files, CLASSES, tmp_path / "metrics.csv")
    table = pd.read_csv(tmp_path / "metrics.csv", dtype={"fold": str})
    assert list(table.columns) == ["fold", "seed", "n", *METRICS]
    assert list(table["fold"]) == ["0", "1", "mean", "sd"]
    assert list(table["n"][:2]) == [3, 3]
    assert list(table["accuracy"]) == pytest.approx([1, 2 / 3, 5 / 6, np.std([1, 2 / 3], ddof=1)])
    assert list(table["auroc"]) == pytest.approx([1, 1, 1, 0])


def test_weighted_auroc_counts_a_slide_as_often_as_it_was_drawn() -> None:
    rng = np.random.default_rng(0)
    positive, scores = rng.random(30) < 0.4, rng.integers(8, size=30) / 8  # with ties
    weights = rng.integers(3, size=(20, 30)).astype(float)
    weights[0, positive] = 0
    drawn = [np.repeat(np.arange(30), row.astype(int)) for row in weights]
    expected = [roc_auc_score(positive[d], scores[d]) if 0 < positive[d].sum() < len(d) else np.nan for d in drawn]
    np.testing.assert_allclose(weighted_auroc(positive, scores, weights), expected)
    assert np.isnan(expected[0])
