"""The subcommands on new slides: record-pipeline, export-model, predict, localise. What is heavy waits for its call."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from gmmamba.arguments import cohort_file

PIPELINE = ["gmmamba.inference.pipeline", "zarr"]
MODELS = ["gmmamba.inference.model_file", "gmmamba.models.gmmamba", "gmmamba.models.scan_numba"]
PREDICTING = ["gmmamba.inference.command", *MODELS, "zarr", "torch._inductor"]


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add them; `command` takes name, function, help and what a warm process imports."""
    sub = command(
        "record-pipeline", record_pipeline, "record how slides become what an experiment's models take", PIPELINE
    )
    sub.add_argument("--settings", type=json.loads, required=True)
    sub.add_argument("--slide-table", type=cohort_file, action="append", required=True, metavar="COHORT=CSV")
    sub.add_argument("--models", type=Path, nargs="+", required=True, help="folders of the experiment's runs")
    sub.add_argument("--output", type=Path, required=True)

    sub = command("export-model", export_model, "one file of a trained experiment, to hand to somebody else", MODELS)
    add_model(sub)
    sub.add_argument("--output", type=Path, required=True, help="to write, .safetensors")
    sub.add_argument("--with-encoder", action="store_true", help="put the encoder's weights in, a .safetensors file")

    sub = command("predict", predict, "predict new slides with a trained experiment, and show why", PREDICTING)
    add_model(sub)
    sub.add_argument("slides", type=Path, help="a slide, a folder of slides, or a sheet (.csv with a column path)")
    sub.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    sub.add_argument("--like", metavar="COHORT", help="whose tiling to follow, where the dataset's cohorts differ")
    sub.add_argument("--mpp", type=float, help="µm per pixel of level 0 of all slides whose row in a sheet gives none")
    sub.add_argument("--encoder-weights", type=Path, metavar="FILE", help="where they are now, if not where they were")
    sub.add_argument("--reader", choices=["exact", "scaled", "openslide"], help="of slides, instead of the training's")
    sub.add_argument("--prepared", action="store_true", help="tiles and features are in the output folder already")
    sub.add_argument("--threads", type=int, help="readers and CPU threads, by default as encoding jobs have (8 or 1)")
    sub.add_argument("--quick", action="store_true", help="show attention alone: no contributions, no evidence")
    sub.add_argument("--top", type=int, default=8, metavar="K", help="patches of highest and of lowest contribution")

    sub = command("localise", localise, "measure how well the maps of an experiment find known foci", PREDICTING)
    sub.add_argument("folder", type=Path, help="of an experiment, one of its runs, or one that predict wrote")
    sub.add_argument("--foci", type=Path, required=True, help="CSV: slide_id, x, y and tile_px or radius_px")
    sub.add_argument("--min-share", type=float, default=0.25, help="of a patch's area in foci that makes it positive")
    sub.add_argument("--output", type=Path, required=True, help="CSV, a row a slide and run")


def add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", type=Path, help="folder of an experiment (all its runs), of one run, or a model file")
    sub.add_argument("--own-code", action="store_true", help="run the Python file that a model file names as encoder")
    sub.add_argument(
        "--runs", action="append", metavar="RUN", help="of the experiment this only, such as fold0_seed0; repeatable"
    )


def record_pipeline(options: argparse.Namespace) -> None:
    from gmmamba.inference.pipeline import record_pipeline as run

    run(options.settings, dict(options.slide_table), options.models, options.output)


def export_model(options: argparse.Namespace) -> None:
    from gmmamba.inference.model_file import export_model as run
    from gmmamba.inference.model_file import load_ensemble

    run(load_ensemble(options.model, options.runs, options.own_code), options.output, options.with_encoder)


def predict(options: argparse.Namespace) -> int:
    from gmmamba.inference.command import predict as run

    said, any_predicted = run(
        options.model, options.slides, options.output, options.runs, options.like, options.mpp, options.encoder_weights,
        options.prepared, options.threads, options.quick, options.top, options.reader, options.own_code,
    )  # fmt: skip
    print(said)
    return 0 if any_predicted or options.prepared else 1


def localise(options: argparse.Namespace) -> None:
    from gmmamba.inference.localise import localise as run

    print(run(options.folder, options.foci, options.output, options.min_share))
