"""What can be wrong with a configuration: each check yields sentences that name the key and the remedy."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from slidestore.settings import own_function

if TYPE_CHECKING:
    from gmmamba.config import CohortPlan

RESERVED = ("tiles", "features", "groups", "logs", "benchmarks", "tables")  # folders of results/{name}/ that stages own
SPLIT_FILES = {"file": "CSV (slide_id, fold0, fold1, ...)", "clam": "folder of splits_0.csv, splits_1.csv, ..."}
PROTOCOLS = ("unified", "official")


class ConfigError(ValueError):
    """The configuration or a slide sheet cannot be used; the message lists every problem found."""


def datasets_of(experiment: Mapping[str, Any]) -> list[str]:
    """An experiment names one dataset, or several on each of which it is trained and tested."""
    named = experiment["dataset"]
    return [named] if isinstance(named, str) else named


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
        threshold = (settings["evaluation"] | dataset["evaluation"])["threshold"]
        if threshold != "argmax" and len(dataset["classes"]) > 2:
            yield (
                f"datasets.{name}: a threshold by {threshold} is for two classes, not {len(dataset['classes'])}: set "
                f"datasets.{name}.evaluation: {{threshold: argmax}}"
            )
    for name, experiment in settings["experiments"].items():
        yield from unknown(f"experiments.{name}.model", experiment["model"], "models")
        for dataset in datasets_of(experiment):
            yield from unknown(f"experiments.{name}.dataset", dataset, "datasets")
        if name in RESERVED:
            yield f"experiments.{name}: this name is a folder of the pipeline's own, choose another"
        if name.endswith(tuple(f".{protocol}" for protocol in PROTOCOLS)):
            yield f"experiments.{name}: such names are those of the tables' experiments, choose another"
    for name, new in settings["predictions"].items():
        where = f"predictions.{name}"
        yield from unknown(f"{where}.dataset", new["dataset"], "datasets")
        yield from unknown(f"{where}.experiment", new["experiment"], "experiments")
        experiment = settings["experiments"].get(new["experiment"])
        if experiment and new["dataset"] not in datasets_of(experiment):
            yield f"{where}: experiment {new['experiment']} is not trained on dataset {new['dataset']}"
        if name in settings["cohorts"] or name in settings["datasets"]:
            yield f"{where}: a cohort or dataset has this name, and so the folder results/{name}: choose another"
    costs = settings["report"]["costs"]
    if costs is not None and not Path(costs).is_file():
        yield f"report.costs: {costs} does not exist (a path relative to the working directory)"
    for name, named in settings["tables"]["datasets"].items():
        for dataset in named:
            yield from unknown(f"tables.datasets.{name}", dataset, "datasets")


def different_tilings(where: str, like: str | None, cohorts: Mapping[str, CohortPlan]) -> list[str]:
    """Why it is not known how new slides are tiled, like the training's: `cohorts` are those of the dataset."""
    if like is not None and like not in cohorts:
        return [f"{where}.like: {like!r} is no cohort of its dataset, {nearest(like, list(cohorts))}"]
    if imported := [cohort.name for cohort in cohorts.values() if cohort.features]:
        return [
            f"{where}: the features of {imported[0]} were imported, so how to make those of new slides is not known"
        ]
    if like is None and any(cohort.tiling != next(iter(cohorts.values())).tiling for cohort in cohorts.values()):
        return [f"{where}: the cohorts of its dataset are tiled in different ways: set like, to {' or '.join(cohorts)}"]
    return []


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


def feature_problems(cohort: CohortPlan) -> Iterator[str]:
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
    if split["scheme"] in ("file", "clam"):
        if not split["path"]:
            yield f"{where}.split: the scheme {split['scheme']} needs the path of its {SPLIT_FILES[split['scheme']]}"
        elif not Path(split["path"]).exists():
            yield f"{where}.split.path: {split['path']} does not exist (a path relative to the working directory)"
    elif split["path"]:
        yield f"{where}.split.path: only the schemes file and clam use it, this one is {split['scheme']}"
    if split["scheme"] == "leave_one_cohort_out" and len(cohorts) < 2:
        yield f"{where}.split: leave_one_cohort_out needs two cohorts or more, {where}.cohorts has {len(cohorts)}"
