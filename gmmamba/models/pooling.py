"""Mean- and max-pooling, the simplest models: Lin(D, 512) + GELU + Dropout 0.25, pool, Lin(512, C).

Shapes: N instances, D feature width, M embedding width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmmamba.models.bag import Bag, MILModel, MILOutput


class MeanPooling(MILModel):
    """Logits of the mean embedding. The attention is 1 / N."""

    def __init__(self, in_dim: int, n_classes: int, width: int = 512, dropout: float = 0.25):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_dim, width), nn.GELU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(width, n_classes)

    def pool(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, M) to the slide's (M,) and the attention (N,)."""
        return h.mean(0), torch.full_like(h[:, 0], 1 / len(h))

    def forward(self, bag: Bag) -> MILOutput:
        pooled, attention = self.pool(self.embed(bag.features))
        return MILOutput(self.classifier(pooled[None]), attention.detach())


class MaxPooling(MeanPooling):
    """Logits of the maximum of each channel. The attention is the share of channels that an instance decides."""

    def pool(self, h: Tensor) -> tuple[Tensor, Tensor]:
        highest, winner = h.max(0)
        return highest, winner.bincount(minlength=len(h)) / h.shape[1]
