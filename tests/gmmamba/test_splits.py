from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmmamba.splits import PARTS, SplitError, SplitSettings, patient_folds, split_dataset

CLASSES = ["normal", "tumour", "other"]


@st.composite
def labelled_patients(draw: st.DrawFn, least: int) -> dict[str, str]:
    counts = draw(st.lists(st.integers(least, 40), min_size=2, max_size=3))
    labels = [name for name, count in zip(CLASSES, counts, strict=False) for _ in range(count)]
    order = draw(st.permutations(range(len(labels))))
    return {f"P{index}": labels[index] for index in order}


def by_class(parts: dict[str, str], labels: dict[str, str], name: str) -> dict[str, int]:
    chosen = [parts[patient] for patient, label in labels.items() if label == name]
    return {part: chosen.count(part) for part in PARTS}


@given(labelled_patients(least=8), st.integers(2, 4), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_kfold_shares_out_every_patient_once_and_stratified(labels: dict[str, str], k: int, seed: int) -> None:
    classes = sorted(set(labels.values()))
    folds = patient_folds(labels, classes, SplitSettings(folds=k, validation=0.2, seed=seed))
    assert len(folds) == k
    for parts in folds:
        assert parts.keys() == labels.keys()  # a dict: a patient is in one part
    for patient in labels:
        assert sum(parts[patient] == "test" for parts in folds) == 1
    for name in classes:
        total = sum(label == name for label in labels.values())
        for parts in folds:
            found = by_class(parts, labels, name)
            assert abs(found["test"] - total / k) < 1 + 1e-9
            assert abs(found["val"] - 0.2 * (total - found["test"])) <= 0.5 or found["val"] == 1
            assert min(found.values()) >= 1


@given(labelled_patients(least=5), st.integers(1, 4), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_ratio_draws_the_shares_of_all_patients(labels: dict[str, str], draws: int, seed: int) -> None:
    classes = sorted(set(labels.values()))
    shares = SplitSettings(scheme="ratio", folds=draws, test=0.25, validation=0.1, seed=seed)
    for parts in patient_folds(labels, classes, shares):
        assert parts.keys() == labels.keys()
        for name in classes:
            found, total = by_class(parts, labels, name), sum(label == name for label in labels.values())
            assert abs(found["test"] - 0.25 * total) <= 0.5 or found["test"] == 1
            assert abs(found["val"] - 0.1 * total) <= 0.6 or found["val"] == 1


@st.composite
def patients_of(draw: st.DrawFn, least: int, kinds: tuple[int, int]) -> tuple[dict[str, str], dict[str, str]]:
    """Labels, and the cohort or site of each patient: each of them has `least` patients or more of each class."""
    labels, given = {}, {}
    for kind in range(draw(st.integers(*kinds))):
        for name in CLASSES[:2]:
            for _ in range(draw(st.integers(least, 12))):
                patient = f"P{len(labels):03d}"
                labels[patient], given[patient] = name, "ABCDEFGHIJKL"[kind]
    return labels, given


@given(patients_of(least=3, kinds=(2, 4)), st.integers(2, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_external_tests_only_and_all_of_the_test_cohorts(
    cohorts: tuple[dict[str, str], dict[str, str]], k: int, seed: int
) -> None:
    labels, cohort_of = cohorts
    external = SplitSettings(scheme="external", folds=k, seed=seed, test_cohorts=["B"])
    side = {patient: external.goes_by(cohort, "", "") for patient, cohort in cohort_of.items()}
    folds = patient_folds(labels, CLASSES[:2], external, side)
    assert len(folds) == external.count_folds(["A", "B"]) == k
    for parts in folds:
        assert {p for p, part in parts.items() if part == "test"} == {p for p, c in cohort_of.items() if c == "B"}
    for patient, cohort in cohort_of.items():  # the validation parts share out the rest
        assert sum(parts[patient] == "val" for parts in folds) == (cohort != "B")


@given(patients_of(least=3, kinds=(2, 4)), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_leave_one_cohort_out_tests_each_cohort_in_a_fold_of_its_own(
    cohorts: tuple[dict[str, str], dict[str, str]], seed: int
) -> None:
    labels, cohort_of = cohorts
    names = sorted(set(cohort_of.values()))
    leave_out = SplitSettings(scheme="leave_one_cohort_out", seed=seed)
    folds = patient_folds(labels, CLASSES[:2], leave_out, cohort_of)
    assert len(folds) == leave_out.count_folds(names) == len(names)
    for name, parts in zip(names, folds, strict=True):
        assert {p for p, part in parts.items() if part == "test"} == {p for p, c in cohort_of.items() if c == name}
        for label in CLASSES[:2]:
            found = by_class(parts, labels, label)
            assert abs(found["val"] - 0.2 * (found["train"] + found["val"])) <= 0.5 or found["val"] == 1


@given(patients_of(least=1, kinds=(9, 12)), st.integers(2, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_site_preserved_folds_split_no_site(sites: tuple[dict[str, str], dict[str, str]], k: int, seed: int) -> None:
    labels, site_of = sites
    preserved = SplitSettings(scheme="site_preserved", folds=k, validation=0.3, seed=seed)
    folds = patient_folds(labels, CLASSES[:2], preserved, site_of)
    assert folds == patient_folds(dict(reversed(labels.items())), CLASSES[:2], preserved, site_of)
    for parts in folds:
        assert parts.keys() == labels.keys()
        for site in set(site_of.values()):
            assert len({parts[patient] for patient in labels if site_of[patient] == site}) == 1
    for patient in labels:
        assert sum(parts[patient] == "test" for parts in folds) == 1


def test_site_preserved_folds_of_tcga_lung_are_nearly_even(shared: Path) -> None:
    table = pd.read_csv(shared / "data/labels/tcga_lung_slideflow.csv", dtype=str)
    labels, sites = (dict(zip(table["patient"], table[column], strict=True)) for column in ("subtype", "site"))
    classes = ["adenocarcinoma", "squamous"]  # 467 and 474 patients of 39 sites, the largest with 132
    for parts in patient_folds(labels, classes, SplitSettings(scheme="site_preserved"), sites):
        for name in classes:
            found = by_class(parts, labels, name)
            assert 0.15 < found["test"] / sum(found.values()) < 0.25
            assert 0.15 < found["val"] / (found["val"] + found["train"]) < 0.25


def test_what_a_scheme_of_cohorts_or_sites_cannot_split_is_named() -> None:
    labels = {f"P{i}": CLASSES[i % 2] for i in range(12)}
    site_of = {patient: "AB"[i % 2] for i, patient in enumerate(labels)}
    with pytest.raises(SplitError, match=r"class 'normal' comes from 1 sites, too few to share them out to 2 parts"):
        patient_folds(labels, CLASSES[:2], SplitSettings(scheme="site_preserved", folds=2), site_of)
    with pytest.raises(SplitError, match=r"fold 0 has no patient of class 'normal' in its train part: leave out"):
        patient_folds(labels, CLASSES[:2], SplitSettings(scheme="leave_one_cohort_out"), site_of)
    side = {patient: "tested" if i < 4 else "not tested" for i, patient in enumerate(labels)}
    with pytest.raises(SplitError, match=r"'normal' has 4 patients to share out, too few for 5 folds: the validation"):
        patient_folds(labels, CLASSES[:2], SplitSettings(scheme="external"), side)
    with pytest.raises(SplitError, match="1 fold leaves nothing to train on"):
        patient_folds(labels, CLASSES[:2], SplitSettings(folds=1))


def test_folds_depend_on_the_seed_and_not_on_the_order_of_the_sheet() -> None:
    labels = {f"P{i:02d}": CLASSES[i % 2] for i in range(30)}
    backwards = dict(reversed(labels.items()))
    for scheme in ("kfold", "ratio"):
        first = patient_folds(labels, CLASSES[:2], SplitSettings(scheme=scheme, seed=1))  # type: ignore[arg-type]
        again = patient_folds(backwards, CLASSES[:2], SplitSettings(scheme=scheme, seed=1))  # type: ignore[arg-type]
        other = patient_folds(labels, CLASSES[:2], SplitSettings(scheme=scheme, seed=2))  # type: ignore[arg-type]
        assert first == again
        assert first != other


def test_too_few_patients_names_class_fold_and_remedy() -> None:
    labels = {f"P{i}": "normal" for i in range(10)} | {f"T{i}": "tumour" for i in range(3)}
    with pytest.raises(SplitError, match=r"'tumour' has 3 patients.*5 folds.*fold 3.*at most 3 folds, or add slides"):
        patient_folds(labels, CLASSES[:2], SplitSettings(folds=5))
    with pytest.raises(SplitError, match=r"fold 0 has no patient of class 'normal' in its train part: use fewer folds"):
        patient_folds({"P0": "normal", "P1": "normal", "T0": "tumour", "T1": "tumour"}, CLASSES[:2],
                      SplitSettings(folds=2))  # fmt: skip
    with pytest.raises(SplitError, match=r"train part: use smaller shares"):
        patient_folds(labels, CLASSES[:2], SplitSettings(scheme="ratio", test=0.6, validation=0.4))


def slide_table(path: Path, rows: list[tuple[str, ...]]) -> dict[str, Path]:
    columns = ["slide_id", "patient_id", "label", "status", "split"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return {"a": path}


def test_split_dataset_keeps_a_patients_slides_together_and_leaves_out_failed_ones(tmp_path: Path) -> None:
    rows = [(f"{i:03d}-{n}", f"{i:03d}", CLASSES[i % 2], "ready", "") for i in range(20) for n in range(2)]
    tables = slide_table(tmp_path / "a.csv", [*rows, ("broken", "900", "normal", "failed", "")])
    split_dataset(tables, CLASSES[:2], SplitSettings(folds=4), tmp_path / "splits.csv")
    table = pd.read_csv(tmp_path / "splits.csv", dtype=str)
    assert list(table.columns) == ["slide_id", "cohort", "patient_id", "label", "fold0", "fold1", "fold2", "fold3"]
    assert list(table["slide_id"]) == [row[0] for row in rows]  # leading zeros survive, the failed slide is gone
    for fold in range(4):
        assert (table.groupby("patient_id")[f"fold{fold}"].nunique() == 1).all()


def test_column_scheme_takes_the_sheets_parts(tmp_path: Path) -> None:
    rows = [(f"s{i}", f"P{i}", CLASSES[i % 2], "ready", PARTS[i // 2 % 3]) for i in range(12)]
    column = SplitSettings(scheme="column")
    split_dataset(slide_table(tmp_path / "a.csv", rows), CLASSES[:2], column, tmp_path / "splits.csv")
    table = pd.read_csv(tmp_path / "splits.csv", dtype=str)
    assert list(table["fold0"]) == [row[4] for row in rows]

    torn = [*rows, ("s99", "P0", "normal", "ready", "test")]
    with pytest.raises(SplitError, match=r"patient P0 has split 'train' and 'test' \(slide s99\)"):
        split_dataset(slide_table(tmp_path / "a.csv", torn), CLASSES[:2], column, tmp_path / "splits.csv")
    sites = SplitSettings(scheme="site_preserved")
    with pytest.raises(SplitError, match="slide s0 has no site: fill the sheet's column"):
        split_dataset(slide_table(tmp_path / "a.csv", rows), CLASSES[:2], sites, tmp_path / "splits.csv")
    blank = [*rows, ("s99", "P99", "normal", "ready", "")]
    with pytest.raises(SplitError, match="slide s99: split '' is none of train, val, test"):
        split_dataset(slide_table(tmp_path / "a.csv", blank), CLASSES[:2], column, tmp_path / "splits.csv")


def test_a_patient_of_a_tested_and_another_cohort_is_a_leak(tmp_path: Path) -> None:
    rows = [(f"s{i}", f"P{i}", CLASSES[i % 2], "ready", "") for i in range(12)]
    tables = slide_table(tmp_path / "a.csv", rows)
    other = [(f"t{i}", f"Q{i}", CLASSES[i % 2], "ready", "") for i in range(4)]
    tables["c"] = slide_table(tmp_path / "c.csv", other)["a"]
    external = SplitSettings(scheme="external", folds=3, test_cohorts=["c"])
    split_dataset(tables, CLASSES[:2], external, tmp_path / "splits.csv")
    table = pd.read_csv(tmp_path / "splits.csv", dtype=str)
    assert ((table["fold2"] == "test") == (table["cohort"] == "c")).all()

    slide_table(tmp_path / "c.csv", [*other, ("t9", "P3", "tumour", "ready", "")])
    with pytest.raises(SplitError, match=r"patient P3 has side 'not tested' and 'tested' \(slide t9\)"):
        split_dataset(tables, CLASSES[:2], external, tmp_path / "splits.csv")
