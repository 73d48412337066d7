"""Command line of the slide stages: `python -m preprocessing tile | encode | demo-cohort`."""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

from slidestore.settings import from_dict
from slidestore.warm_start import run_warm, usage

# Each command imports its own stage: torch, which `encode` needs, costs the others seconds.


def tile(args: argparse.Namespace) -> None:
    from preprocessing.tile import Outputs, TilingSettings, tile_slide

    settings = from_dict(TilingSettings, args.settings, "tiling settings")
    outputs = Outputs(args.coords, args.record, args.thumbnail, args.mask)
    record = tile_slide(args.slide, args.slide_id, args.cohort, settings, outputs, args.mpp, args.mpp_source)
    print(f"{args.slide_id}: {record['status']}, {record['counts']['kept']} patches")


def encode(args: argparse.Namespace) -> None:
    from preprocessing.encode import encode_slide
    from preprocessing.encoders import EncoderSettings
    from preprocessing.patches import ReadingSettings

    settings = from_dict(EncoderSettings, args.settings, "encoder settings")
    reading = from_dict(ReadingSettings, args.reading, "reading settings")
    encode_slide(args.slide, args.coords, args.record, settings, reading, args.output, args.threads)


def demo_cohort(args: argparse.Namespace) -> None:
    from preprocessing.demo_cohort import make_demo_cohort

    make_demo_cohort(args.out, args.slides, args.seed)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m preprocessing", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("tile", help="find tissue and lay a grid of patches over it")
    command.set_defaults(run=tile, preload=["preprocessing.tile"])
    command.add_argument("--slide", type=Path, required=True, help="file, or folder of a DICOM slide")
    command.add_argument("--slide-id", required=True)
    command.add_argument("--cohort", required=True)
    command.add_argument("--settings", type=json.loads, default={}, help="tiling settings as JSON")
    command.add_argument("--mpp", type=float, help="the slide's level-0 µm per pixel, instead of the file's own")
    command.add_argument("--mpp-source", choices=["sheet", "config"], default="sheet", help="who says so")
    command.add_argument("--coords", type=Path, required=True, help="to write, .npy")
    command.add_argument("--record", type=Path, required=True, help="to write, .json")
    command.add_argument("--thumbnail", type=Path, required=True, help="to write, .jpg")
    command.add_argument("--mask", type=Path, required=True, help="to write, .png")

    command = commands.add_parser("encode", help="turn the patches of a tiled slide into features")
    command.set_defaults(run=encode, preload=["preprocessing.encode", "zarr"])
    command.add_argument("--slide", type=Path, required=True, help="file, or folder of a DICOM slide")
    command.add_argument("--coords", type=Path, required=True, help="from tile")
    command.add_argument("--record", type=Path, required=True, help="from tile")
    command.add_argument("--settings", type=json.loads, required=True, help="encoder settings as JSON")
    command.add_argument("--reading", type=json.loads, default={}, help="how patches are read, as JSON")
    command.add_argument("--output", type=Path, required=True, help="the store to write, .zarr.zip")
    command.add_argument("--threads", type=int, default=1, help="of the network and of the readers, each")

    command = commands.add_parser("demo-cohort", help="generate the slides of the demo")
    command.set_defaults(run=demo_cohort, preload=[])
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--slides", type=int, default=30)
    command.add_argument("--seed", type=int, default=0)
    return main


def main() -> int:
    start = time.monotonic()
    args = parser().parse_args()
    if args.preload and (status := run_warm("preprocessing", sys.argv[1:], args.preload)) is not None:
        return status
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args.run(args)
    logging.info("%.1f s, %s", time.monotonic() - start, usage())
    return 0


if __name__ == "__main__":
    sys.exit(main())
