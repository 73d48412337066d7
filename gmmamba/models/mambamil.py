"""MambaMIL: Mamba over the slide's patches, and over a strided re-ordering of them (Yang, Wang and Chen, MICCAI 2024).

Shapes: N instances, D feature width, M embedding width, E = 2 M inner width, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models import known
from gmmamba.models.bag import Bag, MILModel, MILOutput
from gmmamba.models.bimamba import BiMamba, Mamba, causal_conv
from gmmamba.models.initial import xavier_linears

MIXERS = ("mamba", "bimamba", "srmamba")
INITS = ("published", "mamba")


class MambaMIL(MILModel):
    """h = GELU(Lin x), in the order of the bag; h += Mixer(LN h), twice; h = LN h; a = softmax over instances of
    w . tanh(V h); logits = Lin(sum a h).

    The published initialisation reaches into the mixers and makes dt 0.69 everywhere, where Mamba draws it from
    [0.001, 0.1] so that there are memories of many lengths; `init: published` does the same. Rate and dropout are those
    of the published training scripts.

    Args:
        in_dim: D.
        width: M.
        mixer: one of MIXERS; srmamba adds to Mamba a second branch over the instances re-ordered (`SRMamba`).
        rate: of srmamba's re-ordering.
        layers: how many mixers.
        d_state: state size of the selective scan.
        hidden: attention width.
        dropout: after the embedding's GELU.
        init: mamba, the mixers keep Mamba's own initial weights; published, they do not.
        scan: backend of the selective scan, one of scan.BACKENDS.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        width: int = 512,
        mixer: str = "srmamba",
        rate: int = 5,
        layers: int = 2,
        d_state: int = 16,
        hidden: int = 128,
        dropout: float = 0.0,
        init: str = "mamba",
        scan: str = "auto",
    ):
        super().__init__()
        known("mixer", mixer, MIXERS)
        known("init", init, INITS)
        self.width = width
        self.embed = nn.Sequential(nn.Linear(in_dim, width), nn.GELU(), nn.Dropout(dropout))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.mixers = nn.ModuleList(make_mixer(mixer, width, d_state, rate, scan) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.classifier = nn.Linear(width, n_classes)
        xavier_linears(self, spare=() if init == "published" else (Mamba,))

    def forward(self, bag: Bag) -> MILOutput:
        """The attention is a; the details hold the scores before softmax, `attn_raw` (1, N)."""
        feature, attention, raw = self.pool(bag)
        return MILOutput(self.classifier(feature), attention, {"attn_raw": raw})

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        return self.pool(bag)[:2]

    def pool(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """sum a h (1, M), a (N,) without gradient, scores (1, N)."""
        h: Tensor = self.embed(bag.features)
        size = torch.tensor([len(h)], device=h.device)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            h = h + mixer(norm(h), size)
        h = self.norm(h)
        raw = self.attention(h).T
        attention = raw.softmax(1)
        return attention @ h, attention[0].detach(), raw


def make_mixer(name: str, width: int, d_state: int, rate: int, scan: str) -> Mamba:
    """The mixer of a name of MIXERS."""
    if name == "srmamba":
        return SRMamba(width, d_state, rate, scan)
    return (BiMamba if name == "bimamba" else Mamba)(width, d_state, scan=scan)


class SRMamba(Mamba):
    """Two branches, both forward: the second meets every r-th instance, then the same one further on, and so on.

    For that the instances are filled up with zeros to a multiple of r. Those zeros lie inside the second branch's
    sequence, as published: they give no output, but through the convolution they do move the state. Its sequence is one
    group.
    """

    branches = ("", "_b")
    reverse = (False, False)

    def __init__(self, width: int, d_state: int = 16, rate: int = 5, scan: str = "auto"):
        super().__init__(width, d_state, scan=scan)
        self.rate = rate

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """As Mamba's, of one group."""
        assert len(sizes) == 1
        padded = F.pad(x, (0, 0, 0, -len(x) % self.rate))  # W_in has no bias: zeros before it are zeros behind it
        return super().forward(padded, torch.full_like(sizes, len(padded)))[: len(x)]

    def convolve(self, u: Tensor, sizes: Tensor) -> Tensor:
        pairs = zip((u, u[self.order(u)]), self.convs, strict=True)
        return torch.cat([causal_conv(x, sizes, [conv], [False]) for x, conv in pairs])

    def merge(self, y: Tensor) -> Tensor:
        first, second = y
        return first.index_add(0, self.order(first), second)

    def order(self, u: Tensor) -> Tensor:
        """The rows of u that the second branch meets one after the other, (L,)."""
        return torch.arange(len(u), device=u.device).view(-1, self.rate).T.flatten()
