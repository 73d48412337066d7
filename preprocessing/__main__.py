"""Command line of the slide stages: `python -m preprocessing tile | encode | import-tiles | import-features |
picture-patches | demo-cohort`."""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from preprocessing.errors import SettingsError
from slidestore.settings import from_dict
from slidestore.warm_start import run_warm, usage

if TYPE_CHECKING:
    from preprocessing.encode import SlideJob
    from slidestore.foreign import ForeignFiles

# Each command imports its own stage: torch, which `encode` needs, costs the others seconds.


def tile(args: argparse.Namespace) -> None:
    from preprocessing.tile import Outputs, TilingSettings, tile_slide

    settings = from_dict(TilingSettings, args.settings, "tiling settings")
    outputs = Outputs(args.coords, args.record, args.thumbnail, args.mask, args.contours)
    given = (args.mpp, args.mpp_source, args.tissue_mask)
    record = tile_slide(args.slide, args.slide_id, args.cohort, settings, outputs, *given)
    print(f"{args.slide_id}: {record['status']}, {record['counts']['kept']} patches")


def encode(args: argparse.Namespace) -> None:
    from preprocessing.encode import encode_slides
    from preprocessing.encoders import EncoderSettings
    from preprocessing.patches import ReadingSettings

    settings = from_dict(EncoderSettings, args.settings, "encoder settings")
    reading = from_dict(ReadingSettings, args.reading, "reading settings")
    encode_slides(slide_jobs(args), settings, reading, args.threads)


def slide_jobs(args: argparse.Namespace) -> "list[SlideJob]":
    from preprocessing.encode import SlideJob

    one = {name: getattr(args, name) for name in ("slide", "coords", "record", "output")}
    given = [f"--{name}" for name, value in one.items() if value is not None]
    if args.jobs is None:
        if len(given) < len(one):
            raise SystemExit("encode needs --slide, --coords, --record and --output, or --jobs")
        return [SlideJob(**one)]
    if given:
        raise SystemExit(f"encode takes --jobs or {', '.join(given)}, not both")
    listed = json.loads(args.jobs.read_text(encoding="utf-8"))
    where = f"{args.jobs}, job"
    return [
        from_dict(SlideJob, {key: Path(value) for key, value in job.items()}, f"{where} {number}")
        for number, job in enumerate(listed, 1)
    ]


def import_tiles(args: argparse.Namespace) -> None:
    from preprocessing.imported import import_tiles as run
    from preprocessing.tile import Outputs

    outputs = Outputs(args.coords, args.record, args.thumbnail, args.mask)
    record = run(args.slide, args.slide_id, args.cohort, foreign_files(args), outputs, args.mpp, args.mpp_source)
    print(f"{args.slide_id}: {record['status']}, {record['counts']['kept']} patches")


def import_features(args: argparse.Namespace) -> None:
    from preprocessing.imported import import_features as run

    run(args.coords, args.record, foreign_files(args), args.encoder, args.weights_sha256, args.output)


def picture_patches(args: argparse.Namespace) -> None:
    from preprocessing.patch_picture import picture_patches as run

    run(args.predictions)


def foreign_files(args: argparse.Namespace) -> "ForeignFiles":
    from slidestore.foreign import ForeignFiles

    return ForeignFiles(args.format, args.features, args.patches)


def demo_cohort(args: argparse.Namespace) -> None:
    from preprocessing.demo_cohort import make_demo_cohort

    make_demo_cohort(args.out, args.slides, args.seed)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m preprocessing", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("tile", help="find tissue and lay a grid of patches over it")
    command.set_defaults(run=tile, preload=["preprocessing.tile"])
    add_tiled(command)
    command.add_argument("--settings", type=json.loads, default={}, help="tiling settings as JSON")
    command.add_argument(
        "--tissue-mask", type=Path, help="where tissue is, instead of finding it: .geojson, .png, .tif"
    )
    command.add_argument("--contours", type=Path, required=True, help="to write, .geojson")

    command = commands.add_parser("encode", help="turn the patches of a tiled slide into features")
    command.set_defaults(run=encode, preload=["preprocessing.encode", "preprocessing.regions", "zarr"])
    command.add_argument("--slide", type=Path, help="file, or folder of a DICOM slide")
    command.add_argument("--coords", type=Path, help="from tile")
    command.add_argument("--record", type=Path, help="from tile")
    command.add_argument("--output", type=Path, help="the store to write, .zarr.zip")
    command.add_argument(
        "--jobs", type=Path, help="instead of these four, many slides: a JSON list of objects with these four keys"
    )
    command.add_argument("--settings", type=json.loads, required=True, help="encoder settings as JSON")
    command.add_argument("--reading", type=json.loads, default={}, help="how patches are read, as JSON")
    command.add_argument("--threads", type=int, default=1, help="of the network and of the readers, each")

    command = commands.add_parser("import-tiles", help="take over the patches that another tool laid over a slide")
    command.set_defaults(run=import_tiles, preload=["preprocessing.imported", "h5py"])
    add_tiled(command)
    add_foreign(command)

    command = commands.add_parser("import-features", help="take over the features of these patches")
    command.set_defaults(run=import_features, preload=["preprocessing.imported", "h5py", "zarr"])
    add_foreign(command)
    command.add_argument("--coords", type=Path, required=True, help="from import-tiles")
    command.add_argument("--record", type=Path, required=True, help="from import-tiles")
    command.add_argument("--encoder", required=True, help="what the stores call it")
    command.add_argument("--weights-sha256", help="of the encoder's weights, if it is known")
    command.add_argument("--output", type=Path, required=True, help="the store to write, .zarr.zip")

    command = commands.add_parser("picture-patches", help="draw the patches that predictions name")
    command.set_defaults(run=picture_patches, preload=["preprocessing.tile"])
    command.add_argument("--predictions", type=Path, required=True, help="folder that `gmmamba predict` wrote")

    command = commands.add_parser("demo-cohort", help="generate the slides of the demo")
    command.set_defaults(run=demo_cohort, preload=[])
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--slides", type=int, default=30)
    command.add_argument("--seed", type=int, default=0)
    return main


def add_tiled(command: argparse.ArgumentParser) -> None:
    command.add_argument("--slide", type=Path, required=True, help="file, or folder of a DICOM slide")
    command.add_argument("--slide-id", required=True)
    command.add_argument("--cohort", required=True)
    command.add_argument("--mpp", type=float, help="the slide's level-0 µm per pixel, instead of the file's own")
    command.add_argument("--mpp-source", choices=["sheet", "config"], default="sheet", help="who says so")
    command.add_argument("--coords", type=Path, required=True, help="to write, .npy")
    command.add_argument("--record", type=Path, required=True, help="to write, .json")
    command.add_argument("--thumbnail", type=Path, required=True, help="to write, .jpg")
    command.add_argument("--mask", type=Path, required=True, help="to write, .png")


def add_foreign(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", required=True, help="see slidestore.foreign")
    command.add_argument("--features", type=Path, required=True, help="the tool's file of features")
    command.add_argument("--patches", type=Path, help="the tool's h5 of coordinates")


def main() -> int:
    start = time.monotonic()
    args = parser().parse_args()
    if args.preload and (status := run_warm("preprocessing", sys.argv[1:], args.preload)) is not None:
        return status
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        args.run(args)
    except SettingsError as error:
        print(f"preprocessing: {error}", file=sys.stderr)
        return 1
    logging.info("%.1f s, %s", time.monotonic() - start, usage())
    return 0


if __name__ == "__main__":
    sys.exit(main())
