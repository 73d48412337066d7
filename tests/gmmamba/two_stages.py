"""The smallest method of two stages, for what the pipeline does with such methods."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from gmmamba.models.bag import Bag, MILModel, MILOutput


class TwoStages(MILModel):
    """Logits of the mean patch; the second stage adds what the first one's weights were, and remembers its bags."""

    def __init__(self, in_dim: int, n_classes: int, width: int = 8, stage: int = 2):
        super().__init__()
        self.stage = stage
        self.embed = nn.Linear(in_dim, width)
        self.classifier = nn.Linear(width, n_classes)
        self.register_buffer("prior", torch.zeros(n_classes, width))
        self.register_buffer("bags", torch.zeros((), dtype=torch.int64))

    def forward(self, bag: Bag) -> MILOutput:
        feature = self.embed(bag.features.mean(0, keepdim=True))
        return MILOutput(self.classifier(feature) + feature @ self.prior.T)

    def start_from(self, first: MILModel, bags: Callable[[], Iterable[Bag]]) -> None:
        assert isinstance(first, TwoStages)
        assert not first.training
        self.prior.copy_(first.classifier.weight)
        self.bags.fill_(sum(bag.features.dtype == torch.float32 for bag in bags()))
