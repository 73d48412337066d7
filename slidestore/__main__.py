"""Command line of the stores: `python -m slidestore import | export`. See docs/interop.md."""

import argparse
import sys
from pathlib import Path

from slidestore import StoreError, __version__, open_store
from slidestore.export import WRITERS, export_store
from slidestore.foreign import FORMATS, ForeignFiles, import_store, slide_id_of


def import_files(args: argparse.Namespace) -> None:
    for path in args.files:
        slide_id = slide_id_of(path)
        patches = Path(args.patches.replace("{slide_id}", slide_id)) if args.patches else None
        output = args.output / f"{slide_id}.zarr.zip"
        files = ForeignFiles(args.format, path, patches)
        import_store(files, output, slide_id, args.cohort, args.encoder, args.mpp, f"gmmamba {__version__}")
        print(output)


def export_stores(args: argparse.Namespace) -> None:
    for path in args.stores:
        failure = open_store(path).attributes.failure
        if failure:
            print(f"{path}: not exported, the slide failed ({failure['stage']}: {failure['reason']})", file=sys.stderr)
            continue
        print(*export_store(path, args.format, args.output), sep="\n")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m slidestore", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("import", help="make stores of the features that TRIDENT or CLAM extracted")
    command.set_defaults(run=import_files)
    command.add_argument("--format", choices=FORMATS, required=True)
    command.add_argument("--cohort", required=True)
    command.add_argument("--encoder", required=True, help="the name that the stores shall give it")
    command.add_argument("--patches", help="the tool's h5 of coordinates, such as 'patches/{slide_id}.h5'")
    command.add_argument("--mpp", type=float, help="µm per pixel of level 0; needed for CLAM")
    command.add_argument("--output", type=Path, required=True, help="folder of the stores")
    command.add_argument("files", type=Path, nargs="+", help="a file of features a slide, named by its slide_id")

    command = commands.add_parser("export", help="write stores in the files of other tools")
    command.set_defaults(run=export_stores)
    command.add_argument("--format", choices=WRITERS, required=True)
    command.add_argument("--output", type=Path, required=True, help="folder")
    command.add_argument("stores", type=Path, nargs="+", help=".zarr.zip")
    return main


def main() -> int:
    args = parser().parse_args()
    try:
        args.run(args)
    except (StoreError, FileNotFoundError, ValueError) as error:
        print(f"python -m slidestore: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
