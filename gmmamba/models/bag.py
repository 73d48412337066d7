"""What a multiple-instance-learning model is: what goes in, what comes out, how it learns. Batch = one slide always.

Shapes: N instances (patches) of the slide, D feature width, C classes.
"""

from __future__ import annotations

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
    """What every model is. A method whose training is its own overrides the other two; see docs/adding_a_model.md."""

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
