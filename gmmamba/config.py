"""The configuration: checked whole before any job starts, and resolved into what each stage needs.

Reads config.yaml (already parsed), workflow/schemas/config.schema.yaml, config/models.yaml, config/tables.yaml and the
slide sheets; writes nothing. An experiment is resolved as ``method defaults <- models[name] <- overrides``; seeds and
folds are not part of it, so that one more seed trains only that seed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gmmamba.cohort import CohortPlan, check_dataset, read_sheet
from gmmamba.config_checks import (
    ConfigError,
    datasets_of,
    different_tilings,
    feature_problems,
    model_problems,
    overlap_problems,
    raise_if,
    reference_problems,
    schema_problems,
    slide_tiling_problems,
)  # fmt: skip
from gmmamba.models import CSS_HOSTS
from gmmamba.new_slides import NoSlidesError, SlidesError, list_slides
from gmmamba.project import PROJECT
from gmmamba.split_files import SplitError, fold_names, read_split_file
from gmmamba.splits import FILES, SplitSettings
from gmmamba.table_rows import Table, experiment_name, table_of

DEFAULT_SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"
NAMED_MODELS = PROJECT / "config" / "models.yaml"  # known to every configuration, as are the tables
TABLES = PROJECT / "config" / "tables.yaml"


@dataclass(frozen=True)
class Dataset:
    """Cohorts with the same classes; `classes` in order, the second of two is the positive one."""

    name: str
    cohorts: list[str]
    classes: list[str]
    encoder: str
    split: SplitSettings
    seeds: list[int]
    evaluation: dict[str, Any]

    @property
    def folds(self) -> list[int]:
        return list(range(self.split.count_folds(self.cohorts)))


@dataclass(frozen=True)
class Experiment:
    """What training is given. `grouping` is e.g. "location-10", or None for models that use no groups."""

    name: str
    method: str
    model: dict[str, Any]
    grouping: str | None
    training: dict[str, Any]
    encoder: str
    classes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NewSlides:
    """Slides to predict with a trained experiment; `cohort` has them, the tiling of the training and no labels."""

    cohort: CohortPlan
    source: Path
    dataset: str
    experiment: str
    like: str
    mpp: float | None


@dataclass(frozen=True)
class Config:
    cohorts: dict[str, CohortPlan]
    predictions: dict[str, NewSlides]
    encoders: dict[str, dict[str, Any]]
    datasets: dict[str, Dataset]
    experiments: dict[tuple[str, str], Experiment]  # by (dataset, experiment)
    tables: dict[str, Table]
    table_datasets: dict[str, list[str]]  # by table
    table_protocol: str
    table_experiment: Callable[[str, str], Experiment]
    """That of a dataset and a row, resolved when it is asked for; ConfigError as for other experiments."""
    max_failed_share: float
    reading: dict[str, Any]
    report: dict[str, Any]
    warnings: dict[str, list[str]]  # by dataset: what may be wrong with its sheets, for a person to judge

    def warning_lines(self) -> list[str]:
        return [f"datasets.{name}: {warning}" for name, found in self.warnings.items() for warning in found]

    def summary(self) -> str:
        """What is in it, for a person to compare with what was meant."""
        lines = []
        for cohort in self.cohorts.values():
            taking_part = sum(not slide.exclude for slide in cohort.slides.values())
            left_out = len(cohort.slides) - taking_part
            lines.append(
                f"cohort {cohort.name}: {taking_part} slides of {cohort.sheet}"
                + (f" ({left_out} excluded there)" if left_out else "")
                + f", {cohort.tiling['patch_px']} px patches at {cohort.tiling['mpp']} µm per pixel,"
                f" encoded by {', '.join(cohort.encoders)}"
            )
        for dataset in self.datasets.values():
            slides = [s for name in dataset.cohorts for s in self.cohorts[name].slides.values() if not s.exclude]
            counts = ", ".join(f"{sum(s.label == label for s in slides)} {label}" for label in dataset.classes)
            patients = len({slide.patient_id for slide in slides})
            runs = len(dataset.folds) * len(dataset.seeds)
            lines.append(
                f"dataset {dataset.name}: {counts}, of {patients} patients; {dataset.split.scheme}, "
                f"{len(dataset.folds)} folds x {len(dataset.seeds)} seeds = {runs} models an experiment"
            )
        for (name, experiment), settings in self.experiments.items():
            grouping = f", groups {settings.grouping}" if settings.grouping else ""
            epochs = settings.training["epochs"]
            lines.append(f"experiment {name}/{experiment}: {settings.method}{grouping}, up to {epochs} epochs")
        lines += [
            f"prediction {name}: {len(new.cohort.slides)} slides of {new.source} by {new.dataset}/{new.experiment}"
            for name, new in self.predictions.items()
        ]
        return "\n".join(lines)

    def encoder_names(self) -> set[str]:
        """Every encoder whose features there are: those that run here, and those of imported features."""
        return {*self.encoders, *(name for cohort in self.cohorts.values() for name in cohort.features)}

    def table_experiments(self) -> dict[str, str]:
        """The row of each experiment of the tables, by the experiment's name."""
        return {experiment_name(row, self.table_protocol): row for table in self.tables.values() for row in table.rows}


def load_config(raw: Mapping[str, Any], schema_file: Path = DEFAULT_SCHEMA) -> Config:
    """Check a parsed config.yaml and its slide sheets, and resolve them. Its models stand beside the named ones.

    Raises:
        ConfigError: naming every unknown key (with the nearest known one), wrong value and bad sheet line.
    """
    schema = with_css_plugin(yaml.safe_load(schema_file.read_text()))
    named = yaml.safe_load(NAMED_MODELS.read_text())
    if isinstance(own := raw.get("models", {}), Mapping):
        raw = {**raw, "models": named["models"] | dict(own)}
    raise_if(list(schema_problems(raw, schema, schema)) + list(model_problems(raw, schema)))
    settings = with_defaults(raw, schema, schema)
    raise_if(list(reference_problems(settings)))

    problems: list[str] = []
    cohorts = {}
    for name, cohort in settings["cohorts"].items():
        sheet, features = Path(cohort["sheet"]), cohort.get("features", {})
        tiling = {**settings["tiling"], **cohort["tiling"]}
        slides, found = read_sheet(
            sheet, name, cohort.get("mpp"), cohort.get("magnification"), list(tiling), need_files=not features
        )
        problems += found
        problems += overlap_problems(f"cohorts.{name}.tiling", tiling) or [
            problem
            for slide in slides.values()
            for problem in slide_tiling_problems(f"{sheet}, line {slide.line}: tiling", slide.tiling, tiling, schema)
        ]
        encoders = cohort.get("encoders", list(features or settings["encoders"]))
        cohorts[name] = CohortPlan(name, sheet, slides, tiling, encoders, features)
        problems += feature_problems(cohorts[name])
    raise_if(problems)

    datasets, warnings = {}, {}
    for name, dataset in settings["datasets"].items():
        split = with_folds_of_file(SplitSettings(**dataset["split"]), f"datasets.{name}.split.path")
        seeds = dataset.get("seeds", settings["seeds"])
        datasets[name] = Dataset(
            name, dataset["cohorts"], dataset["classes"], dataset["encoder"], split, seeds,
            settings["evaluation"] | dataset["evaluation"],
        )  # fmt: skip
        members = [cohorts[c] for c in dataset["cohorts"]]
        found, warnings[name] = check_dataset(
            name, [(c.name, c.sheet, list(c.slides.values())) for c in members], dataset["classes"], split
        )
        problems += found
    raise_if(problems)

    settings["official"] = named["official"]
    experiments = {
        (dataset, name): resolve_experiment(name, e, settings, datasets[dataset], schema)
        for name, e in settings["experiments"].items()
        for dataset in datasets_of(e)
    }
    asked = settings["tables"]
    tables = {name: table_of(table) for name, table in yaml.safe_load(TABLES.read_text())["tables"].items()}
    rows = {name: row for table in tables.values() for name, row in table.rows.items()}

    @cache
    def table_experiment(dataset: str, name: str) -> Experiment:
        row, wanted = rows[name], {"protocol": asked["protocol"], "training": asked["training"]}
        if row.model not in settings["models"]:
            raise ConfigError(f"{TABLES.name}, row {name}: there is no model {row.model!r} in {NAMED_MODELS.name}")
        experiment = {"model": row.model, "overrides": row.overrides, **wanted}
        return resolve_experiment(
            experiment_name(name, asked["protocol"]), experiment, settings, datasets[dataset], schema
        )

    predictions = {}
    for name, new in settings["predictions"].items():
        try:
            predictions[name] = new_slides(name, new, cohorts, datasets)
        except NoSlidesError as error:  # a folder that is filled now and then: all else goes on
            print(f"predictions.{name}: {error}; nothing is predicted of it", file=sys.stderr)
    return Config(
        cohorts, predictions, settings["encoders"], datasets, experiments,
        tables, {name: asked["datasets"].get(name, list(datasets)) for name in tables}, asked["protocol"],
        table_experiment, settings["max_failed_share"], settings["reading"], settings["report"], warnings,
    )  # fmt: skip


def new_slides(
    name: str, new: Mapping[str, Any], cohorts: dict[str, CohortPlan], datasets: dict[str, Dataset]
) -> NewSlides:
    """The slides of `predictions.{name}`, listed. ConfigError where they cannot be, or their tiling is not known;
    NoSlidesError where their folder is empty."""
    where, dataset = f"predictions.{name}", datasets[new["dataset"]]
    members = {cohort: cohorts[cohort] for cohort in dataset.cohorts}
    raise_if(different_tilings(where, new.get("like"), members))
    like = new.get("like", dataset.cohorts[0])
    try:
        slides = list_slides(Path(new["slides"]), new.get("mpp"))
    except NoSlidesError:
        raise
    except SlidesError as error:
        raise ConfigError(f"{where}.slides: {error}") from error
    cohort = CohortPlan(
        name,
        Path(new["slides"]),
        {slide.slide_id: slide for slide in slides},
        cohorts[like].tiling,
        [dataset.encoder],
        {},
    )
    return NewSlides(cohort, Path(new["slides"]), dataset.name, new["experiment"], like, new.get("mpp"))


def with_folds_of_file(split: SplitSettings, where: str) -> SplitSettings:
    """As many folds as the file has, for the schemes that have one. ConfigError where it cannot be read."""
    if split.scheme not in FILES or split.path is None:
        return split
    try:
        return replace(split, folds=len(fold_names(read_split_file(Path(split.path), split.scheme))))
    except SplitError as error:
        raise ConfigError(f"{where}: {error}") from error


def with_css_plugin(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema in which every method that CSS can be plugged into has the plug-in's hyperparameters, too."""
    methods = dict(schema["$defs"]["methods"])
    for name in CSS_HOSTS & set(methods):
        properties = methods[name]["properties"] | schema["$defs"]["css_plugin"]["properties"]
        methods[name] = methods[name] | {"properties": properties}
    return {**schema, "$defs": schema["$defs"] | {"methods": methods}}


def resolve_experiment(
    name: str, experiment: dict[str, Any], settings: dict[str, Any], dataset: Dataset, schema: dict[str, Any]
) -> Experiment:
    """``method defaults <- models[name] <- overrides``; grouping and number of groups become one name."""
    chosen = {**settings["models"][experiment["model"]], **experiment["overrides"]}
    method = chosen["method"]
    if method in CSS_HOSTS:
        check_css_plugin(name, chosen)
    model = with_defaults(chosen, schema["$defs"]["methods"][method], schema)
    del model["method"]
    kind, groups = model.pop("grouping", "none"), model.pop("groups", None)
    if method in CSS_HOSTS and not model["css"]:
        del model["css"]
        kind = "none"
    training = settings["training"]
    if experiment["protocol"] == "official":
        if method not in settings["official"]:
            known = ", ".join(settings["official"])
            raise ConfigError(f"experiments.{name}.protocol: no official one is known for {method}, only for {known}")
        training = with_defaults(settings["official"][method], schema["$defs"]["training"], schema)
    training = {**training, **experiment["training"]}
    if training["epochs"] <= training["select_after"]:
        raise ConfigError(
            f"experiments.{name}: training.epochs ({training['epochs']}) must exceed training.select_after "
            f"({training['select_after']}), the epochs of which none is kept: raise the one or lower the other"
        )
    grouping = None if kind == "none" else f"{kind}-{groups}"
    return Experiment(name, method, model, grouping, training, dataset.encoder, dataset.classes)


def check_css_plugin(name: str, model: Mapping[str, Any]) -> None:
    """ConfigError for what cannot be plugged together."""
    if not model.get("css", False):
        if unused := sorted({"grouping", "groups"} & set(model)):
            raise ConfigError(f"experiments.{name}: {model['method']} has {unused[0]} only with css: true")
    elif model.get("width", 8) % 8:
        raise ConfigError(f"experiments.{name}: with css, width must be a multiple of 8, not {model['width']}")


def with_defaults(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> Any:
    """A copy of `value` in which absent keys have the schema's defaults (none inside ``partial: true``)."""
    if "$ref" in schema:
        if schema.get("partial"):
            return copy.deepcopy(value)
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if not isinstance(value, Mapping):
        return copy.deepcopy(value)
    properties = schema.get("properties", {})
    other = schema.get("additionalProperties")
    filled = {key: subschema["default"] for key, subschema in properties.items() if "default" in subschema}
    filled.update(value)
    return {
        key: with_defaults(item, properties.get(key, other if isinstance(other, dict) else {}), root)
        for key, item in filled.items()
    }
