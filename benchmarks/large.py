"""What a large slide costs in memory and before its first patch: ``python -m benchmarks.large``.

Slides of benchmarks.reading's pixels in Aperio's levels, whose repeated tiles stand in the file once. The peak memory
of tiling and encoding (of 40x, every patch read) is that of a fresh process, beyond what imports take. The encoder
is the mean colour, so that reading shows and 20,000 patches take no hour.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Step, cpu_name, markdown_table, peak_rss, write_section
from benchmarks.reading import PATCH_PX, make_slide
from preprocessing.encode import encode_slide
from preprocessing.encoders import EncoderSettings
from preprocessing.patches import ReadingSettings
from preprocessing.tile import Outputs, TilingSettings, tile_slide

LEVELS = (1, 4, 16, 32)
MEAN_COLOUR = """import torch


class MeanColour(torch.nn.Module):
    def forward(self, images):
        return images[..., ::8, ::8].mean(dim=(2, 3))


def mean_colour(pretrained):
    return MeanColour(), (0, 0, 0), (1, 1, 1)
"""


def outputs_in(folder: Path) -> Outputs:
    return Outputs(*(folder / f"S{end}" for end in (".npy", ".json", ".jpg", ".png", ".geojson")))


def tile(path: Path, mpp: float) -> dict[str, dict[str, int]]:
    return tile_slide(path, "S", "bench", TilingSettings(patch_px=PATCH_PX, mpp=mpp), outputs_in(path.parent))


def tile_and_encode(path: Path, mpp: float, threads: int) -> Step:
    code = path.parent / "mean_colour.py"
    code.write_text(MEAN_COLOUR)
    encoder = EncoderSettings("mean", f"{code}:mean_colour", "random")
    outputs = outputs_in(path.parent)

    def step() -> None:
        tile(path, mpp)
        store = path.with_suffix(".zarr.zip")
        encode_slide(path, outputs.coords, outputs.record, encoder, ReadingSettings(), store, threads)

    return step


def measure(path: Path, size: int, mpp: float, threads: int) -> list[str]:
    """Side, patches, CPU seconds of tiling, peak MB of tiling and encoding."""
    make_slide(path, size, levels=LEVELS)
    start = time.process_time()
    kept = tile(path, mpp)["counts"]["kept"]
    tiling = time.process_time() - start
    return [f"{size}", f"{kept}", f"{tiling:.2f}", f"{peak_rss(tile_and_encode, path, mpp, threads) / 1e6:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 65536], help="multiples of 8192")
    parser.add_argument("--mpp", type=float, default=0.5, help="of the patches")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", type=Path, help="the Markdown page to put the table into")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder) / f"{size}.svs", size, options.mpp, options.threads) for size in options.sizes]
    text = f"""**{cpu_name()}**, {time.strftime("%Y-%m-%d")}; patches at {options.mpp:g} µm/px, \
{options.threads} readers. `python -m benchmarks.large {" ".join(sys.argv[1:])}`

{markdown_table(["side px", "patches", "tiling, CPU s", "peak MB, tile + encode"], rows)}"""
    print(text)
    if options.write:
        write_section(options.write, "large slides", text)


if __name__ == "__main__":
    main()
