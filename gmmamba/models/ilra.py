"""ILRA-MIL: instances talk to a few latent vectors and back, then a learned query pools them (Xiang and Zhang, ICLR
2023).

Shapes: N instances, D feature width, M model width, r latent vectors (the rank), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmmamba.models.bag import Bag, MILModel, MILOutput


class ILRA(MILModel):
    """`layers` gated attention blocks (GAB: D -> M, then M -> M), pooling by a learned query, Lin(M, C).

    With rank 1, the published setting, the way back attends to a single vector: every instance receives the same
    message, and the query and key projections of that attention get gradients that are zero. The low-rank contrastive
    pre-training of the paper is not published and not here.

    Args:
        in_dim: D.
        width: M, a multiple of `heads`.
        rank: r.
        layers: how many GABs.
        heads: of every attention.
        layer_norm: whether attention and feed-forward are each followed by LayerNorm.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        width: int = 256,
        rank: int = 1,
        layers: int = 2,
        heads: int = 8,
        layer_norm: bool = True,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}: ILRA needs a multiple of its heads, {heads}")
        self.width = width
        widths = [in_dim] + [width] * (layers - 1)
        self.blocks = nn.ModuleList(GatedBlock(dim, width, rank, heads, layer_norm) for dim in widths)
        self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, width))[0])
        self.pooling = CrossAttention(width, width, width, heads, layer_norm, gated=False)
        self.classifier = nn.Linear(width, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, bag: Bag) -> MILOutput:
        """The attention is the pooling query's to the instances after the blocks, mean over the heads."""
        feature, attention = self.encode(bag)
        return MILOutput(self.classifier(feature), attention)

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        x = bag.features
        for block in self.blocks:
            x = block(x)
        feature, weights = self.pooling(self.query, x)
        return feature, weights[0].detach()


class GatedBlock(nn.Module):
    """r latent vectors attend to the instances, then the instances to what these gathered: (N, dim) to (N, M)."""

    def __init__(self, dim: int, width: int, rank: int, heads: int, layer_norm: bool):
        super().__init__()
        self.latent = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, rank, width))[0])
        self.gather = CrossAttention(width, dim, width, heads, layer_norm, gated=True)
        self.spread = CrossAttention(dim, width, width, heads, layer_norm, gated=True)

    def forward(self, x: Tensor) -> Tensor:
        gathered, _ = self.gather(self.latent, x)
        spread: Tensor = self.spread(x, gathered)[0]
        return spread


class CrossAttention(nn.Module):
    """q + attention(q, k, v), + ReLU feed-forward, each with LayerNorm after it, times a gate of the queries.

    Args:
        dim_q, dim_k: widths of what queries and what is attended to.
    """

    def __init__(self, dim_q: int, dim_k: int, width: int, heads: int, layer_norm: bool, gated: bool):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim_q, width), nn.Linear(dim_k, width), nn.Linear(dim_k, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm0 = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.norm1 = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.gate = nn.Sequential(nn.Linear(dim_q, width), nn.SiLU()) if gated else None

    def forward(self, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, dim_q) and (N, dim_k) to (Q, M), and the attention (Q, N), mean over heads."""
        q = self.q(queries)
        attended, weights = self.attention(q, self.k(x), self.v(x))
        o = self.norm0(q + attended)
        o = self.norm1(o + self.feed(o))
        return (o if self.gate is None else o * self.gate(queries)), weights
