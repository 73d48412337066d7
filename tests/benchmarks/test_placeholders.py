"""The paper's cohorts at full size: their configurations are whole, and what they resolve to."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from benchmarks.placeholders import COHORTS, CONFIGS, make_cohort
from gmmamba.config import load_config

EXPECTED = {  # slides by class, patients, mpp, folds x seeds, datasets
    "tcga-brca": ({"IDC": 831, "ILC": 210}, 977, 1.0, 5, ["tcga-brca"]),
    "tcga-esca": ({"SCC": 90, "ADC": 66}, 156, 0.5, 5, ["tcga-esca"]),
    "bracs": ({"benign": 265, "atypical": 89, "malignant": 193}, 547, 1.0, 5, ["bracs", "bracs-vit"]),
    "tcga-lung": ({"LUAD": 467, "LUSC": 474}, 941, 0.5, 5, ["tcga-lung"]),
}
EXPERIMENTS = ["gmmamba", "published", "abmil", "max", "mean"]


def test_every_cohort_of_the_paper_has_a_configuration() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"models", "tables", "poster", *COHORTS}


@pytest.mark.parametrize("name", COHORTS)
def test_the_configuration_of_a_cohort_of_the_paper(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = COHORTS[name].table is None
    labels = tmp_path if made_up else request.getfixturevalue("shared") / "data/labels"
    make_cohort(tmp_path, name, labels)
    monkeypatch.chdir(tmp_path)  # paths of a configuration are relative to the project
    config = load_config(yaml.safe_load(Path("config.yaml").read_text()))

    slides = [slide for slide in config.cohorts[name].slides.values() if not slide.exclude]
    counts, patients = Counter(slide.label for slide in slides), {slide.patient_id for slide in slides}
    print(f"{name}: {len(slides)} slides of {len(patients)} patients, {dict(counts)}")
    expected_counts, expected_patients, mpp, runs, datasets = EXPECTED[name]
    assert (counts, len(patients)) == (expected_counts, expected_patients)
    assert config.cohorts[name].tiling["mpp"] == mpp
    assert [(d.name, set(d.classes)) for d in config.datasets.values()] == [(d, set(counts)) for d in datasets]
    assert all(len(d.folds) * len(d.seeds) == runs for d in config.datasets.values())
    assert set(config.experiments) == {(dataset, name) for dataset in datasets for name in EXPERIMENTS}
    assert {encoder["weights"] for encoder in config.encoders.values()} == {"pretrained"}
