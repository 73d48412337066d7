"""ABMIL: attention-based pooling (Ilse, Tomczak and Welling, ICML 2018).

Shapes: N instances, D feature width, M embedding width, L attention width, K rows of attention, C classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from gmmamba.models.bag import Bag, MILModel, MILOutput


class GatedAttention(nn.Module):
    """The scores of attention pooling, before softmax: w . (tanh(V h) * sigmoid(U h)), for each of K rows w.

    Args:
        width: M, of h.
        hidden: L.
        rows: K.
        gated: whether the sigmoid gate U is there.
        dropout: after tanh and after sigmoid, each by itself.
    """

    def __init__(self, width: int, hidden: int, rows: int = 1, gated: bool = True, dropout: float = 0.0):
        super().__init__()
        self.v = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Dropout(dropout))
        self.u = nn.Sequential(nn.Linear(width, hidden), nn.Sigmoid(), nn.Dropout(dropout)) if gated else None
        self.score = nn.Linear(hidden, rows)

    def forward(self, h: Tensor) -> Tensor:
        """(N, M) to (K, N)."""
        gate = self.v(h)
        if self.u is not None:
            gate = gate * self.u(h)
        scores: Tensor = self.score(gate).T
        return scores


class ABMIL(MILModel):
    """h = ReLU(Lin x); a = softmax over instances of w . (tanh(V h) * sigmoid(U h)); logits = Lin(sum a h).

    The defaults are those of common whole-slide practice (the MambaMIL repository's sizes, gated). Published
    flavours: width 500 and one output (Ilse), bias False and width 256 or 128 (ACMIL repository). With
    n_classes = 1 the one logit belongs to a sigmoid.

    Args:
        in_dim: D.
        width: M.
        hidden: L.
        gated: whether the sigmoid gate U is there.
        bias: of the embedding.
        dropout: after the embedding's ReLU.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        width: int = 512,
        hidden: int = 128,
        gated: bool = True,
        bias: bool = True,
        dropout: float = 0.25,
    ):
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(in_dim, width, bias=bias), nn.ReLU(), nn.Dropout(dropout))
        self.attention = GatedAttention(width, hidden, gated=gated)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, bag: Bag) -> MILOutput:
        """The attention is a; the details hold the scores before softmax, `attn_raw` (1, N)."""
        feature, attention, raw = self.pool(bag)
        return MILOutput(self.classifier(feature), attention, {"attn_raw": raw})

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        return self.pool(bag)[:2]

    def pool(self, bag: Bag) -> tuple[Tensor, Tensor, Tensor]:
        """sum a h (1, M), a (N,) without gradient, scores (1, N)."""
        h: Tensor = self.embed(bag.features)  # (N, M)
        raw: Tensor = self.attention(h)  # (1, N)
        attention = raw.softmax(1)
        return attention @ h, attention[0].detach(), raw
