"""One person, one slide: under two names it is refused or said, and both are named."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gmmamba.leakage import LeakageError, check_content, named_by_class, same_files
from slidestore import StoreAttributes, write_store

CLASSES = ["normal", "tumour"]


def test_one_file_under_two_names_is_found_through_links(tmp_path: Path) -> None:
    (tmp_path / "a.svs").touch()
    (tmp_path / "soft.svs").symlink_to(tmp_path / "a.svs")
    (tmp_path / "hard.svs").hardlink_to(tmp_path / "a.svs")
    (tmp_path / "b.svs").touch()
    names = ["a", "soft", "hard", "b", "absent"]

    def found(*patients: str) -> tuple[list[str], list[str]]:
        placed = enumerate(zip(patients, names, strict=True))
        return same_files((patient, f"{name} (line {i})", tmp_path / f"{name}.svs") for i, (patient, name) in placed)

    (problem,), warnings = found("P0", "P0", "P1", "P2", "P3")
    assert problem.startswith("a (line 0); soft (line 1); hard (line 2) are one file, ")
    assert "fill 'exclude' for all but one" in problem
    assert not warnings
    problems, (warning,) = found("P0", "P0", "P0", "P0", "P0")  # one patient is in one part, whatever the files
    assert not problems
    assert "hard (line 2) are one file" in warning
    assert "of one patient, which counts 3 times" in warning


@pytest.mark.parametrize("patients", [
    ["case12-tumour", "case12_normal"], ["case12", "case12.tumour"], ["NORMAL-B7", "tumour-B7"],
    ["normal/x1y", "x1y/tumour"], ["camelyon16_normal_001", "camelyon16_tumour_001"],
])  # fmt: skip
def test_patients_that_differ_by_a_class_alone_may_be_one(patients: list[str]) -> None:
    (said,) = named_by_class({name: f"S{i} (line {i})" for i, name in enumerate(patients)}, CLASSES)
    assert f"{patients[0]} (S0 (line 0)) and {patients[1]} (S1 (line 1))" in said
    assert "give one person one patient_id" in said


def test_of_many_such_patients_some_are_named() -> None:
    patients = {f"hospital_{name}_{i}": f"S{i}" for i in range(160) for name in CLASSES}
    (said,) = named_by_class(patients, CLASSES)
    assert said.count(" and hospital_tumour_") == 5
    assert "; … and 155 more. If these are the same people" in said


@pytest.mark.parametrize("patients", [
    ["normal_001", "tumour_001"],  # Camelyon16: each class has its own count
    ["case12-tumour", "case13-normal"], ["P_1", "P-1"], ["abnormal-x", "x"], ["tumours-x", "x"], ["TCGA-AA", "TCGA-AB"],
])  # fmt: skip
def test_other_patients_are_others(patients: list[str]) -> None:
    assert not named_by_class(dict.fromkeys(patients, ""), CLASSES)
    assert not named_by_class({"P-a": "", "P-b": "", "P-1": ""}, ["a", "b", "1"])  # too short to mean anything


def store(path: Path, slide_id: str, seed: int, quickhash: str | None = None) -> Path:
    features = np.random.default_rng(seed).normal(size=(6, 4))
    write_store(
        path,
        np.stack([np.arange(6), np.zeros(6)], 1) * 256,
        features,
        StoreAttributes(
            slide_id=slide_id, cohort="a", patch_px=256, patch_px_level0=256.0, mpp=0.5, level0_mpp=0.5,
            level0_width=2048, level0_height=2048, magnification=20.0, encoder="e", encoder_weights_sha256="f" * 64,
            tiling_hash="t", source={"name": f"{slide_id}.svs", "size": seed, "quickhash": quickhash}, created_by="x",
        ),
    )  # fmt: skip
    return path


def table(folder: Path, cohort: str, stores: dict[str, Path], patient: str = "", **status: str) -> Path:
    path = folder / f"{cohort}.csv"
    rows = [(name, patient or f"P-{name}", "tumour", status.get(name, "ready"), file) for name, file in stores.items()]
    pd.DataFrame(rows, columns=["slide_id", "patient_id", "label", "status", "store"]).to_csv(path, index=False)
    return path


def test_the_same_content_is_refused_whatever_its_name_and_cohort(tmp_path: Path) -> None:
    stores = {name: store(tmp_path / f"{name}.zip", name, seed) for seed, name in enumerate(["s0", "s1", "s2"])}
    copy = store(tmp_path / "copy.zip", "copy", seed=1)
    fine = {"a": table(tmp_path, "a", stores), "b": table(tmp_path, "b", {"copy": copy}, copy="failed")}
    check_content(fine)
    with pytest.raises(LeakageError) as caught:
        check_content(fine | {"b": table(tmp_path, "b", {"copy": copy})})
    assert "  - s1 (cohort a, patient P-s1, tumour); copy (cohort b, patient P-copy, tumour)\n" in str(caught.value)
    assert "Fill 'exclude'" in str(caught.value)


def test_the_same_file_encoded_otherwise_is_known_by_its_quickhash(tmp_path: Path) -> None:
    stores = {"one": store(tmp_path / "1.zip", "one", 1, "q"), "two": store(tmp_path / "2.zip", "two", 2, "q")}
    with pytest.raises(LeakageError, match=r"one .*; two "):
        check_content({"a": table(tmp_path, "a", stores)})
    shutil.copy(store(tmp_path / "3.zip", "two", 2, "r"), tmp_path / "2.zip")
    check_content({"a": table(tmp_path, "a", stores)})


def test_content_twice_in_one_patient_is_said_and_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stores = {name: store(tmp_path / f"{name}.zip", name, seed=1) for name in ("one", "two", "out")}
    check_content({"a": table(tmp_path, "a", stores, patient="P7", out="excluded")})
    (said,) = caplog.messages
    assert said.startswith(
        "one (cohort a, patient P7, tumour); two (cohort a, patient P7, tumour) have the same content"
    )
    assert "out" not in said
