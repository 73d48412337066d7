"""The configuration: checked whole before any job starts, and resolved into what each stage needs.

Reads config.yaml (already parsed), workflow/schemas/config.schema.yaml, config/models.yaml, config/tables.yaml and the
slide sheets; writes nothing. An experiment is resolved as ``method defaults <- models[name] <- overrides``; seeds and
folds are not part of it, so that one more seed trains only that seed.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from gmmamba.cohort import Slide, check_dataset, read_sheet
from gmmamba.models import CSS_HOSTS
from gmmamba.splits import SplitSettings
from gmmamba.table_rows import Table, experiment_name, table_of

ROOT = Path(__file__).parents[1]
DEFAULT_SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
NAMED_MODELS = ROOT / "config" / "models.yaml"  # known to every configuration, as are the tables
TABLES = ROOT / "config" / "tables.yaml"
RESERVED = ("tiles", "features", "groups", "logs", "benchmarks", "tables")  # folders of results/{name}/ that stages own
PROTOCOLS = ("unified", "official")


class ConfigError(ValueError):
    """The configuration or a slide sheet cannot be used; the message lists every problem found."""


@dataclass(frozen=True)
class Cohort:
    """Slides of one sheet and how they are tiled. `slides` includes the excluded ones."""

    name: str
    sheet: Path
    slides: dict[str, Slide]
    tiling: dict[str, Any]
    encoders: list[str]


@dataclass(frozen=True)
class Dataset:
    """Cohorts with the same classes; `classes` in order, the second of two is the positive one."""

    name: str
    cohorts: list[str]
    classes: list[str]
    encoder: str
    split: SplitSettings
    seeds: list[int]

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
class Config:
    cohorts: dict[str, Cohort]
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
        slides, found = read_sheet(Path(cohort["sheet"]), name, cohort.get("mpp"), cohort.get("magnification"))
        problems += found
        tiling = {**settings["tiling"], **cohort["tiling"]}
        encoders = cohort.get("encoders", list(settings["encoders"]))
        cohorts[name] = Cohort(name, Path(cohort["sheet"]), slides, tiling, encoders)
    raise_if(problems)

    datasets = {}
    for name, dataset in settings["datasets"].items():
        split = SplitSettings(**dataset["split"])
        seeds = dataset.get("seeds", settings["seeds"])
        datasets[name] = Dataset(name, dataset["cohorts"], dataset["classes"], dataset["encoder"], split, seeds)
        members = [cohorts[c] for c in dataset["cohorts"]]
        problems += check_dataset(
            name, [(c.name, c.sheet, list(c.slides.values())) for c in members], dataset["classes"], split
        )
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

    return Config(
        cohorts, settings["encoders"], datasets, experiments,
        tables, {name: asked["datasets"].get(name, list(datasets)) for name in tables}, asked["protocol"],
        table_experiment, settings["max_failed_share"], settings["reading"], settings["report"],
    )  # fmt: skip


def with_css_plugin(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema in which every method that CSS can be plugged into has the plug-in's hyperparameters, too."""
    methods = dict(schema["$defs"]["methods"])
    for name in CSS_HOSTS & set(methods):
        properties = methods[name]["properties"] | schema["$defs"]["css_plugin"]["properties"]
        methods[name] = methods[name] | {"properties": properties}
    return {**schema, "$defs": schema["$defs"] | {"methods": methods}}


def datasets_of(experiment: Mapping[str, Any]) -> list[str]:
    """An experiment names one dataset, or several on each of which it is trained and tested."""
    named = experiment["dataset"]
    return [named] if isinstance(named, str) else named


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
            f"({training['select_after']}): no epoch could be kept"
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


def raise_if(problems: list[str]) -> None:
    if problems:
        raise ConfigError("the configuration cannot be used:\n" + "\n".join(f"  - {p}" for p in problems))


def nearest(word: str, known: list[str]) -> str:
    """A hint naming the nearest known word, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def schema_problems(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "") -> Iterator[str]:
    """Every way in which `value` breaks `schema`, as sentences that start with the dotted key."""
    validator = jsonschema.Draft202012Validator({**schema, "$defs": root["$defs"]})
    for error in sorted(validator.iter_errors(value), key=lambda e: [str(p) for p in e.absolute_path]):
        place = ".".join([where, *map(str, error.absolute_path)] if where else map(str, error.absolute_path))
        prefix = f"{place}: " if place else ""
        if error.validator == "additionalProperties":
            known = list(error.schema["properties"])
            for key in sorted(set(error.instance) - set(known), key=str):
                yield f"{prefix}unknown key {key!r}, {nearest(str(key), known)}"
        elif error.validator == "pattern" and error.instance == error.schema.get("const", error.instance):
            yield f"{prefix}{error.instance!r} must be made of letters, digits, '.', '_' and '-'"
        else:
            yield f"{prefix}{error.message}"


def model_problems(raw: Mapping[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """Unknown methods and hyperparameters in `models` and in the experiments' overrides."""
    methods = {name: s for name, s in schema["$defs"]["methods"].items() if isinstance(s, dict)}
    models = raw.get("models")
    if not isinstance(models, Mapping):
        return
    for name, model in models.items():
        method = model.get("method") if isinstance(model, Mapping) else None
        if method in methods:
            yield from schema_problems(model, methods[method], schema, f"models.{name}")
        elif method is not None:
            yield f"models.{name}.method: unknown method {method!r}, {nearest(str(method), list(methods))}"
    for name, experiment in (raw.get("experiments") or {}).items():
        model = models.get(experiment.get("model")) if isinstance(experiment, Mapping) else None
        if isinstance(model, Mapping) and model.get("method") in methods and "overrides" in experiment:
            where = f"experiments.{name}.overrides"
            yield from schema_problems(experiment["overrides"], methods[model["method"]], schema, where)


def reference_problems(settings: dict[str, Any]) -> Iterator[str]:
    """Names that nothing answers to, and names that would share a folder with a stage."""

    def unknown(where: str, name: str, section: str) -> Iterator[str]:
        if name not in settings[section]:
            yield f"{where}: {name!r} is not in `{section}`, {nearest(name, list(settings[section]))}"

    for name, cohort in settings["cohorts"].items():
        for encoder in cohort.get("encoders", []):
            yield from unknown(f"cohorts.{name}.encoders", encoder, "encoders")
    for name, encoder in settings["encoders"].items():
        if encoder["weights"] not in ("pretrained", "random") and not Path(encoder["weights"]).is_file():
            yield f"encoders.{name}.weights: {encoder['weights']!r} is neither pretrained nor random nor a file"
    for name, dataset in settings["datasets"].items():
        yield from unknown(f"datasets.{name}.encoder", dataset["encoder"], "encoders")
        for cohort in dataset["cohorts"]:
            yield from unknown(f"datasets.{name}.cohorts", cohort, "cohorts")
            wanted = settings["cohorts"].get(cohort, {}).get("encoders")
            if wanted is not None and dataset["encoder"] not in wanted:
                yield f"datasets.{name}.encoder: {dataset['encoder']!r} is not in cohorts.{cohort}.encoders"
        yield from split_problems(f"datasets.{name}", dataset["cohorts"], dataset["split"])
    for name, experiment in settings["experiments"].items():
        yield from unknown(f"experiments.{name}.model", experiment["model"], "models")
        for dataset in datasets_of(experiment):
            yield from unknown(f"experiments.{name}.dataset", dataset, "datasets")
        if name in RESERVED:
            yield f"experiments.{name}: this name is a folder of the pipeline's own, choose another"
        if name.endswith(tuple(f".{protocol}" for protocol in PROTOCOLS)):
            yield f"experiments.{name}: such names are those of the tables' experiments, choose another"
    for name, named in settings["tables"]["datasets"].items():
        for dataset in named:
            yield from unknown(f"tables.datasets.{name}", dataset, "datasets")


def split_problems(where: str, cohorts: list[str], split: dict[str, Any]) -> Iterator[str]:
    """Test cohorts that the dataset has not, or that its scheme does not use, and too few cohorts for its scheme."""
    tested = split["test_cohorts"]
    for cohort in tested:
        if cohort not in cohorts:
            yield f"{where}.split.test_cohorts: {cohort!r} is not in {where}.cohorts, {nearest(cohort, cohorts)}"
    if split["scheme"] == "external":
        if not tested:
            yield f"{where}.split: the scheme external needs test_cohorts, some of {', '.join(cohorts)}"
        elif set(tested) >= set(cohorts):
            yield f"{where}.split.test_cohorts: all cohorts of the dataset are tested, none is left to train on"
    elif tested:
        yield f"{where}.split.test_cohorts: only the scheme external uses them, this one is {split['scheme']}"
    if split["scheme"] == "leave_one_cohort_out" and len(cohorts) < 2:
        yield f"{where}.split: leave_one_cohort_out needs two cohorts or more, {where}.cohorts has {len(cohorts)}"


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
