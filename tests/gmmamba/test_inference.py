"""Predictions on new slides: contributions against what they must sum to, files against the readers they are for."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gmmamba.inference.explain import group_contributions, log_odds, patch_contributions, patch_evidence
from gmmamba.inference.model_file import Ensemble, export_model, load_ensemble, run_folders
from gmmamba.inference.ome import PER_PATCH, raster, write_ome
from gmmamba.inference.pipeline import InferenceError, record_pipeline
from gmmamba.inference.qupath import collection, feature, group_outlines
from gmmamba.models import MODELS, create_model
from gmmamba.models.bag import Bag
from gmmamba.splits import SplitSettings, split_dataset
from gmmamba.training import train
from tests.gmmamba.synthetic import CLASSES, experiment, make_dataset

IN_DIM = 24


def a_bag(n: int = 40, seed: int = 0) -> Bag:
    generator = torch.Generator().manual_seed(seed)
    coords = torch.stack([torch.arange(n) % 8, torch.arange(n) // 8], 1).int() * 224
    return Bag(torch.randn(n, IN_DIM, generator=generator), coords, torch.arange(n) * 3 // n)


# Contributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MODELS)
def test_contributions_sum_to_the_log_odds_over_those_of_the_mean_patch(method: str) -> None:
    torch.manual_seed(1)
    model = create_model(method, IN_DIM, 3).eval()
    bag = a_bag()
    with torch.no_grad():
        output = model(bag)
    found = patch_contributions(model, bag, output, target=2, steps=64)
    assert found.values.shape == (40,)
    p = output.logits.double().softmax(1)[0, 2].item()
    assert found.total == pytest.approx(np.log(p / (1 - p)), abs=1e-5)
    # Gauss-Legendre is exact where the gradient is smooth; hard choices leave a residual, most where few patches pass.
    assert method == "dtfd" or abs(found.residual) <= 0.1 * np.abs(found.values).sum() + 1e-6


def test_contributions_of_gmmamba_are_exact_and_none_for_what_the_mask_drops() -> None:
    torch.manual_seed(2)
    model = create_model("gmmamba", IN_DIM, 2, width=32, mask="straight_through", mask_ratio=0.5).eval()
    bag = a_bag()
    with torch.no_grad():
        output = model(bag)
    found = patch_contributions(model, bag, output, 1, steps=32)
    assert abs(found.residual) < 1e-4
    dropped = output.details["order"][~output.details["keep"]].numpy()
    assert len(dropped) == sum(size // 2 for size in output.details["group_sizes"].tolist())
    assert not found.values[dropped].any()
    assert np.count_nonzero(found.values) == 40 - len(dropped)


def test_contributions_of_a_linear_model_are_its_weights() -> None:
    """Mean pooling of an embedding that is linear: c_i = w . (x_i - mean) / N, in closed form."""
    torch.manual_seed(3)
    model = create_model("mean", IN_DIM, 2).eval()
    model.embed = torch.nn.Sequential(torch.nn.Linear(IN_DIM, 512))
    bag = a_bag()
    with torch.no_grad():
        output = model(bag)
        weights = (model.classifier.weight[1] - model.classifier.weight[0]) @ model.embed[0].weight
        expected = (bag.features - bag.features.mean(0)) @ weights / 40
    found = patch_contributions(model, bag, output, 1, steps=1)
    np.testing.assert_allclose(found.values, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("method", MODELS)
def test_evidence_is_what_the_model_says_of_a_slide_of_one_patch(method: str) -> None:
    torch.manual_seed(5)
    model, bag = create_model(method, IN_DIM, 2).eval(), a_bag()
    found = patch_evidence(model, bag, 1)
    assert found.shape == (40,)
    with torch.no_grad():
        alone = [model(Bag(bag.features[[i]], bag.coords[[i]], bag.groups[[i]])).logits.double() for i in (0, 17, 39)]
    np.testing.assert_allclose(found[[0, 17, 39]], [log_odds(logits, 1).item() for logits in alone], atol=1e-5)


def test_a_group_s_contribution_is_what_leaving_it_out_takes_away() -> None:
    torch.manual_seed(4)
    model = create_model("gmmamba", IN_DIM, 2, width=32).eval()
    bag = a_bag()
    found = group_contributions(model, bag, 1)
    assert list(found) == [0, 1, 2]
    rest = bag.groups != 1
    with torch.no_grad():
        logits = [model(b).logits.double() for b in (bag, Bag(bag.features[rest], bag.coords[rest], bag.groups[rest]))]
    assert found[1] == pytest.approx((log_odds(logits[0], 1) - log_odds(logits[1], 1)).item())
    assert group_contributions(model, Bag(bag.features, bag.coords), 1) == {}


# Files for QuPath and napari --------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.floats(50, 500), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_outlines_of_groups_are_valid_and_cover_their_patches(n: int, side: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = rng.permutation(64)[:n]
    coords = np.rint(np.stack([cells % 8, cells // 8], 1) * side).astype(np.int32)
    labels = rng.integers(3, size=n)
    outlines = group_outlines(coords, side, labels)
    assert sorted(outlines) == sorted(set(labels.tolist()))
    for label, outline in outlines.items():
        assert outline.is_valid
        members = coords[labels == label]
        assert outline.area == pytest.approx(len(members) * np.ceil(side) ** 2, rel=0.05)  # corners are rounded
        assert all(outline.covers(shapely.box(x, y, x + side, y + side)) for x, y in members.tolist())


def test_features_are_what_qupath_imports() -> None:
    """The keys and types of qupath.lib.io.QuPathTypeAdapters."""
    box = shapely.box(0, 0, 10, 10)
    made = collection([
        feature("s", "annotation", "Group 1", box, {"patches": 3}, "Group 1", (1, 2, 3)),
        feature("s", "detection", "Patch 0", box, {"attention": np.float32(0.5)}, colour=(9, 9, 9)),
    ])  # fmt: skip
    read = json.loads(json.dumps(made))
    assert read["type"] == "FeatureCollection"
    annotation, detection = read["features"]
    for item in (annotation, detection):
        assert item["type"] == "Feature"
        assert shapely.geometry.shape(item["geometry"]).equals(box)
        assert all(isinstance(value, float) for value in item["properties"]["measurements"].values())
    assert annotation["properties"]["objectType"] == "annotation"
    assert annotation["properties"]["classification"] == {"name": "Group 1", "color": [1, 2, 3]}
    assert detection["properties"]["color"] == [9, 9, 9]
    assert annotation["id"] != detection["id"]
    assert made == collection([
        feature("s", "annotation", "Group 1", box, {"patches": 3}, "Group 1", (1, 2, 3)),
        feature("s", "detection", "Patch 0", box, {"attention": np.float32(0.5)}, colour=(9, 9, 9)),
    ])  # fmt: skip


def test_the_heat_map_is_a_pyramid_in_the_slide_s_scale(tmp_path: Path) -> None:
    cells = np.arange(1000)
    coords = np.stack([cells % 100, cells // 100], 1).astype(np.int32) * 448
    values = np.random.default_rng(0).random(1000)
    drawn, pixel = raster(coords, 448.0, (100 * 448 + 50, 10 * 448 + 3), values)
    assert drawn.shape == (10 * PER_PATCH + 1, 100 * PER_PATCH + 1)
    np.testing.assert_allclose(drawn[2::4, 2::4][:10, :100].ravel(), values.astype(np.float32))
    assert not drawn[-1].any()
    write_ome(tmp_path / "x.ome.tif", {"attention": drawn, "contribution": -drawn}, pixel * 0.25)
    with tifffile.TiffFile(tmp_path / "x.ome.tif") as tiff:
        assert tiff.is_ome
        assert 'PhysicalSizeX="28.0"' in tiff.ome_metadata
        assert 'PhysicalSizeXUnit="µm"' in tiff.ome_metadata
        series = tiff.series[0]
        assert [level.shape for level in series.levels] == [(2, 41, 401), (2, 21, 201)]
        np.testing.assert_array_equal(series.asarray(), np.stack([drawn, -drawn]))
    first = (tmp_path / "x.ome.tif").read_bytes()
    write_ome(tmp_path / "x.ome.tif", {"attention": drawn, "contribution": -drawn}, pixel * 0.25)
    assert len(first) == (tmp_path / "x.ome.tif").stat().st_size


# Model files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/d/abmil with two runs and its pipeline.json."""
    folder = tmp_path_factory.mktemp("trained")
    tables, _ = make_dataset(folder)
    home = folder / "d" / "abmil"
    split_dataset(tables, CLASSES, SplitSettings(folds=2), folder / "d" / "splits.csv")
    for fold in (0, 1):
        train(experiment("abmil"), fold, 0, folder / "d/splits.csv", tables, None, home / f"fold{fold}_seed0", 1)
    tiling = {"patch_px": 224, "mpp": 0.5}
    pipeline = {"tiling": {"synthetic": tiling}, "reading": {}, "encoder": {"name": "tiny", "weights": "random"}}
    record_pipeline(pipeline, tables, [home / "fold0_seed0", home / "fold1_seed0"], home / "pipeline.json")
    return home


def logits_of(ensemble: Ensemble) -> torch.Tensor:
    bag = a_bag(30)
    bag.features = bag.features[:, :16]
    with torch.no_grad():
        return torch.cat([member.model(bag).logits for member in ensemble.members])


def test_a_model_file_holds_all_of_an_experiment(trained: Path, tmp_path: Path) -> None:
    of_folder = load_ensemble(trained)
    assert [member.name for member in of_folder.members] == ["fold0_seed0", "fold1_seed0"]
    export_model(of_folder, tmp_path / "m.safetensors")
    of_file = load_ensemble(tmp_path / "m.safetensors")
    assert torch.equal(logits_of(of_file), logits_of(of_folder))
    assert (of_file.pipeline, of_file.classes) == (of_folder.pipeline, CLASSES)
    assert [member.sha256 for member in of_file.members] == [member.sha256 for member in of_folder.members]
    assert of_file.card["members"] == of_folder.card["members"]
    one = load_ensemble(tmp_path / "m.safetensors", ["fold1_seed0"])
    assert torch.equal(logits_of(one), logits_of(load_ensemble(trained / "fold1_seed0")))
    export_model(of_file, tmp_path / "again.safetensors")
    assert load_ensemble(tmp_path / "again.safetensors").card["members"] == of_folder.card["members"]


def test_runs_of_an_earlier_number_of_folds_are_no_members(trained: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(trained, tmp_path / "d" / "abmil"))
    shutil.copytree(home / "fold1_seed0", home / "fold2_seed0")
    assert [member.name for member in load_ensemble(home).members] == ["fold0_seed0", "fold1_seed0"]
    assert run_folders(home / "fold2_seed0") == [home / "fold2_seed0"]  # asked for by itself
    before = json.loads((home / "pipeline.json").read_text())
    del before["runs"]  # as it was before it said so
    (home / "pipeline.json").write_text(json.dumps(before))
    assert len(run_folders(home)) == 3


def test_the_encoder_goes_in_only_as_the_file_that_training_used(trained: Path, tmp_path: Path) -> None:
    ensemble = load_ensemble(trained)
    with pytest.raises(InferenceError, match="weights are random"):
        export_model(ensemble, tmp_path / "m", with_encoder=True)
    weights = tmp_path / "encoder.safetensors"
    save_file({"w": torch.ones(2)}, weights)
    assert ensemble.pipeline.encoder is not None
    ensemble.pipeline.encoder["weights"] = str(weights)
    with pytest.raises(InferenceError, match="not the file that the models' features are from"):
        export_model(ensemble, tmp_path / "m", with_encoder=True)
    import hashlib

    ensemble.card["encoder_weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    export_model(ensemble, tmp_path / "m", with_encoder=True)
    assert load_ensemble(tmp_path / "m").encoder_file == weights.read_bytes()
    ensemble.pipeline.encoder["weights"] = "x.pth"
    with pytest.raises(InferenceError, match="nothing pickled"):
        export_model(ensemble, tmp_path / "m", with_encoder=True)


def test_what_is_no_model_is_refused_in_one_line(trained: Path, tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InferenceError, match=message) as error:
            load_ensemble(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "holds no trained model")
    (tmp_path / "x").write_bytes(b"no safetensors")
    refused(tmp_path / "x", "no whole safetensors file")
    refused(trained / "fold0_seed0/model.safetensors", "does not describe itself")
    export_model(load_ensemble(trained), tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-10])
    refused(tmp_path / "m", "no whole safetensors file")
    with pytest.raises(InferenceError, match="has no fold7_seed0, only fold0_seed0, fold1_seed0"):
        load_ensemble(trained, ["fold7_seed0"])

    copy = tmp_path / "d" / "abmil"
    for run in ("fold0_seed0", "fold1_seed0"):
        (copy / run).mkdir(parents=True)
        for file in ("model.json", "model.safetensors"):
            (copy / run / file).write_bytes((trained / run / file).read_bytes())
    refused(copy, "pipeline.json does not exist")
    (copy / "pipeline.json").write_text((trained / "pipeline.json").read_text())
    card = json.loads((copy / "fold1_seed0/model.json").read_text())
    (copy / "fold1_seed0/model.json").write_text(json.dumps(card | {"classes": ["normal", "cancer"]}))
    refused(copy, "differ in classes")
    (copy / "fold1_seed0/model.json").write_text(json.dumps(card))
    state = load_file(copy / "fold1_seed0/model.safetensors")
    save_file({name: state[name] for name in list(state)[1:]}, copy / "fold1_seed0/model.safetensors")
    refused(copy, "not those of the model it describes")


def test_a_model_file_from_anybody_reaches_no_path_and_runs_no_code(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    export_model(load_ensemble(trained), path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()["gmmamba"])

    def refused(message: str, text: str | None = None, encoder: dict[str, str] | None = None, **changes: Any) -> None:
        pipeline = card["pipeline"] | ({} if encoder is None else {"encoder": card["pipeline"]["encoder"] | encoder})
        save_file(tensors, path, {"gmmamba": text or json.dumps(card | {"pipeline": pipeline} | changes)})
        with pytest.raises(InferenceError, match=message) as error:
            load_ensemble(path)
        assert "\n" not in str(error.value)

    for name in ("/tmp/x", "../x", ".."):
        refused("which becomes a folder's, must be made of letters", encoder={"name": name})
    refused("no JSON", "nojson")
    refused("does not say of which format", "{}")
    refused("does not say of which format", "[1]")
    refused("says nothing of pipeline, experiment, dataset, classes", '{"format": 1}')
    refused("unknown key", pipeline=card["pipeline"] | {"tilling": {}})
    refused("which would run here: .* allow it with --own-code", encoder={"model": "mine.py:f"})
    assert load_ensemble(path, own_code=True).pipeline.encoder["model"] == "mine.py:f"  # type: ignore[index]
