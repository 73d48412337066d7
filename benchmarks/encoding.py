"""Slides to features, end to end, beside the network alone: ``python -m benchmarks.encoding``.

The slide is that of benchmarks.reading. For each encoder and way of reading: patches a second from the slide to
features in memory, the share of the time in which the network waited for pixels, and how fast the network alone is on
patches that are on its device already. On a GPU if there is one (then also how long it was busy).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import cpu_name, markdown_table, seconds, write_section
from benchmarks.reading import PATCH_PX, make_slide
from preprocessing.encode import encode_patches
from preprocessing.encoders import Encoder, EncoderSettings
from preprocessing.patches import PatchReader, Reader, ReadingSettings
from preprocessing.slide import open_slide
from preprocessing.tile import patch_grid

MPP = 0.5
READERS: list[Reader] = ["openslide", "exact", "scaled"]


def network_alone(encoder: Encoder, device: torch.device, patches: int) -> float:
    """Patches a second of the network on uint8 patches that are there already."""
    batch = encoder.settings.batch_size
    images = torch.randint(0, 256, (batch, PATCH_PX, PATCH_PX, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)

    def run() -> None:
        with torch.inference_mode():
            for _ in range(-(-patches // batch)):
                last = encoder(images)
        last[0, 0].item()

    run()
    return -(-patches // batch) * batch / seconds(run)


def end_to_end(
    path: Path, encoder: Encoder, device: torch.device, reader: Reader, patches: int, threads: int
) -> list[str]:
    slide = open_slide(path, "bench", "bench")
    coords, _ = patch_grid(np.ones((64, 64), bool), (slide.width, slide.height), PATCH_PX * MPP / slide.level0_mpp, 0.5)
    coords = coords[:patches]

    def run() -> float:
        *_, waited = encode_patches(
            PatchReader(slide, coords, PATCH_PX, MPP, ReadingSettings(reader)), encoder, device, threads
        )
        return waited

    start = time.perf_counter()
    waited = run()
    rate = len(coords) / (time.perf_counter() - start)
    busy = "–"
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            taken = seconds(run)
        busy = f"{sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6 / taken:.0%}"
    return [reader, str(len(coords)), f"{rate:.0f}", f"{waited:.1%}", busy]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=16384, help="side of the slide in pixels, a multiple of 4096")
    parser.add_argument("--patches", type=int, default=512, help="at most so many")
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_small_patch16_224"], help="timm's names")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--write", type=Path, help="the Markdown page to put the table into")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_slide(Path(folder) / "slide.svs", options.size)
        for model in options.models:
            settings = EncoderSettings(
                "bench", model, "random", batch_size=options.batch_size, precision=options.precision
            )
            encoder = Encoder(settings, PATCH_PX).to(device)
            alone = network_alone(encoder, device, options.patches)
            for reader in READERS:
                found = end_to_end(path, encoder, device, reader, options.patches, options.threads)
                rows.append([model, *found, f"{alone:.0f}", f"{float(found[2]) / alone:.2f}"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    header = ["network", "read by", "patches", "patches/s", "waiting", "GPU busy", "network alone", "share of it"]
    text = f"""**{name}**, {options.threads} threads, {options.precision}, {time.strftime("%Y-%m-%d")}; 40x → 20x, patches \
of {PATCH_PX} px. `python -m benchmarks.encoding {" ".join(sys.argv[1:])}`

{markdown_table(header, rows)}"""
    print(text)
    if options.write:
        write_section(options.write, f"encoding on {device.type}", text)


if __name__ == "__main__":
    main()
