"""The paper's tables: their rows are experiments, their cells the runs' numbers in the poster's layout."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from gmmamba.config import TABLES, Config, load_config
from gmmamba.evaluation import Evaluation, evaluate
from gmmamba.table_rows import Row, table_of
from gmmamba.tables import write_table

ROOT = Path(__file__).parents[2]
DEFINED = {name: table_of(table) for name, table in yaml.safe_load(TABLES.read_text())["tables"].items()}
CLASSES = ["normal", "tumour"]


def load(tmp_path: Path, **settings: Any) -> Config:
    """The demo's configuration with slides that nobody reads."""
    rows = [f"S{i},P{i},{CLASSES[i % 2]},s{i}.svs" for i in range(20)]
    for i in range(20):
        (tmp_path / f"s{i}.svs").touch()
    (tmp_path / "slides.csv").write_text("\n".join(["slide_id,patient_id,label,path", *rows]))
    text = (ROOT / "config.yaml").read_text().replace("results/demo/cohort/slides.csv", str(tmp_path / "slides.csv"))
    return load_config(yaml.safe_load(text) | settings)


@pytest.mark.parametrize("protocol", ["unified", "official"])
def test_every_row_is_an_experiment(tmp_path: Path, protocol: str) -> None:
    config = load(tmp_path, tables={"protocol": protocol})
    for experiment, name in config.table_experiments().items():
        row = next(table.rows[name] for table in config.tables.values() if name in table.rows)
        resolved = config.table_experiment("demo", name)
        assert resolved.name == experiment == f"{name}.{protocol}"
        assert ("css" in row.overrides) <= ("css" in resolved.model)


def test_the_posters_rows_are_all_there() -> None:
    assert Counter({name: len(table.rows) for name, table in DEFINED.items()}) == {
        "methods": 17, "ablation": 6, "css": 7, "plugins": 10, "groups": 4, "mask_ratio": 7,
    }  # fmt: skip
    rows: dict[str, Row] = {}
    for table in DEFINED.values():
        assert table.reference in {None, *table.rows}
        for name, row in table.rows.items():
            assert row.against in {None, *table.rows}
            assert set(row.parts) <= set(table.parts)
            same = rows.setdefault(name, row)
            assert (same.model, same.overrides) == (row.model, row.overrides)  # one name, one experiment


def test_tables_take_their_own_training_and_all_datasets_unless_told(tmp_path: Path) -> None:
    config = load(tmp_path, tables={"training": {"epochs": 9}})
    assert config.table_experiment("demo", "with-bmp").training["epochs"] == 9
    assert config.table_datasets == {name: ["demo"] for name in DEFINED}


def test_the_posters_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = yaml.safe_load((ROOT / "config" / "poster.yaml").read_text())
    for i in range(90):
        (tmp_path / f"s{i}.svs").touch()
    monkeypatch.chdir(tmp_path)
    for dataset in raw["datasets"].values():
        (cohort,) = dataset["cohorts"]
        rows = [
            f"S{i},P{i},{dataset['classes'][i % len(dataset['classes'])]},s{i}.svs,"
            f"{('train', 'val', 'test')[i // 3 % 3]}"
            for i in range(90)
        ]
        Path(f"{cohort}.csv").write_text("\n".join(["slide_id,patient_id,label,path,split", *rows]))
    config = load_config(raw)
    assert {name: len(d.folds) * len(d.seeds) for name, d in config.datasets.items()} == dict.fromkeys(
        raw["datasets"], 5
    )
    assert config.table_datasets["methods"] == list(raw["datasets"])
    assert config.table_datasets["mask_ratio"] == ["tcga-esca", "tcga-lung"]


def make_runs(folder: Path, quality: float, seeds: int = 2) -> None:
    """Two folds of ten test slides a seed; `quality` is how far the classes' probabilities are apart."""
    predictions = []
    for fold in range(2):
        for seed in range(seeds):
            rng = np.random.default_rng([fold, seed])
            true = np.arange(10) // 2 % 2
            p = 1 / (1 + np.exp(-(quality * (true - 0.5) + rng.normal(size=10))))
            path = folder / f"fold{fold}_seed{seed}" / "predictions.csv"
            path.parent.mkdir(parents=True)
            pd.DataFrame({
                "slide_id": [f"S{fold}{i}" for i in range(10)], "patient_id": [f"P{fold}{i // 2}" for i in range(10)],
                "cohort": "c", "fold": fold, "seed": seed, "part": "test", "true": [CLASSES[t] for t in true],
                "predicted": [CLASSES[int(x > 0.5)] for x in p], "prob_normal": 1 - p, "prob_tumour": p,
            }).to_csv(path, index=False)  # fmt: skip
            predictions.append(path)
    evaluate(predictions, CLASSES, Evaluation(), folder / "metrics.csv", folder / "pooled.csv")


def made(tmp_path: Path, table: dict[str, Any]) -> tuple[pd.DataFrame, str, str]:
    files = [tmp_path / f"table.{form}" for form in ("csv", "md", "tex")]
    write_table(table, "unified", "demo_1", CLASSES, [0, 1], [0, 1], tmp_path, *files)
    return pd.read_csv(files[0], keep_default_na=False), files[1].read_text(), files[2].read_text()


RANKED = {
    "title": "Parts", "heading": "Model", "metrics": ["accuracy", "auroc", "f1"], "reference": "good",
    "parts": ["LG", "A&B"],
    "rows": {"bad": {"label": "w/o × Q"}, "fair": {"label": "50 %", "parts": ["LG"]},
             "good": {"label": "GMMamba", "parts": ["LG", "A&B"]}},
}  # fmt: skip


def test_a_table_has_the_numbers_of_its_runs_best_bold_and_second_underlined(tmp_path: Path) -> None:
    for name, quality in {"bad": 0.0, "fair": 1.0, "good": 6.0}.items():
        make_runs(tmp_path / f"{name}.unified", quality)
    numbers, markdown, latex = made(tmp_path, RANKED)
    good = pd.read_csv(tmp_path / "good.unified" / "metrics.csv", index_col="fold")
    row = numbers.set_index("experiment").loc["good.unified"]
    assert (row["runs"], row["LG"], row["compared_with"], row["auroc_difference"]) == (4, 1, "", "")
    assert float(row["auroc_mean"]) == pytest.approx(good.at["mean", "auroc"])
    bad = numbers.iloc[0]
    assert float(bad["auroc_low"]) <= float(bad["auroc_difference"]) <= float(bad["auroc_high"]) < 0

    mean, sd = good.loc["mean"], good.loc["sd"]
    lines = markdown.splitlines()
    assert lines[0].startswith("Parts, demo_1: mean ± sd over 4 folds and seeds, unified protocol. ΔAUC: ")
    assert lines[2] == "| Model | LG | A&B | Accuracy | AUC | F1 | ΔAUC [95 %] |"
    cells = [f"**{mean[name]:.3f} ± {sd[name]:.3f}**" for name in ("accuracy", "auroc", "f1_positive")]
    assert lines[-1] == f"| GMMamba | ✓ | ✓ | {' | '.join(cells)} |  |"
    assert lines[-2].startswith("| 50 % | ✓ | ✗ | <u>0.")
    assert lines[-3].startswith("| w/o × Q | ✗ | ✗ | 0.")
    assert r"Model & LG & A\&B & Accuracy & AUC & F1 & $\Delta$AUC [95 \%] \\" in latex
    assert rf"\textbf{{{mean['accuracy']:.3f} $\pm$ {sd['accuracy']:.3f}}}" in latex
    assert r"50 \% & $\checkmark$ & $\times$ & \underline{0." in latex
    assert "demo\\_1" in latex


def test_gains_are_shown_over_the_host(tmp_path: Path) -> None:
    make_runs(tmp_path / "abmil.unified", 1.0)
    make_runs(tmp_path / "css-abmil.unified", 6.0)
    rows = {"abmil": {"label": "ABMIL"}, "css-abmil": {"label": "CSS+ABMIL", "against": "abmil"}}
    table = {"title": "Plug-in", "heading": "$G$", "metrics": ["accuracy"], "rows": rows}
    numbers, markdown, latex = made(tmp_path, table)
    gain = float(numbers.iloc[1]["accuracy_gain"])
    assert gain == pytest.approx(numbers["accuracy_mean"][1] - numbers["accuracy_mean"][0])
    assert gain > 0
    assert f"(↑ {100 * gain:.1f}%) | +" in markdown.splitlines()[-1]
    assert "**" not in markdown
    assert rf"($\uparrow$ {100 * gain:.1f}\%)" in latex
    assert "\n$G$ & Accuracy" in latex


def test_rows_tested_on_other_slides_are_refused(tmp_path: Path) -> None:
    for name in RANKED["rows"]:
        make_runs(tmp_path / f"{name}.unified", 1.0)
    path = tmp_path / "fair.unified" / "fold1_seed1" / "predictions.csv"
    path.write_text(path.read_text().replace("S13", "S99"))
    with pytest.raises(ValueError, match="bad and fair tested other slides, folds or seeds"):
        made(tmp_path, RANKED)
