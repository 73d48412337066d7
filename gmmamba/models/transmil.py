"""TransMIL: a transformer over the slide's patches (Shao et al., NeurIPS 2021).

Shapes: N instances, D feature width, M embedding width, C classes, H heads, s side of the square.
"""

from __future__ import annotations

import math
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models.bag import Bag, MILModel, MILOutput
from gmmamba.models.nystrom import NystromAttention


class TransMIL(MILModel):
    """h = ReLU(Lin x), in the order of the bag, then a `TransEncoder` whose tokens fill a square; logits = Lin(z).

    The published fault that is avoided is nystrom-attention's (nystrom.py).

    Args:
        in_dim: D.
        width: M, a multiple of 8, the number of heads; M / 2 landmarks.
        dropout: of the output of each attention.
    """

    def __init__(self, in_dim: int, n_classes: int, width: int = 512, dropout: float = 0.1):
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(in_dim, width), nn.ReLU())
        self.encoder = TransEncoder(width, dropout, square=True)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, bag: Bag) -> MILOutput:
        """The attention: how strongly the class token weighs a patch in the second layer, whatever the sign.

        Nyström's approximation of a softmax may go below 0 (with initial weights it does not). A patch of negative
        weight moves the class token as one of positive weight does, to the other side, so the attention is the
        magnitude, summed over heads, as a share of the whole. It says which patches are read, not for what they speak.
        """
        feature, attention = self.encode(bag)
        return MILOutput(self.classifier(feature), attention)

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        feature, _, row = self.encoder(self.embed(bag.features))
        return feature, magnitude_share(row)


class TransEncoder(nn.Module):
    """A class token before the tokens: x += Nys(LN x); tokens += PPEG(tokens); x += Nys(LN x); LN of the class token.

    square: whether tokens are repeated to a square before the first layer (TransMIL) or only inside PPEG, whose square
    then has a side of 7 or more (MHIM).
    """

    def __init__(self, width: int, dropout: float, square: bool):
        super().__init__()
        self.square = square
        self.cls_token = nn.Parameter(torch.randn(1, width))
        self.layer1 = TransLayer(width, dropout)
        self.ppeg = PPEG(width, smallest=1 if square else 7)
        self.layer2 = TransLayer(width, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (N, M) to the slide's feature (1, M), and the class token's signed attention to each token in both
        layers, (H, N) each, without gradient; what a repeated token gets is its original's."""
        tokens = fill_square(h) if self.square else h
        x, row1 = self.layer1(torch.cat([self.cls_token, tokens]))
        x = torch.cat([x[:1], self.ppeg(x[1:])])
        x, row2 = self.layer2(x)
        return self.norm(x[:1]), fold(row1[:, 1:], len(h)), fold(row2[:, 1:], len(h))


class TransLayer(nn.Module):
    """x + Nys(LN x)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = NystromAttention(width, dropout=dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, M) to (n, M), and the first one's row of attention (H, n)."""
        out, row = self.attention(self.norm(x))
        return x + out, row


class PPEG(nn.Module):
    """Position from neighbourhood: the tokens as a square image, row by row, plus its depthwise convolutions by 7 x 7,
    5 x 5 and 3 x 3, which are one by 7 x 7 here.

    smallest: a square of a smaller side is laid out, and filled up with zeros, as one of this side.
    """

    def __init__(self, width: int, smallest: int = 1):
        super().__init__()
        self.smallest = smallest
        self.convs = nn.ModuleList(nn.Conv2d(width, width, k, groups=width) for k in (7, 5, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, M) to (n, M)."""
        n, width = tokens.shape
        x = fill_square(tokens)
        side = max(math.isqrt(len(x)), self.smallest)
        image = F.pad(x, (0, 0, 0, side**2 - len(x))).view(1, side, side, width).permute(0, 3, 1, 2)
        weights, biases = zip(*map(attrgetter("weight", "bias"), self.convs), strict=True)
        kernel = torch.stack([F.pad(weight, [edge] * 4) for edge, weight in enumerate(weights)]).sum(0)
        out = F.conv2d(image, kernel, torch.stack(biases).sum(0), padding=3, groups=width)
        return tokens + out.permute(0, 2, 3, 1).reshape(-1, width)[:n]


def fill_square(tokens: Tensor) -> Tensor:
    """(n, M) to (s^2, M), s = ceil(sqrt n), with the first tokens once more behind the last."""
    n = len(tokens)
    side = math.isqrt(n - 1) + 1
    return torch.cat([tokens, tokens[: side**2 - n]])


def fold(row: Tensor, n: int) -> Tensor:
    """(H, s^2) of a filled square to (H, n): what the repeated tokens got is added to their originals."""
    again = row.shape[1] - n
    return row[:, :n] + F.pad(row[:, n:], (0, n - again))


def magnitude_share(row: Tensor) -> Tensor:
    """(H, N) of any sign to (N,), >= 0, sum 1: the magnitudes, summed over heads."""
    weight = row.float().abs().sum(0)
    return weight / weight.sum()
