import base64
import io
import json
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score

from gmmamba.charts import GRID, calibration, precision_on_grid, roc_on_grid
from gmmamba.comparison import compare
from gmmamba.evaluation import Evaluation, evaluate
from gmmamba.figures import SlidePictures
from gmmamba.metrics import METRICS
from gmmamba.prediction import predict
from gmmamba.report import Outputs, cost_picture, report, summary
from gmmamba.report_runs import Run, check_complete, read_metrics, read_runs
from gmmamba.report_slides import Drawer, Example, choose_errors, choose_examples
from gmmamba.report_tables import comparison_rows, confusion, format_scores, wrong_calls
from gmmamba.slide_tables import read_slide_tables
from gmmamba.splits import SplitSettings, split_dataset
from gmmamba.training import train
from tests.gmmamba.finished import FOLDS, METHODS, make_finished
from tests.gmmamba.synthetic import CLASSES, ENCODER, experiment


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
    return make_finished(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def written(finished: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the four outputs."""
    folder = tmp_path_factory.mktemp("written")
    write(finished, folder)
    return folder


def write(finished: dict[str, Any], folder: Path, **changes: Any) -> str:
    names = ("report.html", "table.csv", "accounting.csv", "report.json")
    report(**(finished | changes), outputs=Outputs(*(folder / name for name in names)))
    return (folder / "report.html").read_text()


def test_the_page_needs_nothing_but_itself_and_shows_every_picture(finished: dict[str, Any], written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert all(ref.startswith(("data:image/", "#")) for ref in page.references)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    # Three charts and a training picture each experiment, one of all; each slide: itself, the groups, two attentions.
    n_errors = len(pd.concat([run.test for run in read_runs(finished["results"] / "gmmamba", FOLDS, [0])])
                   .query("true != predicted"))  # fmt: skip
    n_right = 3
    assert len(page.images) == 4 * len(METHODS) + 1 + 4 * (n_right + min(n_errors, 4))
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
    mean = [e for e in finished["experiments"] if e["name"] == "mean"]
    encoder = {"name": ENCODER, "model": "resnet18", "weights": "pretrained"}
    assert "randomly initialised" not in write(finished, tmp_path, encoder=encoder, experiments=mean)


def test_the_same_inputs_give_the_same_page(finished: dict[str, Any], written: Path, tmp_path: Path) -> None:
    assert write(finished, tmp_path) == (written / "report.html").read_text()


def test_accounting_adds_up(
    finished: dict[str, Any], written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(written / "accounting.csv")
    assert list(table["cohort"]) == ["north", "south"]
    assert list(table["in_sheet"]) == [len(pd.read_csv(path)) for path in finished["slide_tables"].values()]
    assert (table["in_sheet"] == table[["excluded", "failed", "not_tested", "predicted"]].sum(axis=1)).all()
    assert (table["not_tested"] == 0).all()  # a k-fold tests every ready slide
    assert table[["excluded", "failed"]].to_numpy().tolist() == [[1, 1], [1, 1]]

    # One fold only: the other's slides are in no test part, and are counted as such.
    folder = finished["results"] / "mean"
    files = [folder / "metrics.csv", folder / "pooled.csv"]
    kept = [file.read_bytes() for file in files]
    evaluate([folder / "fold0_seed0" / "predictions.csv"], CLASSES, Evaluation(), *files)
    try:
        mean_only = [e for e in finished["experiments"] if e["name"] == "mean"]
        text = write(finished, tmp_path, folds=[0], experiments=mean_only)
    finally:
        for file, content in zip(files, kept, strict=True):
            file.write_bytes(content)
    table = pd.read_csv(tmp_path / "accounting.csv")
    assert (table["not_tested"] > 0).all()
    assert (table["in_sheet"] == table[["excluded", "failed", "not_tested", "predicted"]].sum(axis=1)).all()
    assert "Example slides" not in text  # mean pooling has no attention to show

    summary(tmp_path)
    printed = capsys.readouterr().out
    assert "AUROC" in printed
    assert str(tmp_path / "report.html") in printed
    assert "north" in printed


def test_external_validation_is_told_from_cross_validation(
    finished: dict[str, Any], written: Path, tmp_path: Path
) -> None:
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
    compare({"mean": files}, Evaluation(), results / "comparisons.csv")
    text = write(finished, tmp_path, experiments=[experiment("mean", epochs=2)], slide_tables=tables, splits=splits,
                 results=results)  # fmt: skip

    ready = (south["status"] == "ready").sum()
    accounting = pd.read_csv(tmp_path / "accounting.csv").set_index("cohort")
    assert accounting["predicted"].to_dict() == {"north": 0, "south": ready}
    assert accounting.loc["south", "not_tested"] == 0
    assert list(pd.read_csv(results / "mean" / "metrics.csv")["n"][:2]) == [ready, ready]
    assert f"{ready} of the {ready} tested slides are in the test part of several folds" in text
    assert text.count("(tests south)") == 2
    assert "in the test part of several folds" not in (written / "report.html").read_text()  # a k-fold


def test_table_has_mean_and_sd_of_the_runs(finished: dict[str, Any], written: Path) -> None:
    table = pd.read_csv(written / "table.csv").set_index("experiment")
    assert list(table.index) == METHODS
    for method in METHODS:
        metrics = pd.read_csv(finished["results"] / method / "metrics.csv", dtype={"fold": str}).set_index("fold")
        runs = metrics.loc[["0", "1"], "auroc"]
        assert table.loc[method, "auroc_mean"] == pytest.approx(runs.mean())
        assert table.loc[method, "auroc_sd"] == pytest.approx(runs.std(ddof=1))
        assert table.loc[method, "runs"] == 2


def test_best_of_a_column_is_marked_and_intervals_stand_below() -> None:
    kinds = ("mean", "sd", "pooled", "low", "high")
    columns = {f"{name}_{kind}": [0.5, 0.5] for name in METRICS for kind in kinds}
    scores = pd.DataFrame({"experiment": ["a", "b"], "method": ["a", "b"], "runs": [5, 1]} | columns)
    scores["auroc_mean"], scores["auroc_sd"] = [0.9123, 0.87], [0.0342, np.nan]
    scores["auroc_pooled"], scores["auroc_low"], scores["auroc_high"] = [0.9, 0.8], [0.81, np.nan], [0.97, np.nan]
    rows = format_scores(scores)
    whole = {"value": "0.900", "interval": "[0.810, 0.970]"}
    assert rows[0]["cells"]["auroc"] == {"text": "0.912 ± 0.034", "best": True, "pooled": whole}
    one_run = {"value": "0.800", "interval": "–"}  # no sd, and here no interval
    assert rows[1]["cells"]["auroc"] == {"text": "0.870", "best": False, "pooled": one_run}
    assert all(row["cells"]["accuracy"]["best"] for row in rows)


def test_a_slide_without_prediction_stops_the_report(finished: dict[str, Any]) -> None:
    runs = {"abmil": read_runs(finished["results"] / "abmil", [0], [0])}
    parts = pd.read_csv(finished["splits"], dtype=str)
    check_complete(runs, parts)
    parts.loc[parts["fold0"] != "test", "fold0"] = "test"
    with pytest.raises(ValueError, match=r"predictions.csv and the test part of fold 0 differ in \d+ slides"):
        check_complete(runs, parts)


@pytest.fixture
def six(finished: dict[str, Any]) -> Run:
    """A run on six slides, of which it calls three wrong."""
    run = read_runs(finished["results"] / "abmil", [0], [0])[0]
    positive = [0.9, 0.95, 0.2, 0.4, 0.1, 0.8]
    true = ["tumour", "tumour", "normal", "tumour", "tumour", "normal"]
    table = pd.DataFrame({"slide_id": list("abcdef"), "patient_id": list("ABCDEF"), "true": true,
                          "prob_tumour": positive})  # fmt: skip
    table["prob_normal"] = 1 - table["prob_tumour"]
    table["predicted"] = np.where(table["prob_tumour"] > 0.5, "tumour", "normal")
    return replace(run, fold=0, seed=0, test=table)


def with_threshold(threshold: float) -> pd.DataFrame:
    return pd.DataFrame({"fold": ["0", "mean"], "seed": ["0", ""], "threshold": [threshold, threshold]})


@pytest.mark.parametrize(("threshold", "right", "wrong"), [
    (0.5, "bca", {"e": "normal", "f": "tumour", "d": "normal"}),
    (0.3, "bcad", {"e": "normal", "f": "tumour"}),  # d has 0.4
    (0.85, "bcaf", {"e": "normal", "d": "normal"}),  # f has 0.8
])  # fmt: skip
def test_slides_shown_are_the_most_confident_right_and_wrong_calls(
    six: Run, threshold: float, right: str, wrong: dict[str, str]
) -> None:
    metrics = with_threshold(threshold)
    examples = choose_examples([six], metrics, CLASSES, 5)
    assert [e.slide_id for e in examples] == list(right)
    assert {e.slide_id: e.why for e in examples}["c"] == "confident and right: normal"
    errors = choose_errors([six], metrics, CLASSES, 3)
    assert [(e.slide_id, e.why) for e in errors] == [(name, f"called {call}") for name, call in wrong.items()]


def test_calls_are_counted_by_the_threshold_of_the_run(six: Run) -> None:
    def counts(threshold: float) -> list[list[int]]:
        rows = confusion([six], with_threshold(threshold), CLASSES)
        assert [row["name"] for row in rows] == CLASSES
        return [[cell["count"] for cell in row["cells"]] for row in rows]

    assert counts(0.5) == [[1, 1], [2, 2]]
    assert counts(0.3) == [[1, 1], [1, 3]]
    assert counts(0.85) == [[2, 0], [2, 2]]
    metrics = {"a": with_threshold(0.5), "b": with_threshold(0.85)}
    wrong = wrong_calls({"a": [six], "b": [six]}, metrics, CLASSES)
    assert list(wrong["slide_id"]) == ["e", "f", "d"]  # f, the only one that b calls right, too
    assert list(wrong["a"]) == pytest.approx([0.1, 0.2, 0.4])


def test_a_map_says_what_its_run_calls_the_slide(finished: dict[str, Any]) -> None:
    slides = read_slide_tables(finished["slide_tables"])
    run = read_runs(finished["results"] / "abmil", [0], [0])[0]
    first = run.test.iloc[0]
    for threshold, call in ((-0.1, "tumour"), (1.1, "normal")):
        drawer = Drawer([{"name": "abmil", "grouping": None}], {"abmil": [run]}, {"abmil": with_threshold(threshold)},
                        CLASSES, slides, {})  # fmt: skip
        *_, attention = drawer.row(Example(first["slide_id"], 0, 0, ""))["pictures"]
        assert attention["alt"].endswith(f"called {call}")
        assert attention["note"] == f"P(tumour) = {first['prob_tumour']:.2f}"


def test_the_numbers_of_the_page_are_those_of_the_files(finished: dict[str, Any], written: Path) -> None:
    text = (written / "report.html").read_text()
    for method in METHODS:
        pooled = pd.read_csv(finished["results"] / method / "pooled.csv").set_index(["level", "metric"])
        for key in (("slide", "auroc"), ("slide", "brier"), ("slide", "ece"), ("patient", "accuracy")):
            value, low, high = pooled.loc[key, ["value", "low", "high"]]
            assert f"{value:.3f}" in text
            assert f"[{low:.3f}, {high:.3f}]" in text
    comparisons = pd.read_csv(finished["results"] / "comparisons.csv")
    delong = comparisons[(comparisons["test"] == "delong") & (comparisons["level"] == "slide")]
    assert len(delong) == 3
    for row in delong.itertuples():
        assert f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" in text
    assert [row["test"] for row in comparison_rows(comparisons)] == ["DeLong"] * 3
    metrics = read_metrics(finished["results"] / "gmmamba")
    rows = confusion(read_runs(finished["results"] / "gmmamba", FOLDS, [0]), metrics, CLASSES)
    right = sum(row["cells"][i]["count"] for i, row in enumerate(rows))
    accuracy = pd.read_csv(finished["results"] / "gmmamba/pooled.csv").set_index(["level", "metric"])["value"]
    assert right / sum(row["n"] for row in rows) == pytest.approx(accuracy["slide", "accuracy"])


def test_what_was_said_of_the_sheets_stands_beside_the_splits(
    finished: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    mean = [e for e in finished["experiments"] if e["name"] == "mean"]
    assert "To be checked" not in (written / "report.html").read_text()
    assert "To be checked: P-normal & co." in unescape(
        write(finished, tmp_path, experiments=mean, notes=["P-normal & co"])
    )


def test_the_manifest_names_what_the_report_was_made_of(written: Path) -> None:
    manifest = json.loads((written / "report.json").read_text())
    assert manifest["experiments"] == {"gmmamba": "location-4", "abmil": None, "mean": None}
    assert manifest["evaluation"] == {"threshold": "argmax", "patient": "mean"}
    assert manifest["sheets"] == {"north": "north/slides.csv", "south": "south/slides.csv"}
    assert [Path(path).is_file() for _, _, path in manifest["groups"]] == [True, True]
    assert all(Path(path).is_file() for path in manifest["slide_tables"].values())


def test_cost_is_that_of_the_nearest_size_measured(finished: dict[str, Any], written: Path, tmp_path: Path) -> None:
    costs = pd.DataFrame({"model": ["abmil", "gmmamba", "abmil"], "label": ["ABMIL", "GMMamba", "ABMIL"],
                          "N": [100, 100, 10_000], "parameters": 1.0, "flops": [1e9, 4e9, 1e11],
                          "seconds": [0.01, 0.1, 1.0], "peak": 1.0})  # fmt: skip
    costs.to_csv(tmp_path / "cost.csv", index=False)
    assert 'id="cost"' not in (written / "report.html").read_text()
    text = write(finished, tmp_path, settings={"costs": str(tmp_path / "cost.csv")})
    assert "on a slide of 100 patches" in text
    costs.assign(model="other").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match=r"has the methods other and none of the experiments'"):
        write(finished, tmp_path, settings={"costs": str(tmp_path / "other.csv")})
    slides = pd.DataFrame({"status": ["ready"], "n_patches": ["9000"]})
    scores = pd.DataFrame({"experiment": ["mine"], "method": ["abmil"], "auroc_mean": [0.9]})
    assert cost_picture(tmp_path / "cost.csv", scores, slides)["size"] == 10_000


def test_roc_on_grid_is_exact_at_its_steps() -> None:
    true = np.array([1, 1, 0, 0])
    positive = np.array([0.9, 0.4, 0.6, 0.1])
    curve = roc_on_grid(true, np.stack([1 - positive, positive], axis=1))
    assert (curve[GRID < 0.5] == 0.5).all()
    assert (curve[GRID >= 0.5] == 1).all()
    three = np.eye(3)[[0, 1, 2]]
    assert (roc_on_grid(np.array([0, 1, 2]), three) == 1).all()


@given(st.integers(0, 10_000))
def test_the_area_under_precision_on_grid_is_average_precision(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = np.r_[0, 1, rng.integers(0, 2, 60)]
    positive = (rng.normal(size=62) + true).round(1)  # with ties
    curve = precision_on_grid(true, np.stack([-positive, positive], axis=1))
    assert curve[1:].mean() == pytest.approx(average_precision_score(true, positive), abs=0.01)


def test_calibration_counts_every_slide_once() -> None:
    true = np.array([0, 0, 1, 1, 1])
    positive = np.array([0.0, 0.12, 0.18, 0.95, 1.0])
    bins = calibration(true, np.stack([1 - positive, positive], axis=1)).set_index("bin")
    assert bins["n"].to_dict() == {0: 1, 1: 2, 9: 2}
    assert bins["observed"].to_dict() == {0: 0, 1: 0.5, 9: 1}
    assert bins.loc[1, "predicted"] == pytest.approx(0.15)
    assert bins.loc[1, ["low", "high"]].tolist() == pytest.approx([0.0945, 0.9055], abs=1e-3)  # Wilson, 1 of 2
    three = calibration(np.array([0, 1, 2]), np.array([[0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    assert three.set_index("bin")["observed"].to_dict() == {5: 0, 8: 1}


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
