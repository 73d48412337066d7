"""What only a GPU is asked: how far bf16 is from float32, and how busy a training epoch keeps the device.

Shapes: N instances.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import markdown_table, seconds
from gmmamba.data import BagReader, LabelledBag
from gmmamba.models.bag import Bag
from gmmamba.models.gmmamba import PUBLISHED, GMMamba
from gmmamba.prediction import make_repeatable
from gmmamba.protocol import TrainingSettings
from gmmamba.training import train_epoch
from slidestore import StoreAttributes, open_store, write_store

WIDTH, GROUPS, WARM_UP = 512, 10, 10


def precision_and_epochs(backends: list[str], device: str = "cuda", slides: int = 200, N: int = 10_000) -> str:
    """A Markdown table: a row for each backend and precision of training."""
    make_repeatable(0, torch.get_num_threads())  # as `gmmamba train` does
    with TemporaryDirectory() as folder:
        cohort = [synthetic_slide(Path(folder), N, number) for number in range(slides)]
        rows = [
            [backend, precision, *epoch(backend, precision, cohort, torch.device(device))]
            for backend in backends
            for precision in ("fp32", "bf16")
        ]
    header = "scan,precision,logits' difference from fp32,slides/s,slides/s of the first epoch,GPU busy,loading alone"
    title = (
        f"A training epoch of {slides} slides of {N} patches, {GROUPS} groups. The first epoch reads the stores, the "
        f"others have them in memory. Shares of a later epoch's time: the GPU computes; all slides go to it, alone."
    )
    return f"{title}\n\n{markdown_table(header.split(','), rows)}"


def synthetic_slide(folder: Path, N: int, number: int) -> LabelledBag:
    """A store of random features, in `folder`."""
    attributes = StoreAttributes(
        slide_id=f"S{number}", cohort="synthetic", patch_px=224, patch_px_level0=224.0, mpp=0.5, level0_mpp=0.5,
        level0_width=1, level0_height=1, magnification=20.0, encoder="synthetic", encoder_weights_sha256=None,
        tiling_hash="", source={}, created_by="benchmarks.cuda",
    )  # fmt: skip
    features = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(number)).half()
    path = folder / f"S{number}.zarr.zip"
    write_store(path, np.zeros((N, 2)), features.numpy(), attributes)
    return LabelledBag(f"S{number}", f"P{number}", "synthetic", number % 2, open_store(path), torch.arange(N) % GROUPS)


def epoch(backend: str, precision: str, slides: list[LabelledBag], device: torch.device) -> list[str]:
    """The cells of a row: largest difference of logits over their largest magnitude; speed and shares of an epoch."""
    torch.manual_seed(0)
    model = GMMamba(WIDTH, 2, scan=backend, **PUBLISHED).to(device)
    reader = BagReader(device, budget=10**12)
    bag = reader.prepare(slides[0])
    exact, logits = (autocast_logits(model, bag, p) for p in ("fp32", precision))
    difference = ((logits - exact).abs().max() / exact.abs().max()).item()

    settings = replace(TrainingSettings(), precision=precision)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)

    def train(some: list[LabelledBag]) -> None:
        train_epoch(model, some, optimizer, settings, reader, epoch=1)  # ends by reading the loss: synchronised

    def load() -> None:
        for _, bag in reader.stream(slides):
            bag.features[0, 0].item()

    train(slides[:WARM_UP])
    first, total, loading = seconds(lambda: train(slides)), seconds(lambda: train(slides)), seconds(load)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        train(slides[:WARM_UP])
    kernels = (e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)  # type: ignore[attr-defined]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6 / len(slides[:WARM_UP]) * len(slides)
    speeds = [f"{len(slides) / total:.3g}", f"{len(slides) / first:.3g}"]
    return [f"{difference:.1e}", *speeds, f"{busy / total:.0%}", f"{loading / total:.0%}"]


@torch.no_grad()
def autocast_logits(model: GMMamba, bag: Bag, precision: str) -> torch.Tensor:
    with torch.autocast(bag.features.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model.eval()(bag).logits.float()
