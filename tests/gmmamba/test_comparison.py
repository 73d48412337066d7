"""DeLong against published values, intervals against their definitions, Holm against statsmodels, comparisons.csv."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from gmmamba.__main__ import main
from gmmamba.comparison import COLUMNS, bootstrap_difference, compare, compare_pairs, comparison_page, runs_in
from gmmamba.delong import auroc_parts, delong_difference, delong_variance, placements
from gmmamba.evaluation import Evaluation, EvaluationError, Units
from gmmamba.intervals import holm, interval, wilson
from gmmamba.report_tables import comparison_rows

CLASSES = ["normal", "tumour"]

# The ovarian cancer patients of DeLong et al. (1988), as the SAS manual has them (PROC LOGISTIC, Comparing Receiver
# Operating Characteristic Curves): albumin, total protein, K-G score, outcome.
PATIENTS = np.fromstring("""
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0
4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1
4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1
2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
""", sep=" ").reshape(-1, 4)  # fmt: skip


def of_patients(true: np.ndarray, score: np.ndarray, times: int = 1, seed: int = 0) -> Units:
    """A pool in which each patient has the same slide so many times."""
    true, P = np.repeat(true.astype(int), times), np.repeat(score, times)
    names = np.repeat([f"p{i:03d}" for i in range(len(score))], times)
    return Units(0, seed, np.arange(len(P)), names, true, np.stack([1 - P, P], 1), (P > 0.5).astype(int), 0.5)


@pytest.fixture
def markers() -> dict[str, Units]:
    alb, tp, kg, outcome = PATIENTS.T
    scores = {"albumin": alb, "protein": tp, "kg": 10 - kg}
    return {name: of_patients(outcome, score / 10) for name, score in scores.items()}


def test_delong_has_the_published_areas_errors_and_differences(markers: dict[str, Units]) -> None:
    parts = {name: auroc_parts([pool], 2) for name, pool in markers.items()}
    published = {"albumin": (0.7366, 0.0927), "kg": (0.7258, 0.1028), "protein": (0.6478, 0.1000)}
    for name, (area, error) in published.items():
        assert parts[name][0] == pytest.approx(area, abs=5e-5)
        assert np.sqrt(delong_variance(*parts[name][1:])) == pytest.approx(error, abs=5e-5)
    contrast = delong_difference(parts["albumin"], parts["kg"])
    assert contrast == pytest.approx((0.0108, -0.1761, 0.1976, 0.9102), abs=1e-4)
    contrast = delong_difference(parts["protein"], parts["kg"])
    assert contrast == pytest.approx((-0.0780, -0.2830, 0.1271, 0.4561), abs=1e-4)


def test_slides_and_seeds_are_no_patients(markers: dict[str, Units]) -> None:
    alb, kg = PATIENTS[:, 0] / 10, 1 - PATIENTS[:, 2] / 10
    once = delong_difference(auroc_parts([markers["albumin"]], 2), auroc_parts([markers["kg"]], 2))
    three = [[of_patients(PATIENTS[:, 3], of, times=3)] for of in (alb, kg)]
    seeds = [[of_patients(PATIENTS[:, 3], of, seed=seed) for seed in (0, 1)] for of in (alb, kg)]
    for first, second in (three, seeds):
        assert delong_difference(auroc_parts(first, 2), auroc_parts(second, 2)) == pytest.approx(once)


def test_same_predictions_do_not_differ(markers: dict[str, Units]) -> None:
    parts = auroc_parts([markers["kg"]], 2)
    assert delong_difference(parts, parts) == (0, 0, 0, 1)
    assert bootstrap_difference(np.zeros(99)) == (0, 0, 1)


def test_models_that_differ_without_variance_are_not_called_the_same() -> None:
    true = np.repeat([1, 0], 10)
    perfect, constant = of_patients(true, 0.1 + 0.8 * true), of_patients(true, np.full(20, 0.4))
    found = delong_difference(auroc_parts([perfect], 2), auroc_parts([constant], 2))
    assert found[0] == 0.5
    assert np.isnan(found[1:]).all()
    table = compare_pairs({"a": [perfect], "b": [constant]}, CLASSES, [("a", "b")]).assign(level="slide")
    (row,) = comparison_rows(table)
    assert (row["test"], row["told_apart"]) == ("bootstrap", True)
    assert row["difference"] == "+0.500 [+0.500, +0.500]"
    better = delong_difference(auroc_parts([perfect], 2), auroc_parts([of_patients(true, 0.2 + 0.3 * true)], 2))
    assert better == (0, 0, 0, 1)


def test_placements_by_hand() -> None:
    placed = placements(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.4, 0.1]))
    assert list(placed) == [1, 0.75, 0.75, 1]


def test_macro_auroc_has_the_variance_of_its_bootstrap() -> None:
    """Three classes, for which there is no published formula: the patients' parts against 4000 resamples."""
    from gmmamba.evaluation import bootstrap_counts, pooled_scores

    rng = np.random.default_rng(0)
    true = np.arange(150) % 3
    P = np.exp(rng.normal(size=(150, 3)) + 1.2 * (true[:, None] == np.arange(3)))
    P /= P.sum(1, keepdims=True)
    names = np.array([f"p{i:03d}" for i in range(150)])
    pool = Units(0, 0, names, names, true, P, P.argmax(1), np.nan)
    value, parts, labels = auroc_parts([pool], 3)
    sampled = pooled_scores([pool], list("abc"), bootstrap_counts(150, 4000))["auroc"]
    assert value == pytest.approx(pooled_scores([pool], list("abc"))["auroc"][0])
    assert parts.sum() == pytest.approx(0)
    assert np.sqrt(delong_variance(parts, labels)) == pytest.approx(sampled.std(), rel=0.05)


def test_holm_is_that_of_statsmodels() -> None:
    """statsmodels.stats.multitest.multipletests(p, method="holm"), version 0.14."""
    corrected = holm([0.012, 0.001, 0.2, 0.04, 0.04, 0.9])
    assert list(corrected) == pytest.approx([0.06, 0.006, 0.4, 0.16, 0.16, 0.9])
    with_nan = holm([np.nan, 0.02, 0.03])
    assert list(with_nan[1:]) == pytest.approx([0.04, 0.04])
    assert np.isnan(with_nan[0])


def test_an_interval_is_wilsons_for_a_share_and_never_a_point() -> None:
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.975)
    assert wilson(15 / 20, 20, z) == pytest.approx((0.531, 0.888), abs=5e-4)  # Wilson (1927), as R's prop.test has it
    patients = {"normal": 200, "tumour": 200}
    rng = np.random.default_rng(0)
    low, high = interval("accuracy", 0.9, rng.binomial(400, 0.9, 20000) / 400, patients)
    assert (low, high) == pytest.approx(wilson(0.9, 400, z), abs=2e-3)
    for name in ("accuracy", "auroc", "sensitivity", "f1[tumour]", "specificity[tumour]"):
        low, high = interval(name, 1.0, np.ones(1000), {"normal": 20, "tumour": 10})
        assert 0.6 < low < 0.95, name
        assert high == 1
    assert interval("sensitivity", 1.0, np.ones(9), {"normal": 90, "tumour": 10})[0] < 0.75  # of ten patients
    low, high = interval("brier", 0.1, 0.1 + 0.01 * norm.ppf(np.linspace(0.001, 0.999, 999)), patients)
    assert low < 0.1 < high
    assert low * high == pytest.approx(0.01)
    assert np.isnan(interval("auroc", np.nan, np.full(9, np.nan), patients)).all()


def write_runs(folder: Path, name: str, quality: float, seeds: int = 1) -> None:
    for fold in range(2):
        for seed in range(seeds):
            rng = np.random.default_rng([fold, seed])
            true = np.arange(30) // 2 % 2  # two slides a patient
            p = 1 / (1 + np.exp(-(quality * (true - 0.5) + rng.normal(size=30))))
            path = folder / name / f"fold{fold}_seed{seed}" / "predictions.csv"
            path.parent.mkdir(parents=True)
            pd.DataFrame({
                "slide_id": [f"S{fold}{i}" for i in range(30)], "patient_id": [f"P{fold}{i // 2}" for i in range(30)],
                "cohort": "c", "fold": fold, "seed": seed, "part": "test", "true": [CLASSES[t] for t in true],
                "predicted": [CLASSES[int(x > 0.5)] for x in p], "prob_normal": 1 - p, "prob_tumour": p,
            }).to_csv(path, index=False)  # fmt: skip


def test_every_pair_stands_in_comparisons_csv(tmp_path: Path) -> None:
    for name, quality in {"bad": 0.0, "twin": 0.0, "good": 5.0}.items():
        write_runs(tmp_path, name, quality)
    compare(runs_in(tmp_path, ["bad", "twin", "good"]), Evaluation(), tmp_path / "comparisons.csv")
    table = pd.read_csv(tmp_path / "comparisons.csv")
    assert list(table.columns) == COLUMNS
    assert set(table["level"]) == {"slide", "patient"}
    rows = table.set_index(["first", "second", "level", "metric", "test"])
    for test in ("bootstrap", "delong"):
        row = rows.loc["bad", "good", "slide", "auroc", test]
        assert row["low"] < row["difference"] < row["high"] < 0
        assert 0 < row["p"] < row["p_holm"] < 0.01
        twin = rows.loc["bad", "twin", "patient", "auroc", test]
        assert (twin["difference"], twin["p"], twin["p_holm"]) == (0, 1, 1)
    assert rows.loc["bad", "good", "slide", "auroc", "delong"]["low"] == pytest.approx(
        rows.loc["bad", "good", "slide", "auroc", "bootstrap"]["low"], abs=0.05
    )
    compare(runs_in(tmp_path, ["good"]), Evaluation(), tmp_path / "comparisons.csv")
    assert list(pd.read_csv(tmp_path / "comparisons.csv").columns) == COLUMNS

    page = comparison_page(runs_in(tmp_path, ["good", "bad"]), Evaluation()).splitlines()
    assert len(page) == 4
    assert page[2].startswith("| good | 2 | ")
    assert "| -0." in page[3]


def test_a_named_run_swallows_no_experiment_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, "one", 1.0)
    runs = ["--runs", "fold0_seed0", "--runs", "fold1_seed0"]
    assert main(["compare", *runs, str(tmp_path), "one", "--output", str(tmp_path / "c.csv")]) == 0, capsys.readouterr()
    assert main(["compare", "--runs", "fold9_seed0", str(tmp_path), "one"]) == 1
    assert "one/fold9_seed0/predictions.csv does not exist" in capsys.readouterr().err


def test_the_runs_that_are_compared_are_those_shared_or_those_named(tmp_path: Path) -> None:
    write_runs(tmp_path, "one", 1.0)
    write_runs(tmp_path, "two", 1.0, seeds=2)
    assert [path.parent.name for path in runs_in(tmp_path, ["one", "two"])["two"]] == ["fold0_seed0", "fold1_seed0"]
    (tmp_path / "report.json").write_text('{"folds": [0], "seeds": [0, 1]}')  # once there were two
    assert [path.parent.name for path in runs_in(tmp_path, ["one", "two"])["two"]] == ["fold0_seed0"]
    (tmp_path / "report.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"one/fold0_seed1/predictions\.csv does not exist"):
        runs_in(tmp_path, ["one", "two"], ["fold0_seed1"])
    with pytest.raises(FileNotFoundError, match=r"three has no fold\*_seed"):
        runs_in(tmp_path, ["one", "three"])
    path = tmp_path / "two" / "fold1_seed0" / "predictions.csv"
    path.write_text(path.read_text().replace("S13,", "S99,"))
    with pytest.raises(EvaluationError, match="one and two tested other slides, folds or seeds"):
        compare(runs_in(tmp_path, ["one", "two"]), Evaluation(), tmp_path / "comparisons.csv")


def test_compare_evaluates_as_the_report_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        write_runs(tmp_path, name, 1.0)
        for path in tmp_path.glob(f"{name}/*/predictions.csv"):
            table = pd.read_csv(path)
            pd.concat([table, table.assign(part="val")]).to_csv(path, index=False)

    def compared(*options: str) -> tuple[str, str]:
        assert main(["compare", str(tmp_path), "one", "two", *options]) == 0
        return capsys.readouterr()

    plain, said = compared()
    assert "evaluation: threshold argmax, patients mean (the default" in said
    (tmp_path / "report.json").write_text('{"evaluation": {"threshold": "f1", "patient": "max"}}')
    as_reported, said = compared()
    assert f"threshold f1, patients max (as {tmp_path}/report.json has it)" in said
    assert as_reported == compared("--settings", '{"threshold": "f1"}')[0] != plain
    assert compared("--settings", "{}")[0] == plain


@pytest.mark.parametrize(("settings", "why"), [
    ('{"threshold": "Youden"}', "evaluation.threshold: 'Youden' is none of argmax, youden, f1"),
    ('{"patient": "median"}', "evaluation.patient: 'median' is none of mean, geometric_mean, max"),
    ('{"treshold": "f1"}', "evaluation: unknown key 'treshold'; did you mean 'threshold'?"),
    ('["f1"]', "evaluation: ['f1'] is no mapping"),
])  # fmt: skip
def test_settings_that_mean_nothing_end_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str, why: str
) -> None:
    write_runs(tmp_path, "one", 1.0)
    assert main(["compare", str(tmp_path), "one", "--settings", settings]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
