"""The steps that `make bench` measures: the whole model, each way of computing it, and parts of it for scale.

Shapes: N instances, G groups, D = 512 width.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import nn

from benchmarks.measure import Step, peak_rss
from benchmarks.published import SCANS, PublishedLoop
from gmmamba.grouping import group_coords
from gmmamba.models.bag import Bag
from gmmamba.models.gmmamba import PUBLISHED, GMMamba
from gmmamba.models.scan import BACKENDS

WIDTH, CLASSES = 512, 2
KMEANS, LINEAR = "k-means", "linear layers"


@dataclass(frozen=True)
class Cell:
    """One measurement. `runner`: one of published.SCANS or scan.BACKENDS for the whole model; KMEANS; LINEAR."""

    runner: str
    N: int
    G: int
    train: bool
    """Forward and backward in training mode, else forward alone in evaluation mode."""
    device: str
    threads: int


def prepare(cell: Cell) -> Step:
    """The step, with everything it needs in memory. It ends when the device has finished it."""
    torch.set_num_threads(cell.threads)
    threadpool_limits(cell.threads)
    torch.manual_seed(0)
    bag = synthetic_bag(cell.N, cell.G, cell.device)
    options = PUBLISHED | ({"scan": cell.runner} if cell.runner in BACKENDS else {})
    ours = GMMamba(WIDTH, CLASSES, **options).to(cell.device)
    published = PublishedLoop(ours, cell.G, cell.runner)
    if cell.runner == KMEANS:
        return lambda: published.groups_of(bag)
    if cell.runner == LINEAR:
        return linear_layers(ours, cell)
    model = (published if cell.runner in SCANS else ours).train(cell.train)

    def step() -> None:
        model.zero_grad()
        with torch.set_grad_enabled(cell.train):
            logits = model(bag).logits
        if cell.train:
            F.cross_entropy(logits, torch.zeros(1, dtype=torch.long, device=cell.device)).backward()
        wait(cell.device)

    return step


@lru_cache(maxsize=1)
def synthetic_bag(N: int, G: int, device: str) -> Bag:
    """A full grid of patches with random features, grouped by location."""
    y, x = np.divmod(np.arange(N), math.isqrt(N))
    coords = (np.stack([x, y], axis=1) * 512).astype(np.int32)
    groups = torch.from_numpy(group_coords(coords, "location", G)).long()
    features = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
    return Bag(features, torch.from_numpy(coords), groups).to(device)


def linear_layers(model: GMMamba, cell: Cell) -> Step:
    """The floor: the matrix products of both mixers, in both directions, and of both heads, without all the rest."""
    imm, kept = model.imm, cell.N - int(model.imm.mask_ratio * cell.N)
    assert imm.mask_attention is not None
    assert imm.BiMamba2 is not None
    assert imm.group_ins_attention is not None
    products = [
        (layer.weight.detach(), rows, train)
        for part, rows, train in [
            (imm.BiMamba1, cell.N, cell.train),
            (imm.mask_attention, cell.N, False),  # the mask is hard: no gradient
            (imm.BiMamba2, kept, cell.train),
            (imm.group_ins_attention, kept, cell.train),
        ]
        for layer in part.modules()
        if isinstance(layer, nn.Linear)
    ]
    numbers = torch.randn(cell.N * max(max(weight.shape) for weight, _, _ in products), device=cell.device)

    def step() -> None:
        for weight, rows, train in products:
            dy, x = (numbers[: rows * width].view(rows, width) for width in weight.shape)
            torch.mm(x, weight.T)
            if train:
                torch.mm(dy, weight)
                torch.mm(dy.T, x)
        wait(cell.device)

    return step


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(cell: Cell) -> float:
    """Bytes that one step needs beyond what lay there before; NaN where there are not as many."""
    if cell.device == "cpu":
        return peak_rss(prepare, cell)
    step, before = prepare(cell), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        step()
    except torch.OutOfMemoryError:
        return math.nan
    return torch.cuda.max_memory_allocated() - before


def available_backends(device: str) -> list[str]:
    """The backends of our scan that run on the device; why another does not is printed."""
    found = []
    for name in BACKENDS:
        if name == "auto":
            continue  # one of the others
        try:
            prepare(Cell(name, N=8, G=2, train=True, device=device, threads=1))()
        except Exception as error:
            print(f"scan {name} does not run on {device}: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found
