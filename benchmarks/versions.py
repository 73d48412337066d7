"""The same patches as another version of the code, and their cost: ``python -m benchmarks.versions``.

A server in each of two checkouts tiles and encodes slide after slide, in turns, with random weights and one thread.
Both encode the other version's tiling: features must be the same to the noise of float16. Coordinates are compared with
the settings given and, where they differ, with `--unfiltered` ones, for filters that only one of the versions has.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

SLIDE_ID = "S1"


def serve(settings: dict[str, Any]) -> None:
    """One line of JSON a request, {name, slide, mpp, folder, tiled, tiling}, and one as its answer: CPU seconds
    of tiling, of the network, and of the rest of encoding."""
    import cv2

    from preprocessing.encode import encode_slide
    from preprocessing.encoders import Encoder, EncoderSettings
    from preprocessing.tile import Outputs, TilingSettings, tile_slide

    cv2.setNumThreads(1)
    known = inspect.signature(encode_slide).parameters
    extra: dict[str, Any] = {}
    if "reading" in known:
        from preprocessing.patches import ReadingSettings

        extra["reading"] = ReadingSettings()
    encoder = EncoderSettings(name="bench", **settings)
    forward, in_network = Encoder.forward, [0.0]

    def timed(self: Encoder, patches: Any) -> Any:
        start = time.thread_time()  # one thread computes it, others read meanwhile
        features = forward(self, patches)
        in_network[0] += time.thread_time() - start
        return features

    Encoder.forward = timed  # type: ignore[method-assign]
    for line in sys.stdin:
        asked = json.loads(line)
        folder = Path(asked["folder"])
        names = ["coords.npy", "record.json", "thumbnail.jpg", "mask.png"]
        if "contours" in inspect.signature(Outputs).parameters:
            names.append("contours.geojson")
        tiled = Path(asked["tiled"] or folder)
        outputs = Outputs(*(tiled / name for name in names))
        slide, start = Path(asked["slide"]), time.process_time()
        if asked["tiled"] is None:
            tile_slide(slide, SLIDE_ID, "bench", TilingSettings(**asked["tiling"]), outputs, asked["mpp"])
        at_tile, in_network[0] = time.process_time(), 0.0
        if asked["encode"]:
            given: dict[str, Any] = {"path": slide, "coords_path": outputs.coords, "record_path": outputs.record}
            encode_slide(**given, settings=encoder, output=folder / "store.zarr.zip", **extra)
        rest = time.process_time() - at_tile - in_network[0]
        print(json.dumps([at_tile - start, in_network[0], rest]), flush=True)


class Server:
    """The code of a checkout."""

    def __init__(self, checkout: Path, encoder: dict[str, Any]) -> None:
        # -P: else this folder hides installed modules of the same names (coverage)
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--serve", json.dumps(encoder)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self, slide: Path, mpp: float | None, folder: Path, tiling: dict[str, Any], tiled: Path | None = None,
        encode: bool = True,
    ) -> tuple[float, float, float]:  # fmt: skip
        """CPU seconds of tiling, of the network, and of reading and the rest of encoding."""
        folder.mkdir(parents=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {
            "slide": str(slide), "mpp": mpp, "folder": str(folder), "tiling": tiling,
            "tiled": None if tiled is None else str(tiled), "encode": encode,
        }  # fmt: skip
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of {folder} ended at {slide}")
        seconds: list[float] = json.loads(answer)
        return seconds[0], seconds[1], seconds[2]


def listed(sheet: Path) -> list[tuple[str, Path, float | None]]:
    """slide_id, path, mpp of a slide sheet."""
    with sheet.open(newline="") as file:
        return [
            (row["slide_id"], (sheet.parent / row["path"]).resolve(), float(row["mpp"]) if row.get("mpp") else None)
            for row in csv.DictReader(file)
        ]


def compare(
    sheet: Path, other: Server, this: Server, tiling: dict[str, Any], unfiltered: dict[str, Any], encoded: int | None
) -> list[str]:
    """A row of the table: of all slides of one sheet, of which so many are encoded."""
    from slidestore import open_store

    same = same_unfiltered = patches = 0
    apart = largest = 0.0
    cost: dict[str, float] = defaultdict(float)
    slides = listed(sheet)
    for i, (_, path, mpp) in enumerate(slides):
        encode = encoded is None or i < encoded
        with tempfile.TemporaryDirectory() as scratch:
            theirs, ours, again = (Path(scratch) / name for name in ("theirs", "ours", "again"))
            for name, seconds in zip(
                ("tile", "network", "rest"), other(path, mpp, theirs, tiling, encode=encode), strict=True
            ):
                cost[f"other {name}"] += seconds
            cost["this tile"] += this(path, mpp, ours, tiling, encode=False)[0]
            found, expected = (np.load(folder / "coords.npy") for folder in (ours, theirs))
            is_same = is_same_unfiltered = np.array_equal(found, expected)
            if not is_same:
                this(path, mpp, again, tiling | unfiltered, encode=False)
                is_same_unfiltered = np.array_equal(np.load(again / "coords.npy"), expected)
            same, same_unfiltered = same + is_same, same_unfiltered + is_same_unfiltered
            if encode:
                _, network, rest = this(path, mpp, Path(scratch) / "store", tiling, tiled=theirs)
                cost["this network"], cost["this rest"] = cost["this network"] + network, cost["this rest"] + rest
                stores = [open_store(folder / "store.zarr.zip") for folder in (theirs, Path(scratch) / "store")]
                before, now = (np.asarray(store.features[:], np.float32) for store in stores)
                if before.shape != now.shape:
                    raise RuntimeError(f"{path}: features {before.shape} and {now.shape}")
                apart, largest = max(apart, np.abs(before - now).max()), max(largest, np.abs(before).max())
                patches += len(before)
        print(
            path.name, len(expected), len(found), is_same, is_same_unfiltered, f"{apart:.2g} of {largest:.3g}",
            *(f"{name} {seconds:.2f}" for name, seconds in cost.items()), flush=True,
        )  # fmt: skip
    ratio = [f"{cost[f'other {n}'] / cost[f'this {n}']:.1f}" for n in ("tile", "rest")]
    counted = [str(len(slides)), str(same), str(same_unfiltered), str(patches)]
    return [sheet.stem, *counted, f"{apart:.2g}", f"{largest:.3g}", *ratio]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__.split("\n")[0])
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--other", type=Path, help="checkout of the other version")
    parser.add_argument("--sheets", type=Path, nargs="+", help="slide sheets; a row of the table each")
    parser.add_argument("--tiling", type=json.loads, default={}, help="tiling settings as JSON, for both")
    parser.add_argument("--unfiltered", type=json.loads, default={}, help="more of them, for this version's second try")
    parser.add_argument("--encode", type=int, help="of each sheet only so many slides; default: all")
    parser.add_argument("--model", default="test_resnet", help="timm's name; small, so that reading shows")
    parser.add_argument("--write", type=Path, help="the Markdown page to put the table into")
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    from benchmarks.measure import markdown_table, write_section

    encoder = {"model": options.model, "weights": "random"}
    other, this = (Server(p.resolve(), encoder) for p in (options.other, Path(__file__).parents[1]))
    rows = [compare(sheet, other, this, options.tiling, options.unfiltered, options.encode) for sheet in options.sheets]
    head = ["sheet", "slides", "same coordinates", "same, filters off", "patches", "features differ by", "of at most"]
    text = f"""{time.strftime("%Y-%m-%d")}; CPU seconds of the other version ÷ this one's, one thread; reading is \
encoding without the network. `python -m benchmarks.versions {" ".join(sys.argv[1:])}`

{markdown_table([*head, "tiling ÷", "reading ÷"], rows)}"""
    print(text)
    if options.write:
        write_section(options.write, "versions", text)


if __name__ == "__main__":
    main()
