"""What only a GPU is asked: how far bf16 is from float32, and how busy a training epoch keeps the device.

Slides lie in memory, as `gmmamba train` has them, so there is no data loader: only the copy to the device.

Shapes: N instances.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import markdown_table, seconds
from gmmamba.data import LabelledBag, to_device
from gmmamba.models.bag import Bag
from gmmamba.models.gmmamba import PUBLISHED, GMMamba
from gmmamba.prediction import make_repeatable
from gmmamba.training import TrainingSettings, train_epoch

WIDTH, GROUPS, WARM_UP = 512, 10, 10


def precision_and_epochs(backends: list[str], device: str = "cuda", slides: int = 200, N: int = 10_000) -> str:
    """A Markdown table: a row for each backend and precision of training."""
    make_repeatable(0, torch.get_num_threads())  # as `gmmamba train` does
    bags = [synthetic_slide(N, number) for number in range(slides)]
    rows = [
        [backend, precision, *epoch(backend, precision, bags, torch.device(device))]
        for backend in backends
        for precision in ("fp32", "bf16")
    ]
    header = ["scan", "precision", "logits, difference from fp32", "slides/s", "GPU busy", "copying slides to the GPU"]
    title = (
        f"A training epoch of {slides} slides of {N} patches in memory (float16), {GROUPS} groups, shares of its time:"
    )
    return f"{title}\n\n{markdown_table(header, rows)}"


def synthetic_slide(N: int, number: int) -> LabelledBag:
    features = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(number)).half()
    bag = Bag(features, torch.zeros(N, 2, dtype=torch.int32), torch.arange(N) % GROUPS)
    return LabelledBag(f"S{number}", f"P{number}", "synthetic", bag, number % 2, "")


def epoch(backend: str, precision: str, bags: list[LabelledBag], device: torch.device) -> list[str]:
    """The cells of a row: largest difference of logits over their largest magnitude; speed and shares of an epoch."""
    torch.manual_seed(0)
    model = GMMamba(WIDTH, 2, scan=backend, **PUBLISHED).to(device)
    exact, logits = (autocast_logits(model, to_device(bags[0].bag, device), p) for p in ("fp32", precision))
    difference = ((logits - exact).abs().max() / exact.abs().max()).item()

    settings = replace(TrainingSettings(), precision=precision)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)

    def train(slides: int) -> None:
        train_epoch(
            model, bags, optimizer, np.arange(slides), settings, device
        )  # ends by reading the loss: synchronised

    def copy() -> None:
        for item in bags:
            to_device(item.bag, device).features[0, 0].item()

    train(min(WARM_UP, len(bags)))
    total, copying = seconds(lambda: train(len(bags))), seconds(copy)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        train(min(WARM_UP, len(bags)))
    kernels = (e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
    busy = sum(e.self_device_time_total for e in kernels) / 1e6 / min(WARM_UP, len(bags)) * len(bags)
    return [f"{difference:.1e}", f"{len(bags) / total:.3g}", f"{busy / total:.0%}", f"{copying / total:.0%}"]


@torch.no_grad()
def autocast_logits(model: GMMamba, bag: Bag, precision: str) -> torch.Tensor:
    with torch.autocast(bag.features.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model.eval()(bag).logits.float()
