"""The configuration: checked whole before any job starts, and resolved into what each stage needs.

Reads config.yaml (already parsed), workflow/schemas/config.schema.yaml, config/models.yaml, config/tables.yaml and the
slide sheets; writes nothing. An experiment is resolved as ``method defaults <- models[name] <- overrides``; seeds and
folds are not part of it, so that one more seed trains only that seed.
"""

from __future__ import annotations

import ast
import copy
import difflib
import re
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
from slidestore.foreign import ForeignFiles
from slidestore.settings import own_function

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
    """Slides of one sheet and how they are tiled. `slides` includes the excluded ones. `features` is empty unless they
    come from another tool: then by encoder, as in the config."""

    name: str
    sheet: Path
    slides: dict[str, Slide]
    tiling: dict[str, Any]
    encoders: list[str]
    features: dict[str, dict[str, Any]]

    def foreign_files(self, encoder: str, slide_id: str) -> ForeignFiles:
        """The files of another tool with the features of one slide. ValueError where its format needs `patches`."""
        source, stem = self.features[encoder], self.slides[slide_id].path.stem
        paths = {
            key: source[key] and Path(source[key].replace("{slide_id}", slide_id).replace("{stem}", stem))
            for key in ("path", "patches")
        }
        return ForeignFiles(source["format"], **paths)

    def tiling_of(self, slide: Slide) -> dict[str, Any]:
        """The tiling settings of one slide: the cohort's, and what the slide's row says otherwise."""
        return {**self.tiling, **slide.tiling}


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
        cohorts[name] = Cohort(name, sheet, slides, tiling, encoders, features)
        problems += feature_problems(cohorts[name])
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


def slide_tiling_problems(
    where: str, own: Mapping[str, Any], tiling: dict[str, Any], schema: dict[str, Any]
) -> list[str]:
    """What is wrong with the tiling settings that a slide's row gives, by themselves and beside its cohort's."""
    problems = list(schema_problems(own, schema["$defs"]["tiling"], schema, where))
    return problems or (overlap_problems(where, {**tiling, **own}) if own else [])


def overlap_problems(where: str, tiling: Mapping[str, Any]) -> list[str]:
    if tiling["overlap_px"] < tiling["patch_px"]:
        return []
    return [f"{where}: overlap_px ({tiling['overlap_px']}) must be less than patch_px ({tiling['patch_px']})"]


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
        if "features" not in cohort and not settings["encoders"]:
            yield f"cohorts.{name}: its slides have no encoder: name one in `encoders`, or import `features`"
        for key in ("tiling", "encoders"):
            if "features" in cohort and cohort.get(key):
                yield f"cohorts.{name}.{key}: its features are imported, so this does nothing: take it out"
    for name, encoder in settings["encoders"].items():
        if encoder["weights"] not in ("pretrained", "random") and not Path(encoder["weights"]).is_file():
            yield f"encoders.{name}.weights: {encoder['weights']!r} is neither pretrained nor random nor a file"
        yield from model_file_problems(f"encoders.{name}.model", encoder["model"])
    for name, dataset in settings["datasets"].items():
        for cohort in dataset["cohorts"]:
            yield from unknown(f"datasets.{name}.cohorts", cohort, "cohorts")
        yield from encoder_problems(f"datasets.{name}.encoder", dataset["encoder"], dataset["cohorts"], settings)
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


def encoder_problems(where: str, encoder: str, cohorts: list[str], settings: dict[str, Any]) -> Iterator[str]:
    """Cohorts of a dataset that have no features of its encoder."""
    imported = {name: cohort["features"] for name, cohort in settings["cohorts"].items() if "features" in cohort}
    everywhere = {*settings["encoders"], *(name for features in imported.values() for name in features)}
    if encoder not in everywhere:
        yield f"{where}: {encoder!r} is not in `encoders`, {nearest(encoder, sorted(everywhere))}"
        return
    for cohort in cohorts:
        wanted = settings["cohorts"].get(cohort, {}).get("encoders")
        if cohort in imported:
            if encoder not in imported[cohort]:
                yield f"{where}: {encoder!r} is not in cohorts.{cohort}.features"
        elif encoder not in settings["encoders"]:
            yield f"{where}: {encoder!r} is not in `encoders`, and cohorts.{cohort} has no `features` of it"
        elif wanted is not None and encoder not in wanted:
            yield f"{where}: {encoder!r} is not in cohorts.{cohort}.encoders"


def feature_problems(cohort: Cohort) -> Iterator[str]:
    """Imported features: slides without a file, or without the scale that the files do not have."""
    for encoder, source in cohort.features.items():
        where = f"cohorts.{cohort.name}.features.{encoder}"
        if not re.search(r"\{(slide_id|stem)\}", source["path"]):
            yield f"{where}.path: {source['path']!r} is one file for all slides: write {{slide_id}} for what differs"
            continue
        for slide in (slide for slide in cohort.slides.values() if not slide.exclude):
            place = f"{cohort.sheet}, line {slide.line}: slide {slide.slide_id}"
            try:
                files = cohort.foreign_files(encoder, slide.slide_id)
            except ValueError as error:
                yield f"{where}: {error}"
                break
            for path in filter(None, (files.path, files.patches)):
                if not path.is_file():
                    yield f"{place}: no such file: {path} ({where}; mend that path, or fill 'exclude')"
            if files.format == "clam-h5" and slide.mpp is None:
                remedy = f"add an 'mpp' column, or set cohorts.{cohort.name}.mpp"
                yield f"{place} has no mpp, which CLAM does not record: {remedy}"


def model_file_problems(where: str, model: str) -> Iterator[str]:
    """An encoder from a file: that there is such a Python file, and that it defines that function."""
    if model.startswith("local-dir:"):
        yield f"{where}: {model!r}: name the architecture, and give the weights' file of that folder as `weights`"
    if (own := own_function(model)) is None:
        return
    path, function = own
    if not path.is_file():
        yield f"{where}: {path} does not exist (a path relative to the working directory)"
        return
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        yield f"{where}: {path}, line {error.lineno}: {error.msg}"
        return
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in functions:
        yield f"{where}: {path} has no function {function!r}, {nearest(function, functions)}"


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
