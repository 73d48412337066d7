"""The configuration and the slide sheets fail by name, before any job starts."""

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gmmamba.__main__ import main
from gmmamba.config import ConfigError, Experiment, load_config, schema_problems
from gmmamba.evaluation import Evaluation
from gmmamba.models import MODELS, create_model
from gmmamba.models.bag import Bag, MILOutput
from gmmamba.models.css import VARIANTS
from gmmamba.models.gmmamba import PUBLISHED
from gmmamba.models.imm import MASKS
from gmmamba.splits import SplitSettings
from gmmamba.training import TrainingSettings
from preprocessing.encoders import EncoderSettings
from preprocessing.tile import TilingSettings
from tests.docs import code_blocks

ROOT = Path(__file__).parents[2]


def write_sheet(folder: Path, rows: list[str], header: str = "slide_id,patient_id,label,path") -> Path:
    """A sheet whose slides exist (empty files: nobody reads them here)."""
    for row in rows:
        name = row.split(",")[3]
        if name and "absent" not in name:
            (folder / name).touch()
    sheet = folder / "slides.csv"
    sheet.write_text("\n".join([header, *rows]) + "\n")
    return sheet


def good_rows() -> list[str]:
    return [f"S{i},P{i},{'tumour' if i % 2 else 'normal'},s{i}.svs" for i in range(20)]


def good_config(sheet: Path) -> dict[str, Any]:
    text = (ROOT / "config.yaml").read_text()
    return yaml.safe_load(text.replace("results/demo/cohort/slides.csv", str(sheet))) | {"models": named_models()}


def named_models() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "config" / "models.yaml").read_text())["models"]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return good_config(write_sheet(tmp_path, good_rows()))


def problems(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    return str(caught.value)


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
            "unknown label 'tumour', did you mean 'tumor'?",
        ),
        (("datasets", "demo", "classes"), ["normal", "tumour", "benign"], "no slide has the label 'benign'"),
        (("training", "epochs"), 5, "must exceed training.select_after"),
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
    ("row", "message"),
    [
        ("S1,P90,normal,new.svs", "slide_id 'S1' stands in line 3 already"),
        ("S90,P1,normal,new.svs", "patient P1 has two labels"),
        ("S90,P90,normal,absent.svs", "no such file"),
        ("S90,,normal,new.svs", "has no patient_id"),
        ("S 90,P90,normal,new.svs", "slide_id 'S 90'"),
        ("../S90,P90,normal,new.svs", "slide_id '../S90'"),
        ("S90,P90,tumor,new.svs", "unknown label 'tumor', did you mean 'tumour'?"),
    ],
)
def test_each_bad_row_is_named_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    text = problems(good_config(write_sheet(tmp_path, [*good_rows(), row])))
    assert message in text
    assert "slides.csv" in text


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    rows = [*good_rows(), "S1,P90,normal,new.svs", "S91,P91,normal,absent.svs"]
    text = problems(good_config(write_sheet(tmp_path, rows)))
    assert "already" in text
    assert "absent.svs" in text


def test_excluded_rows_are_kept_but_not_checked_for_files(tmp_path: Path) -> None:
    rows = [row + "," for row in good_rows()] + ["S90,P90,whatever,absent.svs,blurred"]
    config = good_config(write_sheet(tmp_path, rows, "slide_id,patient_id,label,path,exclude"))
    slides = load_config(config).cohorts["demo"].slides
    assert slides["S90"].exclude == "blurred"
    assert slides["S0"].exclude == ""


def test_mpp_comes_from_the_row_before_the_cohort(tmp_path: Path) -> None:
    rows = [*(row + ",," for row in good_rows()), "S90,P90,normal,n.svs,0.25,", "S91,P91,normal,m.svs,,20"]
    config = good_config(write_sheet(tmp_path, rows, "slide_id,patient_id,label,path,mpp,magnification"))
    config["cohorts"]["demo"]["magnification"] = 40
    slides = load_config(config).cohorts["demo"].slides
    assert [(slides[s].mpp, slides[s].mpp_source) for s in ("S0", "S90", "S91")] == [
        (0.25, "config"), (0.25, "sheet"), (0.5, "sheet"),
    ]  # fmt: skip


def test_a_slide_overrides_tiling_and_names_its_mask(tmp_path: Path) -> None:
    """Numbers as spreadsheets write them; an empty cell leaves the cohort's value."""
    rows = [*(row + ",,," for row in good_rows()), "S90,P90,normal,n.svs,otsu,256.0,outlines/n.geojson"]
    (tmp_path / "outlines").mkdir()
    (tmp_path / "outlines" / "n.geojson").touch()
    header = "slide_id,patient_id,label,path,tiling.saturation_threshold,tiling.patch_px,mask"
    config = good_config(write_sheet(tmp_path, rows, header))
    config["cohorts"]["demo"]["tiling"] = {"saturation_threshold": 12, "mpp": 1.0}
    cohort = load_config(config).cohorts["demo"]
    assert cohort.tiling_of(cohort.slides["S0"]) == cohort.tiling
    assert cohort.tiling_of(cohort.slides["S90"]) == cohort.tiling | {"saturation_threshold": "otsu", "patch_px": 256}
    assert cohort.slides["S90"].mask == tmp_path / "outlines" / "n.geojson"
    assert cohort.slides["S0"].mask is None
    TilingSettings(**cohort.tiling_of(cohort.slides["S90"]))  # as `tile` will build it


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("tiling.patch_px", "many", "slides.csv, line 22: tiling.patch_px: 'many' is not of type 'integer'"),
        ("tiling.min_tissue_share", "30", "slides.csv, line 22: tiling.min_tissue_share: 30 is greater than"),
        ("tiling.mpp", "nan", "slides.csv, line 22: tiling.mpp: 'nan' is not of type 'number'"),
        ("tiling.overlap_px", "224", "line 22: tiling: overlap_px (224) must be less than patch_px (224)"),
        ("tiling.patchpx", "", "slides.csv: unknown column 'tiling.patchpx', did you mean 'tiling.patch_px'?"),
        ("tiling.colour", "", "slides.csv: unknown column 'tiling.colour', keys of `tiling`: patch_px, "),
        ("tiling_patch_px", "256", "unknown column 'tiling_patch_px', did you mean 'tiling.patch_px'?"),
        ("masks", "m.png", "unknown column 'masks', did you mean 'mask'?"),
        ("mask", "absent.png", "slides.csv, line 22: slide S90: no such mask: "),
        ("mask", "m.xml", "m.xml is none of .geojson, .json, .png, .tif, .tiff"),
    ],
)
def test_a_slide_s_own_settings_are_checked_like_the_config(
    tmp_path: Path, column: str, cell: str, message: str
) -> None:
    rows = [*(row + "," for row in good_rows()), f"S90,P90,normal,n.svs,{cell}"]
    text = problems(good_config(write_sheet(tmp_path, rows, f"slide_id,patient_id,label,path,{column}")))
    assert message in text


def test_patches_that_overlap_wholly_are_an_error(config: dict[str, Any]) -> None:
    config["cohorts"]["demo"]["tiling"] = {"overlap_px": 300}
    assert "cohorts.demo.tiling: overlap_px (300) must be less than patch_px (224)" in problems(config)


def test_a_misspelt_column_is_named(tmp_path: Path) -> None:
    rows = [row + ",0.5" for row in good_rows()]
    text = problems(good_config(write_sheet(tmp_path, rows, "slide_id,patient,label,path,mppp")))
    assert "no column 'patient_id' ('patient' is misspelt?)" in text
    assert "unknown column 'mppp', did you mean 'mpp'?" in text


def test_cells_without_a_column_are_an_error(tmp_path: Path) -> None:
    text = problems(good_config(write_sheet(tmp_path, [row + "," for row in good_rows()])))
    assert "slides.csv: the lines have more cells than the first one has names" in text


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


@pytest.mark.parametrize("page", ["coming_from.md", "encoders.md", "interop.md", "statistics.md"])
def test_the_docs_examples_are_configurations(page: str) -> None:
    example = yaml.safe_load(code_blocks(page, "yaml")[0])
    minimal: dict[str, Any] = {"cohorts": {"a": {"sheet": "a.csv"}}, "datasets": {}, "experiments": {}}
    assert list(schema_problems(minimal | example, SCHEMA, SCHEMA)) == []


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


NAMED = list(named_models())
ABLATION = {  # GMMAMBA.md, section 6: groups (LG), BiMamba 2 and pooling by attention (IMM), its mask, CSS
    "with-bmp": (None, False, False, False),
    "with-lg-bmp": ("location-10", False, False, False),
    "without-masking": ("location-10", True, False, False),
    "with-imm": ("location-10", True, True, False),
    "with-css": ("location-10", True, False, True),
    "published": ("location-10", True, True, True),
}


@pytest.fixture
def named(config: dict[str, Any]) -> dict[str, Experiment]:
    """Every model of config/models.yaml, as training would be given it."""
    config["experiments"] = {name: {"model": name, "dataset": "demo"} for name in NAMED}
    return {name: experiment for (_, name), experiment in load_config(config).experiments.items()}


def run(experiment: Experiment) -> MILOutput:
    """A narrow twin of the experiment's model on a bag of four groups."""
    torch.manual_seed(0)
    narrow = {"width": 32} if "width" in experiment.model else {}
    model = create_model(experiment.method, 24, 2, **(experiment.model | narrow))
    bag = Bag(torch.randn(40, 24), torch.zeros(40, 2, dtype=torch.int32), torch.arange(40) % 4)
    output: MILOutput = model.eval()(bag)
    return output


@pytest.mark.parametrize("name", NAMED)
def test_every_named_model_runs(named: dict[str, Experiment], name: str) -> None:
    output = run(named[name])
    assert output.logits.shape == (1, 2)
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("name", ABLATION)
def test_ablation_rows_have_what_the_table_says(named: dict[str, Experiment], name: str) -> None:
    details = run(named[name]).details
    parts = ("h2" in details, "mask_scores" in details, "super_features" in details)
    assert (named[name].grouping, *parts) == ABLATION[name]
    assert details["keep"].all() == ("mask_scores" not in details)


def test_every_row_of_the_papers_tables_is_a_named_model(named: dict[str, Experiment]) -> None:
    ours = [experiment for experiment in named.values() if experiment.method == "gmmamba"]
    assert {e.model["css"] for e in ours} >= {*VARIANTS, None}
    assert {e.model["mask_ratio"] for e in ours} >= {0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3}
    assert {e.model["init"] for e in ours} >= {"published", "mamba"}
    assert {e.grouping for e in ours} >= {
        "location-2", "location-5", "location-10", "location-20", "random-10", "sequential-10", "features-10",
    }  # fmt: skip
    assert {e.model["mask"] for e in ours} == {None, *MASKS}
    assert named["published"].model.items() >= PUBLISHED.items()
    different = {str(dataclasses.replace(experiment, name="")) for experiment in named.values()}
    assert len(different) == len(named)  # no two names for one model


@pytest.fixture
def three_cohorts(config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Cohorts A, B and C of 20 patients each, five a site, and one dataset of them."""
    sheets = {}
    for cohort in "ABC":
        rows = [row.replace("S", cohort).replace("P", f"{cohort}-P") + f",{cohort}{i // 5}"
                for i, row in enumerate(good_rows())]  # fmt: skip
        (tmp_path / cohort).mkdir()
        sheets[cohort] = write_sheet(tmp_path / cohort, rows, "slide_id,patient_id,label,path,site")
    config["cohorts"] = {cohort: {"sheet": str(sheet)} for cohort, sheet in sheets.items()}
    config["datasets"]["demo"]["cohorts"] = list("ABC")
    return config


@pytest.mark.parametrize(
    ("split", "folds"),
    [
        ({"scheme": "external", "test_cohorts": ["C"], "folds": 4}, 4),
        ({"scheme": "leave_one_cohort_out"}, 3),
        ({"scheme": "site_preserved", "folds": 3}, 3),
    ],
)
def test_several_cohorts_and_a_patient_who_would_be_in_two_parts(
    three_cohorts: dict[str, Any], tmp_path: Path, split: dict[str, Any], folds: int
) -> None:
    three_cohorts["datasets"]["demo"]["split"] = split
    assert load_config(three_cohorts).datasets["demo"].folds == list(range(folds))

    sheet = tmp_path / "C" / "slides.csv"
    sheet.write_text(sheet.read_text().replace("C3,C-P3,", "C3,A-P1,"))
    text = problems(three_cohorts)
    assert "datasets.demo.split: patient A-P1 has slides " in text
    assert f"for A1 ({tmp_path / 'A' / 'slides.csv'}, line 3)" in text  # where both stand
    assert f"for C3 ({sheet}, line 5)" in text
    assert "fill 'exclude' for" in text  # what to do


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"scheme": "external"}, "datasets.demo.split: the scheme external needs test_cohorts, some of A, B, C"),
        ({"scheme": "external", "test_cohorts": ["D"]}, "'D' is not in datasets.demo.cohorts, known: A, B, C"),
        ({"scheme": "external", "test_cohorts": ["A", "B", "C"]}, "none is left to train on"),
        ({"test_cohorts": ["A"]}, "only the scheme external uses them, this one is kfold"),
        ({"scheme": "column"}, "line 2: slide A0 has no 'split', which datasets.demo.split asks for (scheme column)"),
        ({"scheme": "site_preserved", "folds": 13}, "class 'normal' comes from 12 sites"),
    ],
)
def test_splits_that_cannot_be_are_named(three_cohorts: dict[str, Any], split: dict[str, Any], message: str) -> None:
    three_cohorts["datasets"]["demo"]["split"] = split
    assert message in problems(three_cohorts)


def test_a_cohort_of_which_nothing_is_left_is_named(three_cohorts: dict[str, Any], tmp_path: Path) -> None:
    sheet = tmp_path / "B" / "slides.csv"
    header, *rows = sheet.read_text().splitlines()
    sheet.write_text("\n".join([header + ",exclude", *(row + ",blurred" for row in rows)]) + "\n")
    three_cohorts["datasets"]["demo"]["split"] = {"scheme": "leave_one_cohort_out"}
    assert f"datasets.demo: no slide of cohort B takes part, see {sheet}" in problems(three_cohorts)


def test_two_parts_for_a_patient_are_named_before_any_job(tmp_path: Path) -> None:
    rows = [row + f",{('train', 'val', 'test')[i // 2 % 3]}" for i, row in enumerate(good_rows())]
    config = good_config(
        write_sheet(tmp_path, [*rows, "S90,P0,normal,n.svs,test"], "slide_id,patient_id,label,path,split")
    )
    config["datasets"]["demo"]["split"] = {"scheme": "column"}
    assert "patient P0 has two parts: 'train' for S0" in problems(config)


def test_a_dataset_may_be_evaluated_otherwise(config: dict[str, Any]) -> None:
    config["evaluation"] = {"threshold": "youden"}
    config["datasets"]["demo"]["evaluation"] = {"patient": "max"}
    assert load_config(config).datasets["demo"].evaluation == {"threshold": "youden", "patient": "max"}
    config["datasets"]["demo"]["classes"] = ["normal", "tumour", "other"]
    text = problems(config)
    assert "datasets.demo: a threshold by youden is for two classes, not 3: set datasets.demo.evaluation" in text


def test_a_slide_of_two_people_is_refused(tmp_path: Path) -> None:
    rows = [*good_rows(), "S90,P90,normal,s4.svs"]
    text = problems(good_config(write_sheet(tmp_path, rows)))
    assert re.search(r"demo: S4 \(.*slides.csv, line 6\); S90 \(.*slides.csv, line 22\) are one file, ", text)
    excluded = write_sheet(tmp_path, [f"{row}," for row in good_rows()] + [rows[-1] + ",a copy"],
                           "slide_id,patient_id,label,path,exclude")  # fmt: skip
    assert load_config(good_config(excluded)).warning_lines() == []


def test_what_a_person_must_judge_is_said_and_not_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*good_rows(), "S90,P90-normal,normal,n.svs", "S91,P90-tumour,tumour,t.svs", "S92,P0,normal,s0.svs"]
    config = good_config(write_sheet(tmp_path, rows))
    again, alike = load_config(config).warning_lines()
    assert re.search(r"datasets.demo: S0 \(.*line 2\); S92 \(.*line 24\) are one file, .* which counts 2 times", again)
    assert re.search(
        r"datasets.demo: .* P90-normal \(S90 .*line 22\)\) and P90-tumour \(S91 .*\)\. If these are", alike
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["check-config", str(tmp_path / "config.yaml")]) == 0
    assert capsys.readouterr().err.splitlines() == [f"Warning: {again}", f"Warning: {alike}"]


def test_cohorts_of_pairs_have_a_way_out(tmp_path: Path) -> None:
    """Tumour and normal tissue of one person: as different patients they are said, as one they need one label."""
    rows = [f"case{i}-{c},case{i}-{c},{c},c{i}{c}.svs" for i in range(20) for c in ("tumour", "normal")]
    assert "case0-tumour" in load_config(good_config(write_sheet(tmp_path, rows))).warning_lines()[0]
    one = [f"case{i}-{c},case{i},tumour,c{i}{c}.svs" for i in range(20) for c in ("tumour", "normal")]
    sheet = write_sheet(tmp_path, [*one, *(f"N{i},N{i},normal,n{i}.svs" for i in range(20))])
    assert load_config(good_config(sheet)).warning_lines() == []
