"""Slides to features, end to end, beside the network alone: ``python -m benchmarks.encoding``.

The slides are copies of that of benchmarks.reading. For each encoder, precision, way of reading and number of readers:
patches a second from slides to features on the device, the share of the time in which the network waited for pixels,
how long a GPU computed (CUDA events around the network), and how fast the network alone is on patches that are on its
device already. These are windows in the middle of endless slides. Last, whole runs of stage encode, stores included:
several slides one by one and in one process. A GPU takes about 90 s, the CPU a few minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import closing
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.measure import cpu_name, markdown_table, seconds, write_section
from benchmarks.reading import PATCH_PX, make_slide
from preprocessing.encode import SlideJob, encode_slides
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.grid import whole_grid
from preprocessing.network import Network, choose_device, make_repeatable, memory_for_pixels
from preprocessing.nvjpeg import NvjpegReader, check_nvjpeg
from preprocessing.patches import Opened, PatchReader, Reader, ReadingSettings, read_ahead
from preprocessing.slide import open_slide
from preprocessing.tile import Outputs, TilingSettings, tile_slide

MPP = 0.5
READERS: list[Reader] = ["exact", "scaled", "openslide"]


class Stopwatch:
    """How long the device computes what is asked of a network on a GPU."""

    def __init__(self, network: Network) -> None:
        self.runs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        compute = network.compute

        def timed() -> torch.Tensor:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            features = compute()
            end.record()
            self.runs.append((start, end))
            return features

        network.compute = timed

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.runs) / 1e3


def network_alone(network: Network, batch_size: int, at_least: float) -> float:
    """Patches a second of the network on uint8 patches that are on its device already."""
    images = torch.randint(0, 256, (batch_size, PATCH_PX, PATCH_PX, 3), dtype=torch.uint8, device=network.device)

    def wait() -> None:
        if network.on_gpu:
            torch.cuda.synchronize()

    for _ in range(3 if network.on_gpu else 1):
        network(images)
    wait()
    start, patches = time.perf_counter(), 0
    while time.perf_counter() - start < at_least:
        network(images)
        patches += batch_size
    wait()
    return patches / (time.perf_counter() - start)


def open_bench(path: Path, reader: Reader, device: torch.device) -> Opened:
    slide = open_slide(path, "bench", "bench")
    coords = whole_grid((slide.width, slide.height), PATCH_PX * MPP / slide.level0_mpp)
    given = (slide, coords, PATCH_PX, MPP, ReadingSettings(reader))
    opened = NvjpegReader(*given, device) if reader == "nvjpeg" else PatchReader(*given)
    expected = {"nvjpeg": "nvjpeg", "openslide": "openslide"}.get(reader, "jpeg tiles")
    if opened.route != expected:
        raise RuntimeError(f"{reader}: read by {opened.route}: {opened.warnings}")
    return Opened(opened)


def can_read(path: Path, reader: Reader, device: torch.device) -> bool:
    """Says why not."""
    try:
        if reader == "nvjpeg":
            check_nvjpeg(device)
        open_bench(path, reader, device)
    except (ValueError, RuntimeError) as error:
        print(f"{reader} is left out: {error}", flush=True)
        return False
    return True


def end_to_end(
    path: Path, network: Network, reader: Reader, batch_size: int, threads: int, at_least: float
) -> tuple[float, float, float | None]:
    """Patches a second, share waited and, on a GPU, share computed, of a window that begins when the readers' first
    batches are through and lasts until the time is over and each has read some more."""
    openings = repeat(lambda: open_bench(path, reader, network.device))
    before = network.compute
    with closing(read_ahead(openings, batch_size, threads, memory_for_pixels(network.device))) as pieces:
        batches = (batch for _, batch in pieces if batch is not None)
        for _ in range(threads + 1):
            network(next(batches).pixels)
        stopwatch = Stopwatch(network) if network.on_gpu else None
        start, waited, patches, count = time.perf_counter(), 0.0, 0, 0
        while time.perf_counter() - start < at_least or count < 3 * threads:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            network(batch.pixels)
            patches += len(batch.rows)
            count += 1
        computed = stopwatch.seconds() if stopwatch is not None else None
        taken = time.perf_counter() - start
    network.compute = before
    return patches / taken, waited / taken, None if computed is None else computed / taken


def many_slides(
    path: Path, folder: Path, slides: int, settings: EncoderSettings, reader: Reader, threads: int
) -> list[str]:
    """Stage encode of several slides: patches in all, patches a second one by one, in one process, and their ratio."""
    outputs = Outputs(*(folder / f"S{end}" for end in (".npy", ".json", ".jpg", ".png", ".geojson")))
    if not outputs.record.exists():
        tile_slide(path, "bench", "bench", TilingSettings(patch_px=PATCH_PX, mpp=MPP), outputs)
    jobs = [SlideJob(path, outputs.coords, outputs.record, folder / f"{i}.zarr.zip") for i in range(slides)]
    reading = ReadingSettings(reader)
    patches = slides * len(np.load(outputs.coords))

    def one_by_one() -> None:
        for job in jobs:
            encode_slides([job], settings, reading, threads)

    alone, together = seconds(one_by_one), seconds(lambda: encode_slides(jobs, settings, reading, threads))
    return [str(patches), f"{patches / alone:.0f}", f"{patches / together:.0f}", f"{alone / together:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=16384, help="side of the slide in pixels, a multiple of 4096")
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_small_patch16_224"], help="timm's names")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], help="default: fp32; on a GPU both")
    parser.add_argument("--readers", nargs="+", help="default: exact scaled openslide, on a GPU nvjpeg too")
    parser.add_argument("--threads", type=int, nargs="+", help="readers; default: 1 2, on a GPU 1 4 16")
    parser.add_argument("--seconds", type=float, help="of each window, at least; default: 5, on a GPU 0.7")
    parser.add_argument("--slides", type=int, help="one by one and together, 0: leave that out; on a GPU 4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    parser.add_argument("--write", type=Path, help="the Markdown page to put the tables into")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else choose_device()
    on_gpu = device.type == "cuda"
    precisions = options.precisions or (["bf16", "fp32"] if on_gpu else ["fp32"])
    threads = options.threads or ([1, 4, 16] if on_gpu else [1, 2])
    slides = (4 if on_gpu else 0) if options.slides is None else options.slides
    at_least = options.seconds or (0.7 if on_gpu else 5)
    wanted = options.readers or (["nvjpeg", *READERS] if on_gpu else READERS)
    title = f"**{torch.cuda.get_device_name()}**, {cpu_name()}" if on_gpu else f"**{cpu_name()}**"
    cv2.setNumThreads(1)

    rows: list[list[str]] = []
    alone_rows: list[list[str]] = []
    many_rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_slide(Path(folder) / "slide.svs", options.size)
        readers = [reader for reader in wanted if can_read(path, reader, device)]
        for model in options.models:
            for precision in precisions:
                settings = EncoderSettings("bench", model, "random", batch_size=options.batch_size, precision=precision)
                make_repeatable(threads[-1])
                network = Network(Encoder(settings, PATCH_PX), PATCH_PX, device)
                alone = network_alone(network, options.batch_size, at_least)
                if on_gpu:
                    eager = Network(Encoder(settings, PATCH_PX), PATCH_PX, device, graph=False)
                    without = network_alone(eager, options.batch_size, at_least)
                    alone_rows.append([model, precision, f"{without:.0f}", f"{alone:.0f}", f"{alone / without:.2f}"])
                    del eager
                for reader in readers:
                    if reader == "openslide" and rows and (model, precision) != (rows[0][0], rows[0][1]):
                        continue  # it is the reader that limits: the same again
                    for count in threads:
                        make_repeatable(count)
                        rate, waited, busy = end_to_end(path, network, reader, options.batch_size, count, at_least)
                        if not on_gpu:  # whose speed depends on its threads, and on who else is at work
                            alone = network_alone(network, options.batch_size, at_least)
                        rows.append(
                            [model, precision, reader, str(count), f"{rate:.0f}", f"{waited:.1%}",
                             "–" if busy is None else f"{busy:.0%}", f"{alone:.0f}", f"{rate / alone:.2f}"]
                        )  # fmt: skip
                        print(" ".join(rows[-1]), flush=True)
                if slides:
                    found = many_slides(path, Path(folder), slides, settings, "exact", threads[-1])
                    many_rows.append([model, precision, "exact", str(threads[-1]), *found])
    header = ["network", "precision", "read by", "threads", "patches/s", "waiting", "GPU busy", "network alone"]
    text = f"""{title}, torch {torch.__version__}, batches of {options.batch_size}, {time.strftime("%Y-%m-%d")}; \
40x → 20x, patches of {PATCH_PX} px. `python -m benchmarks.encoding {" ".join(sys.argv[1:])}`

{markdown_table([*header, "share of it"], rows)}"""
    if alone_rows:
        text += "\n\n"
        text += markdown_table([*header[:2], "alone, eager", "alone, CUDA graph", "ratio"], alone_rows)
    if many_rows:
        text += f"""

{slides} slides, stage encode from the start of its work to the last store, encoder included:

{markdown_table([*header[:4], "patches", "one by one", "together", "ratio"], many_rows)}"""
    print(text)
    if options.write:
        write_section(options.write, f"encoding on {device.type}", text)


if __name__ == "__main__":
    main()
