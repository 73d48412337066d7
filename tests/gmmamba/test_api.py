"""The Python API: the digits of the workflow's jobs, from stores and from arrays; what it refuses; its examples."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import gmmamba
from gmmamba import Cohort, TrainedModel, create_model, load_models, open_slide_store, predict, prediction, training
from gmmamba.grouping import group_coords
from gmmamba.inference.model_file import export_model, load_ensemble
from gmmamba.inference.pipeline import record_pipeline
from gmmamba.splits import SplitSettings, split_dataset
from slidestore import write_store
from slidestore.groups import read_groups, write_groups
from tests.docs import DOCS, code_blocks
from tests.gmmamba.synthetic import CLASSES, DIM, attributes_of, experiment, make_dataset, make_slide

ROOT = Path(__file__).parents[2]
SETTINGS = {"epochs": 3, "select_after": 1, "learning_rate": 1e-3}  # of synthetic.experiment
FOLDS = 2
MODELS: dict[str, dict[str, Any]] = {"gmmamba": {"width": 32}, "abmil": {}, "ibmil": {}}


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the workflow's jobs leave: a slide table and its stores, splits.csv, {method}/fold{fold}_seed0."""
    folder = tmp_path_factory.mktemp("workflow")
    tables, by_hand = make_dataset(folder)
    groups = folder / "location-4.npz"
    of_slides = {slide: xy for slide, (xy, _) in read_groups(by_hand["synthetic"]).items()}
    write_groups(groups, {slide: (xy, group_coords(xy, "location", 4)) for slide, xy in of_slides.items()})
    splits = folder / "splits.csv"
    split_dataset(tables, CLASSES, SplitSettings(folds=FOLDS), splits)
    for method, model in MODELS.items():
        settings = experiment(method) | {"model": model}
        grouped = {"synthetic": groups} if settings["grouping"] else None
        runs = [folder / method / f"fold{fold}_seed0" for fold in range(FOLDS)]
        for fold, run in enumerate(runs):
            first = run / "first_stage" if method == "ibmil" else None
            if first is not None:
                training.train(settings, fold, 0, splits, tables, grouped, first, threads=1, stage=1)
            training.train(settings, fold, 0, splits, tables, grouped, run, threads=1, first_stage=first)
            files = run / "predictions.csv", run / "attention.npz"
            prediction.predict(run, fold, 0, splits, tables, grouped, *files)
        pipeline = {"tiling": {"synthetic": {}}, "reading": {}, "encoder": {"name": "tiny", "weights": "random"}}
        record_pipeline(pipeline, tables, runs, folder / method / "pipeline.json")
    return folder


def in_memory(cohort: Cohort) -> Cohort:
    """The same slides as arrays."""
    stores = [slide.store for slide in cohort.slides]
    return Cohort.from_arrays(
        [store.features for store in stores], [cohort.classes[label] for label in cohort.labels],
        [store.coords for store in stores], [slide.patient_id for slide in cohort.slides], cohort.slide_ids,
    )  # fmt: skip


def train_as_the_workflow(cohort: Cohort, method: str, fold: int = 0) -> TrainedModel:
    parts = cohort.split(folds=FOLDS)[fold]
    grouping, first = "location-4" if method == "gmmamba" else None, None
    if method == "ibmil":
        torch.manual_seed(0)
        first = gmmamba.train(
            create_model(method, DIM, 2, stage=1), *parts[:2], grouping=None, seed=0, fold=fold, **SETTINGS
        )
    torch.manual_seed(0)
    model = create_model(method, cohort.in_dim, len(cohort.classes), **MODELS[method])
    return gmmamba.train(model, *parts[:2], grouping=grouping, seed=0, fold=fold, first_stage=first, **SETTINGS)


@pytest.mark.parametrize("source", ["stores", "arrays"])
@pytest.mark.parametrize("method", MODELS)
def test_training_and_prediction_are_the_workflow_s(workflow: Path, method: str, source: str) -> None:
    """Bit for bit: the folds, the history, the weights, probabilities and attention."""
    cohort = Cohort.from_table(workflow / "synthetic.csv")
    if source == "arrays":
        cohort = in_memory(cohort)
    splits = pd.read_csv(workflow / "splits.csv", index_col="slide_id")
    for fold, parts in enumerate(cohort.split(folds=FOLDS)):
        for name, part in zip(("train", "val", "test"), parts, strict=True):
            assert part.slide_ids == splits.index[splits[f"fold{fold}"] == name].tolist()

    torch.use_deterministic_algorithms(False)  # what the fixture's jobs left on
    torch.set_num_threads(2)
    trained = train_as_the_workflow(cohort, method)
    # A notebook goes on with the settings that it had.
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == (False, 2)
    torch.set_num_threads(1)
    run = workflow / method / "fold0_seed0"
    weights = trained.model.state_dict()
    expected = load_file(run / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    card = json.loads((run / "model.json").read_text())
    assert (trained.best_epoch, trained.validation_score) == (card["best_epoch"], card["validation_score"])
    pd.testing.assert_frame_equal(trained.history, pd.read_csv(run / "history.csv"), check_exact=False, rtol=1e-12)

    test = cohort.split(folds=FOLDS)[0].test
    found = predict(trained, test)
    table = pd.read_csv(run / "predictions.csv").query("part == 'test'").reset_index(drop=True)
    columns = ["slide_id", "true", "predicted", "prob_normal", "prob_tumour"]
    pd.testing.assert_frame_equal(found.table, table[columns], check_exact=False, rtol=1e-12)
    with np.load(run / "attention.npz") as attention:
        for slide_id, weights_of in zip(found.slide_ids, found.attention, strict=True):
            np.testing.assert_allclose(weights_of, attention[slide_id], rtol=1e-5)


def test_a_trained_experiment_is_an_ensemble(workflow: Path, tmp_path: Path) -> None:
    """From its folder, from the file that it was exported to, and as the models that were trained here."""
    cohort = Cohort.from_table(workflow / "synthetic.csv")
    found = predict(workflow / "gmmamba", cohort)
    assert found.members.shape == (2, len(cohort), 2)
    for fold in range(FOLDS):
        table = pd.read_csv(workflow / f"gmmamba/fold{fold}_seed0/predictions.csv", index_col="slide_id")
        probabilities = pd.DataFrame(found.members[fold], found.slide_ids, ["prob_normal", "prob_tumour"])
        np.testing.assert_allclose(probabilities.loc[table.index], table[probabilities.columns], rtol=1e-12)
    np.testing.assert_array_equal(found.probabilities, (found.members[0] + found.members[1]) / 2)
    np.testing.assert_allclose([weights.sum() for weights in found.attention if weights is not None], 1)

    export_model(load_ensemble(workflow / "gmmamba"), tmp_path / "model.safetensors")
    own = [train_as_the_workflow(cohort, "gmmamba", fold) for fold in range(FOLDS)]
    for models in (tmp_path / "model.safetensors", load_models(workflow / "gmmamba"), own):
        again = predict(models, cohort)
        np.testing.assert_array_equal(again.members, found.members)
    assert len(load_models(workflow / "gmmamba", ["fold1_seed0"])) == 1


def test_one_slide_in_any_form(workflow: Path) -> None:
    path = next(workflow.glob("synthetic-03-*.zarr.zip"))
    store = open_slide_store(path)
    found = [
        predict(workflow / "gmmamba", slide, coords)
        for slide, coords in [
            (path, None), (str(path), None), (store, None), (store.features, store.coords),
            (torch.from_numpy(store.features).float(), torch.from_numpy(store.coords)),
            (store.features.astype(np.float64).tolist(), store.coords.tolist()),
            (Cohort.from_stores([path]), None),
        ]
    ]  # fmt: skip
    assert all(one.probabilities.tobytes() == found[0].probabilities.tobytes() for one in found)
    assert (found[0].slide_ids, found[0].true, found[3].slide_ids) == ([store.attributes.slide_id], [None], ["0"])


def test_a_store_with_damaged_patches_is_grouped_as_it_was_tiled(tmp_path: Path) -> None:
    coords, features, _ = make_slide(np.random.default_rng(3), positive=False)
    lost = np.array([0, 7, 20])
    rest = np.setdiff1d(np.arange(len(coords)), lost)
    about = replace(attributes_of("s", "c", "ab" * 32), damaged=coords[lost].tolist())
    write_store(tmp_path / "s.zarr.zip", coords[rest], features[rest], about)
    cohort = Cohort.from_stores([tmp_path / "s.zarr.zip"])
    for method in ("location", "random", "sequential"):
        (slide,) = gmmamba.api.with_groups(cohort.slides, f"{method}-4")
        assert slide.groups is not None
        assert slide.groups.tolist() == group_coords(coords, method, 4)[rest].tolist()


def test_what_does_not_fit_is_refused_with_the_remedy(workflow: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(9, 6)).astype(np.float32) for _ in range(4)]
    coords = [rng.integers(0, 99, (9, 2)) for _ in arrays]

    def cohort(labels: Any = "abab", **given: Any) -> Cohort:
        return Cohort.from_arrays(given.pop("features", arrays), labels and list(labels), **given)

    def fit(part: Cohort, validation: Cohort | None = None, method: str = "mean", n: int = 2, **given: Any) -> Any:
        return gmmamba.train(create_model(method, given.pop("in_dim", 6), n), part, validation or part, **given)

    refused = [
        (lambda: cohort("aba"), "there are 4 slides and 3 labels"),
        (lambda: cohort(classes="bc"), "the label 'a' is none of the classes b, c"),
        (lambda: cohort(slide_ids="xxyz"), "the slide 'x' is there 2 times"),
        (lambda: cohort(features=[arrays[0][0]], labels=None), r"slide 0: features are \(6,\), not \(N, D\)"),
        (lambda: cohort(features=[arrays[0] * np.nan], labels=None), "slide 0: features are not finite"),
        (lambda: cohort(coords=[xy[1:] for xy in coords]), r"slide 0: coords are \(8, 2\), .* give \(9, 2\)"),
        (lambda: cohort([*"abab"], features=[*arrays[:3], arrays[3][:, 1:]]).in_dim, "different widths, .*'3': 5"),
        (lambda: cohort(labels=None).split(), "slide 0 has no label"),
        (lambda: cohort(patients="ppqr").split(2), "patient p has label 'a' and 'b'"),
        (lambda: cohort().split(3), "class 'a' has 2 patients to share out, too few for 3 folds"),
        (lambda: fit(cohort()), r"slide 0 has no coords, .* give coords, or train with grouping='features-10'"),
        (lambda: fit(cohort(), grouping="locaton-4"), "did you mean 'location'"),
        (lambda: fit(cohort(), epoch=3), "train: unknown key 'epoch'; did you mean 'epochs'"),
        (lambda: fit(cohort(labels=None)), "the training slides have no labels"),
        (lambda: fit(cohort(), cohort("bcbc")), "the validation slides have the classes b, c, not a, b"),
        (lambda: fit(cohort(), cohort().subset([0, 2])), "no validation slide is 'b'"),
        (lambda: fit(cohort(), n=3, grouping=None), "MeanPooling has 3 classes, the slides a, b: n_classes=2"),
        (lambda: fit(cohort(), in_dim=7, grouping=None), "not take features of width 6, make it with in_dim=6"),
        (lambda: fit(cohort(), first_stage=load_models(workflow / "abmil")[0]), "starts from no first stage"),
        (lambda: predict(workflow / "abmil", arrays[0]), "the features have width 6, the model takes 16"),
        (lambda: predict([], arrays[0]), "predict needs at least one model"),
        (lambda: predict(workflow / "abmil", cohort(), coords), "a cohort and a store have their own"),
        (lambda: predict(load_models(workflow / "abmil") + load_models(workflow / "gmmamba"), arrays[0]),
         "the models differ in grouping: they make no ensemble"),
        (lambda: predict(workflow / "nowhere", arrays[0]), "nowhere does not exist"),
    ]  # fmt: skip
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
    with pytest.raises(TypeError, match="not a MeanPooling, which does not say its classes"):
        predict([create_model("mean", 6, 2)], arrays[0])  # type: ignore[list-item]


def test_features_of_another_encoder_and_failed_slides_are_refused(
    workflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path, patients=2, weights_sha256="cd" * 32)
    with pytest.raises(ValueError, match=r"weights cdcdcdcdcdcd, the model was trained on those with abababababab"):
        predict(workflow / "abmil", Cohort.from_table(tmp_path / "synthetic.csv"))
    failed = replace(attributes_of("s", "c", "ab" * 32), failure={"stage": "tile", "reason": "the file ends early"})
    write_store(tmp_path / "s.zarr.zip", np.empty((0, 2)), np.empty((0, DIM)), failed)
    with pytest.raises(ValueError, match=r"has no features \(the file ends early\): leave the slide out"):
        Cohort.from_stores([tmp_path / "s.zarr.zip"])
    table = pd.read_csv(tmp_path / "synthetic.csv").assign(store="results/c/features/e/s.zarr.zip")
    table.to_csv(tmp_path / "elsewhere.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="start Python in the folder that Snakemake ran in"):
        Cohort.from_table("elsewhere.csv")


def test_importing_gmmamba_is_cheap_and_its_stub_is_in_step() -> None:
    code = "import sys, gmmamba; dir(gmmamba); sys.exit(any(name in sys.modules for name in ('torch', 'gmmamba.api')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    stub = re.findall(r"import \w+ as (\w+)$", (ROOT / "gmmamba/__init__.pyi").read_text(), re.MULTILINE)
    assert sorted(stub) == sorted([*gmmamba.__all__, "__version__"])
    assert sorted(gmmamba.api.__all__) == sorted(gmmamba.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        gmmamba.trian  # noqa: B018


def test_the_notebook_runs_and_its_model_has_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code cells one after another, which is what a kernel does with them; and they are few."""
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    namespace = run_blocks(code, tmp_path, monkeypatch)
    assert (np.array(namespace["found"].predicted) == namespace["found"].true).mean() >= 0.9
    assert len([line for block in code for line in block.splitlines() if line.strip()]) <= 25


def test_the_examples_of_the_page_run(workflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = tmp_path / "results/demo/features"
    (features / "resnet18-random").mkdir(parents=True)
    shutil.copy(workflow / "synthetic.csv", features / "resnet18-random.csv")
    shutil.copy(workflow / "synthetic-04-0.zarr.zip", features / "resnet18-random" / "demo_04.zarr.zip")
    shutil.copytree(workflow / "gmmamba", tmp_path / "results/demo/gmmamba")
    first, second = (run_blocks([block], tmp_path, monkeypatch) for block in code_blocks("api.md", "python"))
    assert (np.array(first["found"].predicted) == first["found"].true).mean() >= 0.9
    assert len(second["models"]) == len(second["folds"]) == 4


def run_blocks(blocks: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    return namespace
