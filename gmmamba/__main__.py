"""The command line: one thin subcommand a stage, plus `run`, `demo`, `check-config`, `summary`, `view` and `verify`.

The Snakemake rules call these; `python -m gmmamba COMMAND --help` says what each reads and writes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmmamba.arguments import add_cohort, add_run, add_stores, add_tiles, cohort_file, grouping_file, label_class
from slidestore.warm_start import run_warm, usage

STAGES = (
    "account", "contact-sheet", "group", "group-by-features", "split", "train", "predict-fold", "record-pipeline",
    "evaluate", "report", "table",
)  # fmt: skip
ACCOUNTING = ["gmmamba.accounting"]
GROUPING = ["gmmamba.grouping"]
MODELLING = [
    "gmmamba.training", "gmmamba.models.gmmamba", "gmmamba.models.scan_numba", "zarr",
    "torch._inductor",  # imported by torch.use_deterministic_algorithms
]  # fmt: skip
"""What training and prediction import sooner or later: ten seconds of CPU."""


def parser() -> argparse.ArgumentParser:
    from gmmamba import __version__, split_commands
    from gmmamba.inference.cli import add_commands

    parser = argparse.ArgumentParser(
        prog="gmmamba", description="Slides to report: what is typed by hand beside `snakemake`, which does the work.",
        epilog=f"Stages, which `snakemake` runs: {', '.join(STAGES)}. gmmamba STAGE --help says what each does.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"gmmamba {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Any, help_text: str, preload: Sequence[str] = (), **parser: Any
    ) -> argparse.ArgumentParser:
        listed: dict[str, Any] = {} if name in STAGES else {"help": help_text}
        sub = commands.add_parser(name, description=help_text, **listed, **parser)
        sub.set_defaults(run=run, preload=preload)
        return sub

    sub = command("check-config", check_config, "check config.yaml and the slide sheets it names")
    sub.add_argument("config", type=Path, nargs="?", default=Path("config.yaml"), help="config.yaml unless given")
    sub.add_argument("--resolved", action="store_true", help="print every setting of every experiment, too")

    sub = command("run", run, "run the workflow here: what follows are Snakemake's targets and options, --help its own",
                  prefix_chars="+", add_help=False)  # fmt: skip
    sub.add_argument("arguments", nargs=argparse.REMAINDER)

    sub = command("demo", demo, "draw the demo's slides into a folder and put its config.yaml there")
    sub.add_argument("folder", type=Path)

    sub = command("sheet", sheet, "make the slide sheet of a cohort from a folder of slides and a label table")
    sub.add_argument("--slides", type=Path, required=True, metavar="FOLDER")
    sub.add_argument(
        "--labels", type=Path, required=True, nargs="+", metavar="TABLE", help="CSV or TSV; several join up"
    )
    sub.add_argument(
        "--form", help="form of the tables, where their columns do not show it (see gmmamba/label_tables.py)"
    )
    for role in ("patient", "slide", "label", "split"):
        sub.add_argument(f"--{role}-column", metavar="NAME", help=f"column of the tables with the {role}")
    sub.add_argument("--map", type=label_class, nargs="+", action="extend", default=[], metavar="LABEL=CLASS",
                     help="classes for the labels of the tables; slides of other labels are excluded")  # fmt: skip
    sub.add_argument("--frozen", action="store_true", help="frozen TCGA sections take part too")
    sub.add_argument("--all-names", action="store_true", help="name every slide in what is printed, not five of a kind")
    sub.add_argument("--output", type=Path, required=True, metavar="SHEET")

    sub = command("account", account, "slide table of a cohort: what became of every row of its sheet", ACCOUNTING)
    add_cohort(sub)
    add_tiles(sub)
    add_stores(sub)
    sub.add_argument("--max-failed-share", type=float, required=True)
    sub.add_argument("--output", type=Path, required=True)

    sub = command(
        "contact-sheet", contact_sheet, "one page with the picture, the counts and the problems of every slide"
    )
    add_cohort(sub)
    add_tiles(sub)
    sub.add_argument("--output", type=Path, required=True)

    sub = command("group", group, "group the patches of every slide of a cohort (LG)", GROUPING)
    add_cohort(sub)
    add_tiles(sub)
    sub.add_argument("--grouping", required=True, help="kind and number of groups, such as location-10")
    sub.add_argument("--output", type=Path, required=True)

    sub = command(
        "group-by-features", group_by_features, "the same by k-means on the features of one encoder", GROUPING
    )
    add_cohort(sub)
    add_stores(sub)
    sub.add_argument("--groups", type=int, required=True, help="number of groups")
    sub.add_argument("--output", type=Path, required=True)

    sub = command("split", split, "split the patients of a dataset into folds", ["gmmamba.splits"])
    sub.add_argument("--dataset", required=True)
    sub.add_argument("--classes", type=json.loads, required=True)
    sub.add_argument("--settings", type=json.loads, required=True)
    sub.add_argument("--slide-table", type=cohort_file, action="append", required=True, metavar="COHORT=CSV")
    sub.add_argument("--output", type=Path, required=True)

    split_commands.add_commands(command)

    sub = command("train", train, "train one experiment on one fold with one seed", MODELLING)
    add_run(sub)
    sub.add_argument("--experiment", type=json.loads, required=True)
    sub.add_argument("--output", type=Path, required=True, help="folder for the model and its history")
    sub.add_argument("--stage", type=int, choices=[1, 2], default=2, help="1: the first of a method of two stages")
    sub.add_argument("--first-stage", type=Path, metavar="FOLDER", help="what --stage 1 wrote")
    sub.add_argument("--cache-mb", type=int, default=2000, help="features that stay in memory between epochs, in MB")

    sub = command("predict-fold", predict_fold, "predict the validation and test slides of one fold", MODELLING)
    add_run(sub)
    sub.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    sub.add_argument("--predictions", type=Path, required=True)
    sub.add_argument("--attention", type=Path, required=True)

    add_commands(command)  # on new slides: record-pipeline, export-model, predict, localise

    sub = command("evaluate", evaluate, "metrics of one experiment over its folds and seeds", ["gmmamba.evaluation"])
    sub.add_argument("--classes", type=json.loads, required=True)
    sub.add_argument("--settings", type=json.loads, default={}, help="`evaluation` of the configuration, as JSON")
    sub.add_argument("--predictions", type=Path, nargs="+", required=True)
    sub.add_argument("--metrics", type=Path, required=True)
    sub.add_argument("--pooled", type=Path, required=True)

    sub = command("compare", compare, "differences of experiments on the same test slides, with intervals and p values",
                  ["gmmamba.comparison"])  # fmt: skip
    sub.add_argument("folder", type=Path, help="results/{dataset}")
    sub.add_argument("experiments", nargs="+", help="what is printed compares with the first of them")
    sub.add_argument("--settings", type=json.loads, help="`evaluation`, as JSON; else that of the folder's report.json")
    sub.add_argument("--runs", action="append", default=[], metavar="RUN",
                     help="such as fold0_seed0, repeatable; else all they share")  # fmt: skip
    sub.add_argument("--output", type=Path, metavar="CSV", help="write every pair there, instead of printing")

    sub = command("report", report, "HTML report, result table and accounting of a dataset", ["gmmamba.report"])
    sub.add_argument("--settings", type=json.loads, required=True)
    sub.add_argument("--slide-table", type=cohort_file, action="append", required=True, metavar="COHORT=CSV")
    sub.add_argument("--groups", type=grouping_file, action="append", default=[], metavar="COHORT/GROUPING=NPZ")
    sub.add_argument("--splits", type=Path, required=True)
    sub.add_argument("--results", type=Path, required=True, help="folder with the experiments' folders")
    sub.add_argument("--output", type=Path, required=True)
    sub.add_argument("--table", type=Path, required=True)
    sub.add_argument("--accounting", type=Path, required=True)
    sub.add_argument("--manifest", type=Path, required=True, help="what the report was made of, for `view`")

    sub = command("table", table, "a table of the paper, of one dataset, in three forms", ["gmmamba.tables"])
    sub.add_argument("--settings", type=json.loads, required=True)
    sub.add_argument("--results", type=Path, required=True, help="folder with the experiments' folders")
    for form in ("csv", "markdown", "latex"):
        sub.add_argument(f"--{form}", type=Path, required=True)

    sub = command("summary", summary, "print the result table and the accounting of a finished dataset")
    sub.add_argument("folder", type=Path)

    sub = command("view", view, "look at the slides of a finished dataset in a browser, with attention and groups")
    sub.add_argument("folder", type=Path, help="results of a dataset, such as results/demo")
    sub.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 lets the whole network look")
    sub.add_argument("--port", type=int, default=8765, help="0 takes any that is free")

    sub = command("verify", verify, "replay reference cases and compare every quantity")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--scan", default="auto", help="backend of the selective scan (default: that of the device)")
    sub.add_argument("--device", default="cpu")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; 0 if it did its work, 1 where the user has something to mend."""
    start = time.monotonic()
    options = parser().parse_args(arguments)
    if options.preload and arguments is None:
        status = run_warm("gmmamba", sys.argv[1:], options.preload)
        if status is not None:
            return status
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gmmamba").setLevel(logging.INFO)  # not that of every library
    try:
        status = options.run(options) or 0
        if options.preload:
            logging.getLogger("gmmamba").info("%.1f s, %s", time.monotonic() - start, usage())
        return status
    except user_errors() as error:
        at_fault = getattr(error, "filename", None)  # of what the system refuses; else the message names it
        said = f"{at_fault}: {error.strerror}" if at_fault and isinstance(error, OSError) else error
        print(f"gmmamba {options.command}: {said}", file=sys.stderr)
        return 1


def user_errors() -> tuple[type[Exception], ...]:
    """What a user can mend: shown as a message. Everything else keeps its traceback."""
    from gmmamba.accounting import TooManyFailedError
    from gmmamba.config_checks import ConfigError
    from gmmamba.evaluation import EvaluationError
    from gmmamba.label_tables import SheetError
    from gmmamba.split_files import SplitError
    from gmmamba.view import ViewError
    from slidestore import StoreError

    return (
        ConfigError, EvaluationError, SheetError, SplitError, StoreError, TooManyFailedError, ViewError,
        FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, FloatingPointError,
    )  # fmt: skip


def check_config(options: argparse.Namespace) -> None:
    from gmmamba.config import load_config
    from gmmamba.config_checks import read_yaml

    config = load_config(read_yaml(options.config))
    for warning in config.warning_lines():
        print(f"Warning: {warning}", file=sys.stderr)
    print(config.summary())
    if options.resolved:
        import yaml

        for (dataset, name), experiment in config.experiments.items():
            print(f"\n# {dataset}/{name}\n{yaml.safe_dump(experiment.as_dict(), sort_keys=False)}", end="")


def run(options: argparse.Namespace) -> None:
    from gmmamba.project import run_workflow

    run_workflow(options.arguments)


def demo(options: argparse.Namespace) -> None:
    from gmmamba.project import make_demo

    print(make_demo(options.folder))


def sheet(options: argparse.Namespace) -> None:
    from gmmamba.sheets import build_sheet, write_sheet

    roles = ("patient", "slide", "label", "split")
    columns = {role: name for role in roles if (name := getattr(options, f"{role}_column")) is not None}
    made = build_sheet(options.slides, options.labels, options.form, columns, dict(options.map), options.frozen)
    write_sheet(made, options.output)
    print(made.summary(options.all_names))
    print(f"Written: {options.output}. Name it in config.yaml: cohorts: {{mycohort: {{sheet: {options.output}}}}}")


def sheet_slides(options: argparse.Namespace) -> list[Any]:
    from gmmamba.cohort import read_sheet
    from gmmamba.config_checks import raise_if

    slides, problems = read_sheet(options.sheet, options.cohort, need_files=False)
    raise_if(problems)
    return list(slides.values())


def kept_slides(options: argparse.Namespace) -> list[str]:
    return [slide.slide_id for slide in sheet_slides(options) if not slide.exclude]


def account(options: argparse.Namespace) -> None:
    from gmmamba.accounting import account_cohort

    account_cohort(
        options.cohort, sheet_slides(options), options.tiles, options.stores, options.encoder,
        options.max_failed_share, options.output,
    )  # fmt: skip


def contact_sheet(options: argparse.Namespace) -> None:
    from gmmamba.contact_sheet import contact_sheet

    contact_sheet(options.cohort, sheet_slides(options), options.tiles, options.output)


def group(options: argparse.Namespace) -> None:
    from gmmamba.grouping import group_cohort

    coords = {slide_id: options.tiles / f"{slide_id}.npy" for slide_id in kept_slides(options)}
    group_cohort(coords, options.grouping, options.output)


def group_by_features(options: argparse.Namespace) -> None:
    from gmmamba.grouping import group_cohort_by_features

    stores = {slide_id: options.stores / f"{slide_id}.zarr.zip" for slide_id in kept_slides(options)}
    group_cohort_by_features(stores, options.encoder, options.groups, options.output)


def split(options: argparse.Namespace) -> None:
    from gmmamba.leakage import check_content
    from gmmamba.splits import SplitSettings, split_dataset
    from slidestore.settings import from_dict

    settings = from_dict(SplitSettings, options.settings, f"datasets.{options.dataset}.split")
    check_content(dict(options.slide_table))
    split_dataset(dict(options.slide_table), options.classes, settings, options.output)


def train(options: argparse.Namespace) -> None:
    from gmmamba.training import train as run

    run(
        options.experiment, options.fold, options.seed, options.splits, dict(options.slide_table),
        dict(options.groups) or None, options.output, options.threads, options.cache_mb, options.stage,
        options.first_stage,
    )  # fmt: skip


def predict_fold(options: argparse.Namespace) -> None:
    from gmmamba.prediction import predict

    predict(
        options.model, options.fold, options.seed, options.splits, dict(options.slide_table),
        dict(options.groups) or None, options.predictions, options.attention, options.threads,
    )  # fmt: skip


def evaluate(options: argparse.Namespace) -> None:
    from gmmamba.evaluation import evaluate as run
    from gmmamba.evaluation import evaluation_of

    run(options.predictions, options.classes, evaluation_of(options.settings), options.metrics, options.pooled)


def compare(options: argparse.Namespace) -> None:
    from gmmamba.comparison import compare as run
    from gmmamba.comparison import comparison_page, evaluation_in, runs_in
    from gmmamba.evaluation import evaluation_of

    files = runs_in(options.folder, options.experiments, options.runs)
    if options.settings is None:
        settings, said = evaluation_in(options.folder)
        print(said, file=sys.stderr)
    else:
        settings = evaluation_of(options.settings)
    if options.output is None:
        print(comparison_page(files, settings))
    else:
        run(files, settings, options.output)


def report(options: argparse.Namespace) -> None:
    from gmmamba.report import Outputs
    from gmmamba.report import report as run

    run(
        **options.settings, slide_tables=dict(options.slide_table), groups=dict(options.groups), splits=options.splits,
        results=options.results,
        outputs=Outputs(options.output, options.table, options.accounting, options.manifest),
    )  # fmt: skip


def table(options: argparse.Namespace) -> None:
    from gmmamba.tables import write_table

    write_table(
        **options.settings, results=options.results, csv=options.csv, markdown=options.markdown, latex=options.latex
    )


def summary(options: argparse.Namespace) -> None:
    from gmmamba.report import summary as run

    run(options.folder)


def view(options: argparse.Namespace) -> None:
    from gmmamba.view.server import view as run

    run(options.folder, options.host, options.port)


def verify(options: argparse.Namespace) -> int:
    from gmmamba.verify import verify as run

    return 0 if run(options.folder, options.scan, options.device) else 1


if __name__ == "__main__":
    sys.exit(main())
