"""What a multiple-instance-learning model is: what goes in, what comes out, how it learns. Batch = one slide always.

Shapes: N instances (patches) of the slide, D feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass
class Bag:
    """One slide. Row i of every tensor belongs to the same patch."""

    features: Tensor
    """(N, D) float32."""
    coords: Tensor
    """(N, 2) int32, (x, y) of the patch's top-left corner, level-0 pixels."""
    groups: Tensor | None = None
    """(N,) int64 group labels; None: the slide is one group."""

    def to(self, device: torch.device | str) -> Bag:
        """The same slide on another device."""
        groups = None if self.groups is None else self.groups.to(device, non_blocking=True)
        return Bag(self.features.to(device, non_blocking=True), self.coords.to(device, non_blocking=True), groups)


@dataclass
class MILOutput:
    """What every model returns."""

    logits: Tensor
    """(1, C), before softmax."""
    attention: Tensor | None = None
    """(N,) in the order of the bag, >= 0, sums to 1, without gradient; each model documents what it is."""
    details: dict[str, Tensor] = field(default_factory=dict)
    """Intermediate quantities by name, for `gmmamba verify` and for explanations."""


class MILModel(nn.Module):
    """What every model is. `forward` is enough for a method that minimises the cross-entropy of its logits; one whose
    training is its own overrides more."""

    width: int
    """M, of `encode`'s feature."""

    def forward(self, bag: Bag) -> MILOutput:
        raise NotImplementedError

    def training_loss(self, bag: Bag, label: Tensor, progress: float) -> Tensor:
        """The scalar that one training step minimises.

        label: (1,) int64. progress: share of all training steps that are done, 0 at the first, below 1.
        """
        return cross_entropy(self(bag).logits.float(), label)

    def after_step(self, progress: float) -> None:
        """Called after each step of the optimizer: for what follows the weights without being trained, such as a
        teacher."""

    def start_from(self, first: MILModel, bags: Callable[[], Iterable[Bag]]) -> None:
        """Called once before the training of a method in two stages (models.TWO_STAGES) begins.

        first: the same method made with stage=1, with the weights that its own training kept, in eval mode. bags:
        gives the training bags, in float32 on the device. What prediction needs of it becomes part of the state dict.
        """
        raise NotImplementedError

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """The slide's feature (1, M) before the classifier, and the attention (N,): what a wrapper, CSS as a plug-in,
        takes of each group. For methods that have one."""
        raise NotImplementedError
