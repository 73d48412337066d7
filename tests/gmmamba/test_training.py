import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from gmmamba import models
from gmmamba.data import BagReader, DataError, LabelledBag, load_bags
from gmmamba.metrics import METRICS
from gmmamba.prediction import predict
from gmmamba.splits import SplitSettings, split_dataset
from gmmamba.training import BestEpoch, TrainingSettings, train
from slidestore import StoreError, open_store, write_store
from tests.gmmamba.synthetic import CLASSES, DIM, ENCODER, attributes_of, experiment, make_dataset


def follow(best: BestEpoch, scores: list[float], losses: list[float] | None = None) -> int:
    """The epoch after which training stops."""
    for epoch, score in enumerate(scores, start=1):
        best.update(epoch, score, losses[epoch - 1] if losses else 1.0)
        if best.should_stop(epoch):
            return epoch
    return len(scores)


def test_the_published_protocol_keeps_and_stops_where_it_should() -> None:
    # Epoch 3 is best but too early to be kept; 10 is the first of the best later ones.
    scores = [0.5] * 100
    scores[2], scores[9], scores[30] = 1.9, 1.5, 1.5
    best = BestEpoch(select_after=5, patience=20, min_epochs=50)
    assert follow(best, scores) == 51  # patience ran out at 30, but not before epoch 51
    assert (best.epoch, best.score) == (10, 1.5)

    scores[44] = 1.6
    best = BestEpoch(5, 20, 50)
    assert follow(best, scores) == 65  # 20 epochs after the one that is kept
    assert best.epoch == 45

    rising = list(np.linspace(0, 1, 100))
    best = BestEpoch(5, 20, 50)
    assert follow(best, rising) == 100
    assert best.epoch == 100

    best = BestEpoch(5, 20, 50)
    follow(best, [1.0] * 6)
    assert best.epoch == 6  # the first epoch that may be kept

    best = BestEpoch(5, 20, 50)
    assert follow(best, [1.0] * 100, list(np.linspace(1, 0, 100))) == 51  # a falling loss does not prolong training
    assert best.epoch == 51  # but decides between equal scores


def test_settings_that_could_keep_no_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"training.epochs 5 must be above training.select_after 5"):
        TrainingSettings(epochs=5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dataset")
    slide_tables, groups = make_dataset(folder)
    splits = folder / "splits.csv"
    split_dataset(slide_tables, CLASSES, SplitSettings(folds=3), splits)
    return {"splits": splits, "slide_tables": slide_tables, "groups": groups}


def run(dataset: dict[str, Any], output: Path, method: str = "abmil", fold: int = 0, seed: int = 0, **kw: Any) -> Path:
    groups = dataset["groups"] if method == "gmmamba" else None
    train(experiment(method, **kw), fold, seed, dataset["splits"], dataset["slide_tables"], groups, output, threads=1)
    return output


def predict_run(dataset: dict[str, Any], folder: Path, method: str = "abmil", **kw: Any) -> pd.DataFrame:
    groups = dataset["groups"] if method == "gmmamba" else None
    arguments = {"fold": 0, "seed": 0, "splits": dataset["splits"], "slide_tables": dataset["slide_tables"]} | kw
    predict(folder, **arguments, groups=groups, predictions=folder / "predictions.csv",
            attention=folder / "attention.npz")  # fmt: skip
    return pd.read_csv(folder / "predictions.csv")


@pytest.mark.parametrize("method", ["abmil", "gmmamba"])
def test_two_runs_are_equal_bit_for_bit(dataset: dict[str, Any], tmp_path: Path, method: str) -> None:
    epochs = 2 if method == "gmmamba" else 3
    folders = [run(dataset, tmp_path / name, method, epochs=epochs) for name in "ab"]
    for folder in folders:
        predict_run(dataset, folder, method)
    for name in ("history.csv", "model.safetensors", "model.json", "predictions.csv", "attention.npz"):
        first, second = (folder / name for folder in folders)
        if name == "attention.npz":
            one, two = np.load(first), np.load(second)
            assert one.files == two.files
            assert all(one[key].tobytes() == two[key].tobytes() for key in one.files)
        else:
            assert first.read_bytes() == second.read_bytes(), name
    assert not list(tmp_path.glob("*/.*.part"))


def test_a_log_says_now_and_then_how_far_a_training_is(
    dataset: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(dataset, tmp_path / "short", "mean")
    assert "training:" not in capsys.readouterr().err
    monkeypatch.setattr("slidestore.progress.SECONDS", 0.0)
    run(dataset, tmp_path / "long", "mean")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training:")]
    assert re.match(r"training: 1 of \d+ epochs, 00:00 gone, about 00:\d\d left, loss=\d\.\d+, val=", lines[1])


def test_what_a_run_leaves(dataset: dict[str, Any], tmp_path: Path) -> None:
    folder = run(dataset, tmp_path, epochs=12, select_after=5, patience=2, min_epochs=8)
    history = pd.read_csv(folder / "history.csv")
    assert list(history.columns) == [
        "epoch", "train_loss", "val_loss", *[f"val_{name}" for name in METRICS], "val_score",
    ]  # fmt: skip
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0]
    np.testing.assert_allclose(history["val_score"], history["val_f1_positive"] + history["val_auroc"])

    card = json.loads((folder / "model.json").read_text())
    eligible = history[history["epoch"] > 5]
    best = eligible.sort_values(["val_score", "val_loss"], ascending=[False, True]).iloc[0]
    assert card["best_epoch"] == best["epoch"]
    assert card["validation_score"] == pytest.approx(eligible["val_score"].max())
    assert card["epochs_run"] == len(history)
    assert card["experiment"] == experiment("abmil", epochs=12, select_after=5, patience=2, min_epochs=8)
    assert (card["in_dim"], card["classes"], card["encoder"]) == (16, CLASSES, ENCODER)

    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # readable by whoever may read the others

    # The kept weights are those of the kept epoch: they give its validation score again.
    table = predict_run(dataset, folder)
    kept = history[history["epoch"] == card["best_epoch"]].iloc[0]
    validation = table[table["part"] == "val"]
    assert (validation["true"] == validation["predicted"]).mean() == pytest.approx(kept["val_accuracy"])
    of_true = [row[f"prob_{row['true']}"] for row in validation.to_dict("records")]
    assert -np.log(of_true).mean() == pytest.approx(kept["val_loss"], rel=1e-5)


def test_initial_weights_depend_on_the_seed_alone(dataset: dict[str, Any], tmp_path: Path) -> None:
    frozen = {"learning_rate": 0.0, "epochs": 2}
    weights = {
        (fold, seed): load_file(run(dataset, tmp_path / f"{fold}{seed}", fold=fold, seed=seed, **frozen)
                                / "model.safetensors")
        for fold, seed in [(0, 0), (1, 0), (0, 1)]
    }  # fmt: skip
    assert all(torch.equal(weights[0, 0][name], weights[1, 0][name]) for name in weights[0, 0])
    assert any(not torch.equal(weights[0, 0][name], weights[0, 1][name]) for name in weights[0, 0])


def test_predictions_cover_validation_and_test_and_attention_the_test_slides(
    dataset: dict[str, Any], tmp_path: Path
) -> None:
    table = predict_run(dataset, run(dataset, tmp_path))
    splits = pd.read_csv(dataset["splits"])
    expected = splits[splits["fold0"] != "train"].set_index("slide_id")["fold0"]
    assert table.set_index("slide_id")["part"].to_dict() == expected.to_dict()
    np.testing.assert_allclose(table["prob_normal"] + table["prob_tumour"], 1)
    attention = np.load(tmp_path / "attention.npz")
    assert set(attention.files) == set(expected[expected == "test"].index)
    stores = pd.concat(pd.read_csv(path) for path in dataset["slide_tables"].values()).set_index("slide_id")["store"]
    for slide_id in attention.files:
        assert attention[slide_id].dtype == np.float32
        assert attention[slide_id].shape == (len(open_store(stores[slide_id]).coords),)
        assert attention[slide_id].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kept", [0, 2, 100])
def test_a_slide_is_read_once_within_the_budget(dataset: dict[str, Any], kept: int, monkeypatch: Any) -> None:
    slides = load_bags(dataset["splits"], 0, "train", dataset["slide_tables"], dataset["groups"], ENCODER, CLASSES)
    read: list[str] = []
    original = LabelledBag.read
    monkeypatch.setattr(LabelledBag, "read", lambda self: (read.append(self.slide_id), original(self))[1])
    largest = max(slide.store.shape[0] * DIM * 2 for slide in slides)
    reader = BagReader(torch.device("cpu"), budget=kept * largest)
    for _ in range(2):
        for slide, bag in reader.stream(slides):
            assert bag.features.dtype == torch.float32
            assert torch.equal(bag.features, torch.from_numpy(slide.store.features).float())
            assert bag.groups is slide.groups
    assert all(bag.features.dtype == torch.float16 for bag in reader.kept.values())
    again = len(read) - len(slides)
    assert again == len(slides) - len(reader.kept)
    assert len(reader.kept) >= min(kept, len(slides))
    assert sum(bag.features.nbytes for bag in reader.kept.values()) <= kept * largest


def test_foreign_files_are_refused(dataset: dict[str, Any], tmp_path: Path) -> None:
    folder = run(dataset, tmp_path / "run")
    with pytest.raises(DataError, match="holds fold 0, seed 0, not fold 1"):
        predict_run(dataset, folder, fold=1)

    # The same slides from other weights of the encoder.
    other_tables, _ = make_dataset(tmp_path, weights_sha256="cd" * 32)
    with pytest.raises(DataError, match=r"weights abababababab, the stores have cdcdcdcdcdcd: train it anew"):
        predict_run(dataset, folder, slide_tables=other_tables)

    with pytest.raises(StoreError, match=ENCODER):
        load_bags(dataset["splits"], 0, "val", dataset["slide_tables"], None, "another", CLASSES)
    with pytest.raises(DataError, match=r"label 'tumour', which is none of normal, benign"):
        load_bags(dataset["splits"], 0, "val", dataset["slide_tables"], None, ENCODER, ["normal", "benign"])

    # A slide that was tiled anew after grouping.
    slide_id = "synthetic-04-0"
    store = open_store(tmp_path / f"{slide_id}.zarr.zip")
    attributes = attributes_of(slide_id, "synthetic", "ab" * 32)
    write_store(store.path, store.coords + 1, store.features, attributes)
    splits = pd.read_csv(dataset["splits"]).assign(fold0="test")
    splits.to_csv(tmp_path / "all.csv", index=False)
    with pytest.raises(DataError, match=rf"slide {slide_id}: the coordinates in .*location-4.npz are not those"):
        load_bags(tmp_path / "all.csv", 0, "test", other_tables, dataset["groups"], ENCODER, CLASSES)


def test_two_stages(dataset: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second starts from what the first kept, and prediction needs the second alone."""
    monkeypatch.setitem(models.MODELS, "twice", "tests.gmmamba.two_stages:TwoStages")
    monkeypatch.setattr(models, "TWO_STAGES", frozenset({"twice"}))

    def stage(number: int, output: Path, first: Path | None = None, **kw: Any) -> Path:
        train(experiment("twice"), kw.get("fold", 0), 0, dataset["splits"], dataset["slide_tables"], None, output,
              threads=1, stage=number, first_stage=first)  # fmt: skip
        return output

    with pytest.raises(ValueError, match=r"twice trains in two stages: the first with --stage 1"):
        stage(2, tmp_path / "alone")
    first = stage(1, tmp_path / "first")
    assert json.loads((first / "model.json").read_text())["experiment"]["model"] == {"stage": 1}
    second = stage(2, tmp_path / "second", first)
    weights = load_file(second / "model.safetensors")
    assert torch.equal(weights["prior"], load_file(first / "model.safetensors")["classifier.weight"])
    assert weights["bags"] == (pd.read_csv(dataset["splits"])["fold0"] == "train").sum()
    shutil.rmtree(first)
    assert len(predict_run(dataset, second, "twice"))

    with pytest.raises(DataError, match="first holds fold 0, seed 0, not fold 1"):
        stage(2, tmp_path / "wrong", stage(1, tmp_path / "first"), fold=1)
    with pytest.raises(ValueError, match="abmil has no first stage"):
        train(experiment("abmil"), 0, 0, dataset["splits"], dataset["slide_tables"], None, tmp_path, 1, stage=1)
    with pytest.raises(ValueError, match="abmil starts from no first stage"):
        train(experiment("abmil"), 0, 0, dataset["splits"], dataset["slide_tables"], None, tmp_path, 1,
              first_stage=first)  # fmt: skip
