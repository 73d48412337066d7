import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gmmamba.evaluation import Evaluation, evaluate
from gmmamba.figures import GRID, SlidePictures, roc_on_grid
from gmmamba.prediction import predict
from gmmamba.report import check_complete, choose_examples, format_scores, read_runs, report, summary
from gmmamba.splits import SplitSettings, split_dataset
from gmmamba.training import train
from tests.gmmamba.synthetic import CLASSES, ENCODER, experiment, make_dataset

FOLDS = [0, 1]
METHODS = ["gmmamba", "abmil", "mean"]


class Page(HTMLParser):
    """Collects what a test asks about a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.references: list[str] = []
        self.headings: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.references += [values[name] for name in ("src", "href", "srcset", "data", "action") if name in values]
        if tag == "img":
            self.images.append(values)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that the report reads, made by the stages before it, on two cohorts."""
    folder = tmp_path_factory.mktemp("report")
    slide_tables, location = make_dataset(folder, patients=9, cohort="north")
    more_tables, more_location = make_dataset(folder, patients=4, cohort="south", seed=1)
    slide_tables |= more_tables
    location |= more_location
    splits, results = folder / "splits.csv", folder / "results"
    split_dataset(slide_tables, CLASSES, SplitSettings(folds=2), splits)
    experiments = [experiment(method, epochs=2) for method in METHODS]
    for e in experiments:
        groups = location if e["grouping"] else None
        files = []
        for fold in FOLDS:
            run = results / str(e["name"]) / f"fold{fold}_seed0"
            train(e, fold, 0, splits, slide_tables, groups, run, threads=1)
            files.append(run / "predictions.csv")
            predict(run, fold, 0, splits, slide_tables, groups, files[-1], run / "attention.npz")
        folder = results / str(e["name"])
        evaluate(files, CLASSES, Evaluation(), folder / "metrics.csv", folder / "pooled.csv")
    return {
        "dataset": "two-hospitals",
        "experiments": experiments,
        "folds": FOLDS,
        "seeds": [0],
        "classes": CLASSES,
        "encoder": {"name": ENCODER, "model": "resnet18", "weights": "random", "seed": 0},
        "slide_tables": slide_tables,
        "splits": splits,
        "groups": {(cohort, "location-4"): path for cohort, path in location.items()},
        "results": results,
        "settings": {"title": "Nodes & <nodules>", "example_slides": 3},
        "config": {"training": {"epochs": 2}},
    }


def write(finished: dict[str, Any], folder: Path, **changes: Any) -> str:
    report(**(finished | changes), output=folder / "report.html", table=folder / "table.csv",
           accounting=folder / "accounting.csv")  # fmt: skip
    return (folder / "report.html").read_text()


def test_the_page_needs_nothing_but_itself_and_shows_every_picture(finished: dict[str, Any], tmp_path: Path) -> None:
    text = write(finished, tmp_path)
    page = Page(text)
    assert all(ref.startswith(("data:image/", "#")) for ref in page.references)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    # A ROC and a training picture each experiment; each example: the slide, the groups, two attentions.
    assert len(page.images) == 2 * len(METHODS) + 3 * 4
    for image in page.images:
        assert image["alt"]
        kind, _, content = image["src"].partition(";base64,")
        decoded = base64.b64decode(content)
        if kind == "data:image/svg+xml":
            assert ElementTree.fromstring(decoded).tag.endswith("svg")
        else:
            assert Image.open(io.BytesIO(decoded)).size[0] > 300
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert "Nodes &amp; &lt;nodules&gt;" in text
    assert "randomly initialised encoder (resnet18): a demonstration, not a result" in text
    for reason in ("tile: the file ends early", "not of this organ"):
        assert text.count(reason) == 2  # one in each cohort


def test_the_banner_stands_only_where_the_weights_are_random(finished: dict[str, Any], tmp_path: Path) -> None:
    text = write(finished, tmp_path, encoder={"name": ENCODER, "model": "resnet18", "weights": "pretrained"})
    assert "randomly initialised" not in text


def test_the_same_inputs_give_the_same_page(finished: dict[str, Any], tmp_path: Path) -> None:
    assert write(finished, tmp_path / "a") == write(finished, tmp_path / "b")


def test_accounting_adds_up(finished: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(finished, tmp_path)
    table = pd.read_csv(tmp_path / "accounting.csv")
    assert list(table["cohort"]) == ["north", "south"]
    assert list(table["in_sheet"]) == [len(pd.read_csv(path)) for path in finished["slide_tables"].values()]
    assert (table["in_sheet"] == table[["excluded", "failed", "not_tested", "predicted"]].sum(axis=1)).all()
    assert (table["not_tested"] == 0).all()  # a k-fold tests every ready slide
    assert table[["excluded", "failed"]].to_numpy().tolist() == [[1, 1], [1, 1]]

    # One fold only: the other's slides are in no test part, and are counted as such.
    metrics = finished["results"] / "mean" / "metrics.csv"
    kept = metrics.read_bytes()
    run = finished["results"] / "mean" / "fold0_seed0"
    evaluate([run / "predictions.csv"], CLASSES, Evaluation(), metrics, metrics.with_name("pooled.csv"))
    try:
        mean_only = [e for e in finished["experiments"] if e["name"] == "mean"]
        text = write(finished, tmp_path, folds=[0], experiments=mean_only)
    finally:
        metrics.write_bytes(kept)
    table = pd.read_csv(tmp_path / "accounting.csv")
    assert (table["not_tested"] > 0).all()
    assert (table["in_sheet"] == table[["excluded", "failed", "not_tested", "predicted"]].sum(axis=1)).all()
    assert "Example slides" not in text  # mean pooling has no attention to show

    summary(tmp_path)
    printed = capsys.readouterr().out
    assert "AUROC" in printed
    assert str(tmp_path / "report.html") in printed
    assert "north" in printed


def test_external_validation_is_told_from_cross_validation(finished: dict[str, Any], tmp_path: Path) -> None:
    """Every fold tests the same cohort: its slides are counted once, and the page says what the sd then means."""
    tables = dict(finished["slide_tables"])
    south = pd.read_csv(tables["south"], dtype=str, keep_default_na=False)
    tables["south"] = tmp_path / "south.csv"  # other people than those of north
    south.assign(patient_id="S-" + south["patient_id"]).to_csv(tables["south"], index=False)
    splits, results = tmp_path / "splits.csv", tmp_path / "results"
    split_dataset(tables, CLASSES, SplitSettings(scheme="external", folds=2, test_cohorts=["south"]), splits)
    files = [results / "mean" / f"fold{fold}_seed0" / "predictions.csv" for fold in FOLDS]
    for fold, file in zip(FOLDS, files, strict=True):
        train(experiment("mean", epochs=2), fold, 0, splits, tables, None, file.parent, threads=1)
        predict(file.parent, fold, 0, splits, tables, None, file, file.parent / "attention.npz")
    evaluate(files, CLASSES, Evaluation(), results / "mean" / "metrics.csv", results / "mean" / "pooled.csv")
    text = write(finished, tmp_path, experiments=[experiment("mean", epochs=2)], slide_tables=tables, splits=splits,
                 results=results)  # fmt: skip

    ready = (south["status"] == "ready").sum()
    accounting = pd.read_csv(tmp_path / "accounting.csv").set_index("cohort")
    assert accounting["predicted"].to_dict() == {"north": 0, "south": ready}
    assert accounting.loc["south", "not_tested"] == 0
    assert list(pd.read_csv(results / "mean" / "metrics.csv")["n"][:2]) == [ready, ready]
    assert f"{ready} of the {ready} tested slides are in the test part of several folds" in text
    assert text.count("(tests south)") == 2
    assert "in the test part of several folds" not in write(finished, tmp_path)  # a k-fold


def test_table_has_mean_and_sd_of_the_runs(finished: dict[str, Any], tmp_path: Path) -> None:
    write(finished, tmp_path)
    table = pd.read_csv(tmp_path / "table.csv").set_index("experiment")
    assert list(table.index) == METHODS
    for method in METHODS:
        metrics = pd.read_csv(finished["results"] / method / "metrics.csv", dtype={"fold": str}).set_index("fold")
        runs = metrics.loc[["0", "1"], "auroc"]
        assert table.loc[method, "auroc_mean"] == pytest.approx(runs.mean())
        assert table.loc[method, "auroc_sd"] == pytest.approx(runs.std(ddof=1))
        assert table.loc[method, "runs"] == 2


def test_best_of_a_column_is_marked() -> None:
    columns = {f"{name}_{kind}": [0.5, 0.5] for name in ("accuracy", "balanced_accuracy", "macro_f1", "f1_positive",
                                                         "auprc") for kind in ("mean", "sd")}  # fmt: skip
    scores = pd.DataFrame({"experiment": ["a", "b"], "method": ["a", "b"], "runs": [5, 1],
                           "auroc_mean": [0.9123, 0.87], "auroc_sd": [0.0342, np.nan]} | columns)  # fmt: skip
    rows = format_scores(scores)
    assert rows[0]["cells"]["auroc"] == {"text": "0.912 ± 0.034", "best": True}
    assert rows[1]["cells"]["auroc"] == {"text": "0.870", "best": False}  # one run has no sd
    assert all(row["cells"]["accuracy"]["best"] for row in rows)


def test_a_slide_without_prediction_stops_the_report(finished: dict[str, Any]) -> None:
    runs = {"abmil": read_runs(finished["results"] / "abmil", [0], [0])}
    parts = pd.read_csv(finished["splits"], dtype=str)
    check_complete(runs, parts)
    parts.loc[parts["fold0"] != "test", "fold0"] = "test"
    with pytest.raises(ValueError, match=r"predictions.csv and the test part of fold 0 differ in \d+ slides"):
        check_complete(runs, parts)


def test_examples_are_the_most_confident_of_each_kind(finished: dict[str, Any]) -> None:
    run = read_runs(finished["results"] / "abmil", [0], [0])[0]
    positive = [0.9, 0.95, 0.2, 0.4, 0.1, 0.8]
    true = ["tumour", "tumour", "normal", "tumour", "tumour", "normal"]
    table = pd.DataFrame({"slide_id": list("abcdef"), "true": true, "prob_tumour": positive})
    table["prob_normal"] = 1 - table["prob_tumour"]
    table["predicted"] = np.where(table["prob_tumour"] > 0.5, "tumour", "normal")
    chosen = choose_examples([type(run)(run.folder, 0, 0, table, run.history, run.card)], CLASSES, 5)
    assert [(e.slide_id, e.why) for e in chosen] == [
        ("b", "confident and right: tumour"),
        ("c", "confident and right: normal"),
        ("e", "confident and wrong"),
        ("a", "confident and right: tumour"),
        ("f", "confident and wrong"),
    ]


def test_roc_on_grid_is_exact_at_its_steps() -> None:
    true = np.array([1, 1, 0, 0])
    positive = np.array([0.9, 0.4, 0.6, 0.1])
    curve = roc_on_grid(true, np.stack([1 - positive, positive], axis=1))
    assert (curve[GRID < 0.5] == 0.5).all()
    assert (curve[GRID >= 0.5] == 1).all()
    three = np.eye(3)[[0, 1, 2]]
    assert (roc_on_grid(np.array([0, 1, 2]), three) == 1).all()


def test_patches_are_painted_where_they_lie(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), "white").save(tmp_path / "t.jpg")
    coords = np.array([[0, 0], [9000, 4000]], np.int32)
    drawn = SlidePictures(tmp_path / "t.jpg", coords, patch_px_level0=1000.0, level0_width=10000)
    picture = np.asarray(drawn.attention(np.array([0.75, 0.25])))
    assert picture.shape == (280, 560, 3)
    changed = (picture != 255).any(axis=2)
    assert changed[:56, :56].all()
    assert changed[224:, 504:].all()
    assert changed.sum() == 2 * 56 * 56
    masked = np.asarray(drawn.attention(np.array([1.0, 0.0])))
    assert (masked[224:, 504:] == 255).all()  # a patch that was masked away keeps the slide's grey
    assert json.dumps(drawn.corners.tolist()) == "[[0, 0], [504, 224]]"
