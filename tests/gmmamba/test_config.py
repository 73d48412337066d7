"""The configuration fails by name, before any job starts, and resolves into what each stage needs."""

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from gmmamba.__main__ import main
from gmmamba.config import load_config, schema_problems
from gmmamba.evaluation import Evaluation
from gmmamba.models import MODELS
from gmmamba.splits import SplitSettings
from gmmamba.training import TrainingSettings
from preprocessing.encoders import EncoderSettings
from preprocessing.patches import Reader
from preprocessing.tile import TilingSettings
from tests.docs import code_blocks
from tests.gmmamba.configs import ROOT, good_rows, problems, write_sheet


def test_defaults_model_and_overrides_are_resolved_in_this_order(config: dict[str, Any]) -> None:
    config["experiments"]["variant"] = {
        "model": "gmmamba", "dataset": "demo", "overrides": {"groups": 5}, "training": {"learning_rate": 0.01},
    }  # fmt: skip
    resolved = load_config(config)
    variant, plain = resolved.experiments["demo", "variant"], resolved.experiments["demo", "gmmamba"]
    assert (variant.grouping, plain.grouping) == ("location-5", "location-10")
    assert variant.model == plain.model  # groups are another stage's, so they are not the model's
    assert variant.training["learning_rate"] == 0.01  # the experiment's
    assert variant.training["epochs"] == config["training"]["epochs"]  # the general one
    assert variant.training["weight_decay"] == 1e-5  # the schema's
    assert resolved.experiments["demo", "abmil"].grouping is None


def test_cohort_overrides_only_what_it_names(config: dict[str, Any]) -> None:
    config["cohorts"]["demo"]["tiling"] = {"mpp": 1.0}
    tiling = load_config(config).cohorts["demo"].tiling
    assert tiling["mpp"] == 1.0
    assert tiling["patch_px"] == config["tiling"]["patch_px"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("datsets",), {}, "unknown key 'datsets', did you mean 'datasets'?"),
        (("tiling", "patchpx"), 224, "tiling: unknown key 'patchpx', did you mean 'patch_px'?"),
        (("tiling", "mpp"), -1, "tiling.mpp"),
        (("encoders", "resnet18-random", "weigths"), "x", "did you mean 'weights'?"),
        (("models", "abmil", "method"), "abmll", "unknown method 'abmll', did you mean 'abmil'?"),
        (("models", "gmmamba", "mask_ration"), 0.1, "did you mean 'mask_ratio'?"),
        (("models", "gmmamba", "mask_ratio"), 1.5, "models.gmmamba.mask_ratio"),
        (("experiments", "abmil", "model"), "abmill", "experiments.abmil.model: 'abmill' is not in `models`"),
        (
            ("experiments", "abmil", "overrides"),
            {"widht": 8},
            "experiments.abmil.overrides: unknown key 'widht'",
        ),
        (("experiments", "tiles"), {"model": "abmil", "dataset": "demo"}, "folder of the pipeline's own"),
        (("experiments", "a/b"), {"model": "abmil", "dataset": "demo"}, "'a/b'"),
        (("encoders", "resnet18-random", "weights"), "w.pt", "'w.pt' is neither pretrained nor random nor a file"),
        (
            ("encoders", "resnet18-random", "model"),
            "mine.py:uni",
            "encoders.resnet18-random.model: mine.py does not exist",
        ),
        (("encoders", "resnet18-random", "model"), "local-dir:vit", "name the architecture"),
        (("encoders", "resnet18-random", "mean"), [0.5], "encoders.resnet18-random.mean"),
        (("datasets", "demo", "encoder"), "resnet", "datasets.demo.encoder: 'resnet' is not in `encoders`"),
        (("datasets", "demo", "split", "folds"), 11, "11 folds"),
        (
            ("datasets", "demo", "classes"),
            ["normal", "tumor"],
            "unknown label 'tumour', did you mean 'tumor'? (datasets.demo.classes: normal, tumor)",
        ),
        (("datasets", "demo", "classes"), ["normal", "tumour", "benign"], "no slide has the label 'benign'"),
        (
            ("training", "epochs"),
            5,
            "training.epochs (5) must exceed training.select_after (5), the epochs of which none",
        ),
        (
            ("training", "learning_rate"),
            "1e-4",
            "'1e-4' is text to YAML, which wants a point in a number: write 0.0001",
        ),
        (("cohorts", "demo", "sheet"), "nowhere.csv", "nowhere.csv does not exist"),
        (("seeds",), [0, 0], "seeds"),
        (("experiments", "mean", "protocol"), "offical", "experiments.mean.protocol: 'offical' is not one of"),
        (("experiments", "mean", "protocol"), "official", "no official one is known for mean, only for gmmamba, abmil"),
        (("experiments", "abmil", "overrides"), {"groups": 5}, "abmil has groups only with css: true"),
        (("experiments", "abmil", "overrides"), {"css": True, "width": 20}, "width must be a multiple of 8, not 20"),
        (("experiments", "mean", "overrides"), {"css": True}, "experiments.mean.overrides: unknown key 'css'"),
        (("experiments", "a.unified"), {"model": "abmil", "dataset": "demo"}, "those of the tables' experiments"),
        (("tables", "datasets"), {"ablation": ["demmo"]}, "tables.datasets.ablation: 'demmo' is not in `datasets`"),
        (("tables", "datasets"), {"ablatoin": ["demo"]}, "did you mean 'ablation'?"),
    ],
)
def test_each_mistake_is_named(config: dict[str, Any], path: tuple[str, ...], value: Any, message: str) -> None:
    place = config
    for key in path[:-1]:
        place = place.setdefault(key, {})
    place[path[-1]] = value
    assert message in problems(config)


IMPORTED = {"format": "trident-h5", "path": "features/{slide_id}.h5"}


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        ({}, "line 2: slide S0: no such file: features/S0.h5 (cohorts.demo.features.uni; mend that path"),
        ({"path": "uni.h5"}, "cohorts.demo.features.uni.path: 'uni.h5' is one file for all slides"),
        (
            {"format": "clam-h5"},
            "cohorts.demo.features.uni: features/S0.h5: clam-h5 keeps no scale: give the tool's h5",
        ),
        ({"format": "clam-h5", "patches": "{stem}.svs"}, "slide S0 has no mpp, which CLAM does not record"),
        ({"format": "h5"}, "cohorts.demo.features.uni.format: 'h5' is not one of"),
        ({"weights_sha256": "ab"}, "cohorts.demo.features.uni.weights_sha256"),
    ],
)
def test_imported_features_are_checked_before_any_job(
    config: dict[str, Any], cohort: dict[str, Any], message: str
) -> None:
    config["cohorts"]["demo"]["features"] = {"uni": IMPORTED | cohort}
    config["datasets"]["demo"]["encoder"] = "uni"
    assert message in problems(config)


def test_imported_features_need_no_slides_and_no_encoder(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "features").mkdir()
    for i in range(20):
        (tmp_path / f"features/S{i}.h5").touch()
        (tmp_path / f"s{i}.svs").unlink()
    config["cohorts"]["demo"]["features"] = {"uni": IMPORTED}
    config["datasets"]["demo"]["encoder"] = "uni"
    assert load_config(config).cohorts["demo"].encoders == ["uni"]
    del config["encoders"]
    assert load_config(config).encoder_names() == {"uni"}
    config["cohorts"]["demo"]["tiling"] = {"mpp": 1.0}
    assert "cohorts.demo.tiling: its features are imported, so this does nothing" in problems(config)
    config["cohorts"]["demo"]["tiling"] = {}
    config["datasets"]["demo"]["encoder"] = "resnet18"
    assert "datasets.demo.encoder: 'resnet18' is not in `encoders`" in problems(config)
    config["encoders"] = {"resnet18": {"model": "resnet18", "weights": "random"}}
    assert "datasets.demo.encoder: 'resnet18' is not in cohorts.demo.features" in problems(config)


def test_an_encoder_s_file_is_read_before_any_job(config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    config["encoders"]["resnet18-random"]["model"] = f"{file}:uni"
    file.write_text("def uni2(pretrained):\n    raise RuntimeError('never run here')\n")
    assert "mine.py has no function 'uni', did you mean 'uni2'?" in problems(config)
    file.write_text("def uni(pretrained:\n")
    assert "mine.py, line 1: " in problems(config)
    file.write_text("def uni(pretrained): ...\n")
    load_config(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.yaml is empty: it needs at least `cohorts`"),
        (b"- cohorts", "config.yaml is no mapping of keys"),
        (b"cohorts: {a: {sheet: a.csv}\ntraining: {}\n", 'is no YAML .*in ".*config.yaml", line 2'),
        (b"cohorts:\n\ta: {sheet: a.csv}\n", 'indented with spaces.*in ".*config.yaml", line 2'),
        (b"report: {title: K\xf6ln}\n", "no YAML in UTF-8"),
        (b"cohorts: {}\nseeds: [0]\ncohorts: {}\n", "'cohorts' stands there a second time.*line 3"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    assert main(["check-config", str(tmp_path / "config.yaml")]) == 1
    assert re.search(f"(?s){message}", capsys.readouterr().err)


def test_a_path_that_is_none_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, why in ((tmp_path / "absent.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        assert main(["check-config", str(path)]) == 1
        assert capsys.readouterr().err == f"gmmamba check-config: {path}: {why}\n"


def test_check_config_says_what_is_in_it(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["check-config", str(tmp_path / "config.yaml")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        f"cohort demo: 20 slides of {tmp_path / 'slides.csv'}, 224 px patches at 0.5 µm per pixel, encoded by "
        "resnet18-random",
        "dataset demo: 10 normal, 10 tumour, of 20 patients; kfold, 4 folds x 1 seeds = 4 models an experiment",
        "experiment demo/gmmamba: gmmamba, groups location-10, up to 15 epochs",
    ]
    assert main(["check-config", str(tmp_path / "config.yaml"), "--resolved"]) == 0
    head, resolved = capsys.readouterr().out.split("# demo/gmmamba\n")
    assert head.splitlines() == [*said, ""]
    resolved = yaml.safe_load(resolved.split("\n#")[0])
    assert resolved == load_config(config).experiments["demo", "gmmamba"].as_dict()


def test_patches_that_overlap_wholly_are_an_error(config: dict[str, Any]) -> None:
    config["cohorts"]["demo"]["tiling"] = {"overlap_px": 300}
    assert "cohorts.demo.tiling: overlap_px (300) must be less than patch_px (224)" in problems(config)


SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())


@pytest.mark.parametrize(
    ("settings", "properties"),
    [
        (TilingSettings, SCHEMA["$defs"]["tiling"]["properties"]),
        (EncoderSettings, SCHEMA["$defs"]["encoder"]["properties"]),
        (SplitSettings, SCHEMA["$defs"]["dataset"]["properties"]["split"]["properties"]),
        (TrainingSettings, SCHEMA["$defs"]["training"]["properties"]),
        (Evaluation, SCHEMA["$defs"]["evaluation"]["properties"]),
    ],
)
def test_schema_and_settings_agree(settings: type, properties: dict[str, Any]) -> None:
    """The same keys and the same defaults for those who use config.yaml and those who use Python."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(settings)
        if field.name != "name"
    }
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()
    }  # as in YAML
    assert {key: value.get("default", dataclasses.MISSING) for key, value in properties.items()} == fields


def test_every_reader_can_be_asked_for() -> None:
    assert list(get_args(Reader)) == SCHEMA["properties"]["reading"]["properties"]["reader"]["enum"]


METHODS = {name: schema for name, schema in SCHEMA["$defs"]["methods"].items() if isinstance(schema, dict)}


def test_every_method_has_a_schema() -> None:
    assert set(METHODS) == set(MODELS)


@pytest.mark.parametrize("method", METHODS)
def test_schema_and_model_agree(method: str) -> None:
    """The same hyperparameters and the same defaults; grouping is another stage's."""
    module, _, name = MODELS[method].partition(":")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    expected = {key: p.default for key, p in parameters.items() if key not in ("in_dim", "n_classes")}
    known = METHODS[method]["properties"]
    assert {key: known[key]["default"] for key in known if key not in ("method", "grouping", "groups")} == expected


def test_the_five_things_of_the_readme_are_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [row.replace("normal", "negative").replace("tumour", "positive") for row in good_rows()]
    write_sheet(tmp_path, rows).rename("mycohort.csv")
    config = load_config(yaml.safe_load(code_blocks("../README.md", "yaml")[0]))
    assert config.summary().count("\n") == 2
    assert list(config.experiments) == [("mydata", "gmmamba-mydata")]


def test_models_of_one_s_own_stand_beside_the_named_ones_or_replace_them(config: dict[str, Any]) -> None:
    config["experiments"] |= {
        "a": {"model": "published", "dataset": "demo"},
        "b": {"model": "groups-2", "dataset": "demo"},
    }
    config["models"] = {"groups-2": {"method": "gmmamba", "groups": 2}}
    experiments = load_config(config).experiments
    assert experiments["demo", "a"].model["mask"] == "published"
    assert experiments["demo", "b"].model["mask"] is None  # none of the settings of the one it replaces


def test_an_experiment_on_several_datasets(config: dict[str, Any]) -> None:
    config["datasets"]["again"] = config["datasets"]["demo"] | {"split": {"scheme": "kfold", "folds": 3}}
    config["experiments"]["mean"]["dataset"] = ["demo", "again"]
    experiments = load_config(config).experiments
    assert experiments["demo", "mean"] == experiments["again", "mean"]
    assert ("again", "abmil") not in experiments
    config["experiments"]["mean"]["dataset"] = ["demo", "agian"]
    assert "experiments.mean.dataset: 'agian' is not in `datasets`, did you mean 'again'?" in problems(config)


def test_the_official_protocol_takes_the_methods_own_training(config: dict[str, Any]) -> None:
    config["training"] = {"learning_rate": 0.5, "epochs": 7}
    config["experiments"]["own"] = {"model": "abmil", "dataset": "demo", "protocol": "official"}
    config["experiments"]["shorter"] = config["experiments"]["own"] | {"training": {"epochs": 2}}
    experiments = load_config(config).experiments
    assert experiments["demo", "abmil"].training == dataclasses.asdict(
        TrainingSettings(epochs=7, learning_rate=0.5)
    ) | {"betas": [0.9, 0.999]}
    own = experiments["demo", "own"].training
    assert (own["optimizer"], own["learning_rate"], own["epochs"], own["selection"]) == ("adam", 5e-4, 20, "last")
    assert experiments["demo", "shorter"].training == own | {"epochs": 2}


def test_every_official_protocol_can_be_used() -> None:
    official = yaml.safe_load((ROOT / "config" / "models.yaml").read_text())["official"]
    for settings in official.values():
        assert not list(schema_problems(settings, SCHEMA["$defs"]["training"], SCHEMA))
        TrainingSettings(**settings)
    assert set(official) >= set(MODELS) - {"mean", "max"}


def test_css_as_a_plug_in_comes_with_its_groups(config: dict[str, Any]) -> None:
    config["experiments"]["plugged"] = {"model": "abmil", "dataset": "demo", "overrides": {"css": True, "groups": 5}}
    experiments = load_config(config).experiments
    plugged, alone = experiments["demo", "plugged"], experiments["demo", "abmil"]
    assert (plugged.grouping, alone.grouping) == ("location-5", None)
    assert plugged.model == alone.model | {"css": True}


def test_a_dataset_may_have_seeds_of_its_own(config: dict[str, Any]) -> None:
    config["datasets"]["again"] = config["datasets"]["demo"] | {"seeds": [3, 4]}
    datasets = load_config(config).datasets
    assert (datasets["demo"].seeds, datasets["again"].seeds) == ([0], [3, 4])


def test_a_dataset_may_be_evaluated_otherwise(config: dict[str, Any]) -> None:
    config["evaluation"] = {"threshold": "youden"}
    config["datasets"]["demo"]["evaluation"] = {"patient": "max"}
    assert load_config(config).datasets["demo"].evaluation == {"threshold": "youden", "patient": "max"}
    config["datasets"]["demo"]["classes"] = ["normal", "tumour", "other"]
    text = problems(config)
    assert "datasets.demo: a threshold by youden is for two classes, not 3: set datasets.demo.evaluation" in text
