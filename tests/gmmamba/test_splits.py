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
    blank = [*rows, ("s99", "P99", "normal", "ready", "")]
    with pytest.raises(SplitError, match="slide s99: split '' is none of train, val, test"):
        split_dataset(slide_table(tmp_path / "a.csv", blank), CLASSES[:2], column, tmp_path / "splits.csv")
