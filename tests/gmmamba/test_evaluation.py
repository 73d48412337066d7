"""Scores against scikit-learn and by hand, thresholds, patients, pools, and what evaluate writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from gmmamba.evaluation import (
    Evaluation,
    EvaluationError,
    Units,
    bootstrap_counts,
    choose_threshold,
    evaluate,
    pooled_scores,
    pooled_table,
    pools,
    run_units,
)
from gmmamba.intervals import interval
from gmmamba.metrics import METRICS, classification_metrics, selection_score
from gmmamba.scores import score_names, scores

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
    true, P = np.array([0, 0]), np.array([[0.9, 0.1], [0.8, 0.2]])
    metrics = classification_metrics(true, P)
    ours = {name: float(value[0]) for name, value in scores(true, P, P.argmax(1), CLASSES).items()}
    assert metrics["accuracy"] == ours["accuracy"] == 1
    for name in ("balanced_accuracy", "auroc", "auprc", "f1_positive", "macro_f1"):
        assert np.isnan(metrics[name]), name
        assert np.isnan(ours[name]), name
    assert np.isnan(ours["sensitivity"])
    assert ours["specificity"] == 1


def reference_scores(true: np.ndarray, P: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """The same by scikit-learn, of units of every class."""
    C = P.shape[1]
    labels = np.arange(C)
    confusion = sk.multilabel_confusion_matrix(true, called, labels=labels)  # (C, 2, 2)
    specificity = confusion[:, 0, 0] / confusion[:, 0].sum(1)
    sensitivity = sk.recall_score(true, called, labels=labels, average=None)
    one_hot = true[:, None] == labels
    ranked = P[:, 1] if C == 2 else P
    against = true if C == 2 else one_hot
    names = [f"c{c}" for c in labels]
    found = {
        "accuracy": sk.accuracy_score(true, called),
        "balanced_accuracy": sk.balanced_accuracy_score(true, called),
        "macro_f1": sk.f1_score(true, called, labels=labels, average="macro"),
        "f1_positive": sk.f1_score(true, called) if C == 2 else np.nan,
        "auroc": sk.roc_auc_score(against, ranked),
        "auprc": sk.average_precision_score(against, ranked),
        "sensitivity": sensitivity[1] if C == 2 else sensitivity.mean(),
        "specificity": specificity[1] if C == 2 else specificity.mean(),
        "brier": sk.brier_score_loss(true, P[:, 1]) if C == 2 else ((P - one_hot) ** 2).sum(1).mean(),
        "log_loss": sk.log_loss(true, P, labels=labels),
    }
    f1 = sk.f1_score(true, called, labels=labels, average=None)
    for kind, values in (("f1", f1), ("sensitivity", sensitivity), ("specificity", specificity)):
        found |= {f"{kind}[{name}]": value for name, value in zip(names, values, strict=True)}
    if C > 2:
        found |= {f"auroc[{name}]": sk.roc_auc_score(one_hot[:, c], P[:, c]) for c, name in enumerate(names)}
        found |= {f"auprc[{name}]": sk.average_precision_score(one_hot[:, c], P[:, c]) for c, name in enumerate(names)}
    return found


@given(st.integers(2, 4), st.integers(8, 60), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_weighted_scores_are_scikit_learns_of_the_drawn_units(C: int, S: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    P = rng.integers(1, 7, size=(S, C)).astype(float)  # with ties
    P /= P.sum(1, keepdims=True)
    true, called = np.r_[np.arange(C), rng.integers(C, size=S - C)], rng.integers(C, size=S)
    weights = np.stack([np.ones(S), np.r_[np.ones(C), rng.integers(3, size=S - C)]])
    names = [f"c{c}" for c in range(C)]
    ours = scores(true, P, called, names, weights)
    assert list(ours) == score_names(names)
    for row, weight in enumerate(weights.astype(int)):
        drawn = np.repeat(np.arange(S), weight)
        for name, value in reference_scores(true[drawn], P[drawn], called[drawn]).items():
            np.testing.assert_allclose(ours[name][row], value, atol=1e-12, err_msg=name)
    for name, value in classification_metrics(true, P).items():  # those that training knows, of the argmax
        np.testing.assert_allclose(scores(true, P, P.argmax(1), names)[name][0], value, atol=1e-12, err_msg=name)


def test_expected_calibration_error_is_that_of_torchmetrics() -> None:
    """MulticlassCalibrationError(num_classes=3, n_bins=15, norm="l1") of torchmetrics 1.9 on the same numbers."""
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(3), size=200)
    true = rng.integers(3, size=200)
    ours = scores(true, P, P.argmax(1), list("abc"))["ece"][0]
    assert ours == pytest.approx(0.3918874, abs=1e-6)
    by_hand = scores(
        np.array([1, 1, 0]), np.array([[0.05, 0.95], [0.35, 0.65], [0.34, 0.66]]), np.zeros(3, int), CLASSES
    )
    assert by_hand["ece"][0] == pytest.approx((0.05 + abs(0.65 + 0.66 - 1)) / 3)  # .65 and .66 share a bin


@given(st.integers(4, 40), st.integers(0, 10**6), st.sampled_from(["youden", "f1"]))
@settings(deadline=None, max_examples=60)
def test_no_threshold_is_better_than_the_chosen_one(S: int, seed: int, rule: str) -> None:
    rng = np.random.default_rng(seed)
    positive = np.r_[True, False, rng.random(S - 2) < 0.4]
    p = rng.integers(0, 20, size=S) / 20

    def value(threshold: float) -> float:
        called = p > threshold
        if rule == "f1":
            return float(sk.f1_score(positive, called, zero_division=0))
        return float(called[positive].mean() - called[~positive].mean())

    chosen = choose_threshold(positive, p, rule)
    assert 0 <= chosen <= 1
    assert value(chosen) >= max(value(t) for t in np.r_[0, p, np.linspace(0, 1, 41)]) - 1e-12


def test_a_threshold_between_separate_classes_is_one_half_where_it_can_be() -> None:
    assert choose_threshold(np.array([False, True]), np.array([0.2, 0.9]), "youden") == 0.5
    assert choose_threshold(np.array([False, True]), np.array([0.1, 0.3]), "f1") == pytest.approx(0.2)


def predictions(path: Path, fold: int, positive: list[float], patients: str = "abcdef") -> Path:
    """Four test slides and two validation slides."""
    true = ["tumour", "normal", "tumour", "normal", "normal", "tumour"]
    table = pd.DataFrame({"slide_id": [f"{fold}{name}" for name in "abcdef"]})
    table["patient_id"], table["cohort"], table["fold"], table["seed"] = [f"{fold}{p}" for p in patients], "x", fold, 0
    table["part"] = ["test"] * 4 + ["val"] * 2
    table["true"], table["predicted"] = true, ["tumour" if p > 0.5 else "normal" for p in positive]
    table["prob_normal"], table["prob_tumour"] = [1 - p for p in positive], positive
    table.to_csv(path, index=False)
    return path


def evaluated(files: list[Path], how: Evaluation) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder = files[0].parent
    evaluate(files, CLASSES, how, folder / "metrics.csv", folder / "pooled.csv")
    pooled = pd.read_csv(folder / "pooled.csv")
    assert list(pooled.columns) == ["level", "metric", "value", "low", "high", "n"]
    return pd.read_csv(folder / "metrics.csv", dtype={"fold": str}), pooled.set_index(["level", "metric"])


def test_evaluate_writes_runs_mean_and_sd_and_pools(tmp_path: Path) -> None:
    files = [
        predictions(tmp_path / "1.csv", 1, [0.9, 0.7, 0.8, 0.1, 0.99, 0.01]),
        predictions(tmp_path / "0.csv", 0, [0.9, 0.1, 0.8, 0.2, 0.99, 0.01]),
    ]
    table, pooled = evaluated(files, Evaluation())
    of_patients = [f"patient_{name}" for name in score_names(CLASSES)]
    assert list(table.columns) == [
        "fold", "seed", "n", *score_names(CLASSES), "threshold", "patients", *of_patients, "patient_threshold"
    ]  # fmt: skip
    assert list(table["fold"]) == ["0", "1", "mean", "sd"]
    assert list(table["n"][:2]) == list(table["patients"][:2]) == [4, 4]
    assert list(table["accuracy"]) == pytest.approx([1, 3 / 4, 7 / 8, np.std([1, 3 / 4], ddof=1)])
    assert list(table["auroc"]) == pytest.approx([1, 1, 1, 0])
    assert list(table["threshold"][:2]) == [0.5, 0.5]
    for name in score_names(CLASSES):  # a slide a patient
        np.testing.assert_array_equal(table[name], table[f"patient_{name}"])
        assert list(pooled.loc["slide", name]) == pytest.approx(list(pooled.loc["patient", name]))
    accuracy = pooled.loc["slide", "accuracy"]
    assert (accuracy["value"], accuracy["n"]) == (7 / 8, 8)
    assert accuracy["low"] < 7 / 8 < accuracy["high"]
    assert pooled.loc["slide", "auroc"]["value"] == 1
    assert pooled.loc["slide", "auroc"]["low"] < 0.75  # eight patients that are all in order prove little


def test_thresholds_come_from_validation_and_hold_for_calls_alone(tmp_path: Path) -> None:
    file = predictions(tmp_path / "0.csv", 0, [0.30, 0.24, 0.40, 0.10, 0.20, 0.30])
    table, pooled = evaluated([file], Evaluation(threshold="youden"))
    assert table["threshold"][0] == pytest.approx(0.25)
    assert table["accuracy"][0] == pooled.loc["slide", "accuracy"]["value"] == 1
    plain, _ = evaluated([file], Evaluation())
    assert plain["accuracy"][0] == 0.5
    for name in ("auroc", "auprc", "brier", "log_loss", "ece"):
        assert plain[name][0] == table[name][0]
    part = pd.read_csv(file).query("part == 'test'")
    part.to_csv(file, index=False)
    with pytest.raises(EvaluationError, match=r"fold 0, seed 0: a threshold by f1 needs .* validation slides of both"):
        evaluated([file], Evaluation(threshold="f1"))


@pytest.mark.parametrize(("rule", "expected"), [
    ("mean", [0.3, 0.5]), ("max", [0.4, 0.9]), ("geometric_mean", [0.2899, 0.5])
])  # fmt: skip
def test_patients_are_made_of_their_slides(tmp_path: Path, rule: str, expected: list[float]) -> None:
    file = predictions(tmp_path / "0.csv", 0, [0.9, 0.2, 0.1, 0.4, 0.2, 0.8], patients="tntnvw")
    run = pd.read_csv(file, dtype={"slide_id": str, "patient_id": str})
    units = run_units(run, CLASSES, Evaluation(patient=rule), "patient")  # type: ignore[arg-type]
    assert list(units.names) == ["0n", "0t"]
    assert list(units.probabilities[:, 1]) == pytest.approx(expected, abs=1e-4)
    assert units.probabilities.sum(1) == pytest.approx(1)
    torn = predictions(tmp_path / "1.csv", 0, [0.9, 0.2, 0.1, 0.4, 0.2, 0.8], patients="aabbcc")
    with pytest.raises(EvaluationError, match="patient 0a has slides of two classes"):
        run_units(pd.read_csv(torn), CLASSES, Evaluation(patient=rule), "patient")  # type: ignore[arg-type]


def test_slides_that_are_sure_of_opposite_classes_leave_the_patient_undecided(tmp_path: Path) -> None:
    file = predictions(tmp_path / "0.csv", 0, [1.0, 0.2, 0.0, 1.0, 0.2, 0.8], patients="tntnvw")
    run = pd.read_csv(file, dtype={"slide_id": str, "patient_id": str})
    found = run_units(run, CLASSES, Evaluation(patient="geometric_mean"), "patient").probabilities
    assert found.sum(1) == pytest.approx(1)
    assert found[1] == pytest.approx([0.5, 0.5])  # t: 1 and 0
    assert found[0] == pytest.approx([0, 1], abs=1e-100)  # n: 0.2 and 1


def test_scores_of_many_slides_a_patient_are_made_in_blocks_of_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = units(0, 0, "aBcD" * 25, list(np.linspace(0.1, 0.9, 100)))  # 4 patients
    sizes = []

    def spied(true: np.ndarray, P: np.ndarray, called: np.ndarray, classes: list[str], weights: np.ndarray) -> Any:
        sizes.append(weights.size)
        return scores(true, P, called, classes, weights)

    counts = bootstrap_counts(4, 300)
    whole = pooled_scores([pool], CLASSES, counts)["auroc"]
    monkeypatch.setattr("gmmamba.evaluation.scores", spied)
    monkeypatch.setattr("gmmamba.evaluation.BLOCK", 1000)
    np.testing.assert_array_equal(pooled_scores([pool], CLASSES, counts)["auroc"], whole)
    assert max(sizes) <= 1000
    assert sum(sizes) == 300 * 100


def units(fold: int, seed: int, names: str, p: list[float]) -> Units:
    P = np.array(p)
    true = np.array([name.isupper() for name in names]).astype(int)
    return Units(fold, seed, np.array(list(names)), np.array(list(names)), true, np.stack([1 - P, P], 1),
                 (P > 0.5).astype(int), 0.5)  # fmt: skip


def test_folds_are_pooled_by_seed_and_not_where_all_test_the_same() -> None:
    runs = [units(1, 0, "cD", [0.8, 0.9]), units(0, 0, "aB", [0.1, 0.2]), units(0, 1, "aB", [0.1, 0.2]),
            units(1, 1, "cD", [0.3, 0.9])]  # fmt: skip
    together = pools(runs)
    assert [list(pool.names) for pool in together] == [list("aBcD")] * 2
    assert pooled_scores(together, CLASSES)["auroc"][0] == pytest.approx((3 / 4 + 3 / 4) / 2)
    same = pools([units(0, 0, "aB", [0.1, 0.2]), units(1, 0, "aB", [0.9, 0.8])])
    assert pooled_scores(same, CLASSES)["auroc"][0] == pytest.approx((1 + 0) / 2)


def test_slides_of_a_patient_and_seeds_that_agree_are_no_further_evidence() -> None:
    rng = np.random.default_rng(0)
    true = np.arange(60) % 2
    P = 1 / (1 + np.exp(-(2 * (true - 0.5) + rng.normal(size=60))))

    def pool(times: int, seed: int = 0) -> Units:
        patients = np.repeat([f"p{i:02d}" for i in range(60)], times)
        names = np.array([f"s{i}" for i in range(60 * times)])
        probabilities = np.repeat(np.stack([1 - P, P], 1), times, axis=0)
        return Units(0, seed, names, patients, np.repeat(true, times), probabilities, probabilities.argmax(1), 0.5)

    once, thrice, seeds = (pooled_table(of, CLASSES) for of in ([pool(1)], [pool(3)], [pool(1, 0), pool(1, 1)]))
    assert list(thrice["n"].unique()) == [180]
    for other in (thrice, seeds):
        np.testing.assert_allclose(other[["value", "low", "high"]], once[["value", "low", "high"]], atol=1e-12)
    counts = bootstrap_counts(60)
    assert (counts.sum(1) == 60).all()
    assert pooled_scores([pool(1)], CLASSES, counts)["auroc"].shape == (len(counts),)


def test_an_interval_stays_where_the_score_can_be() -> None:
    samples = np.random.default_rng(0).gamma(4, 0.03, 2000)  # biased upwards, as the ECE of few slides is
    low, high = interval("ece", 0.03, samples, {"normal": 15, "tumour": 14})
    assert 0 < low < 0.03 < high < 1
    low, high = interval("accuracy", 0.97, 1 - samples / 4, {"normal": 15, "tumour": 14})
    assert 0 < low < 0.97 < high < 1
