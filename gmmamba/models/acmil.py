"""ACMIL: several attention branches kept apart, and their strongest instances masked at random (Zhang et al., ECCV
2024).

Shapes: N instances, D feature width, M embedding width, L attention width, C classes, K branches, H heads (1 for gated
attention).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gmmamba.models import known
from gmmamba.models.abmil import GatedAttention
from gmmamba.models.bag import Bag, MILModel, MILOutput

ATTENTIONS = ("gated", "mha")
HEADS = 8


class ACMIL(MILModel):
    """K branches of attention, each with a feature and a classifier; the slide's attention is their mean.

    It learns from the slide's cross-entropy, the mean of the branches', and the mean cosine between the attentions of
    two branches, which keeps them apart. In training each branch loses a random share of its strongest instances
    (stochastic top-K instance masking, STKIM); in prediction none. With one branch there is only the slide's
    cross-entropy, and that branch's classifier does not learn, as published.

    Args:
        in_dim: D.
        attention: "gated", or "mha": cross-attention of a learned query a branch, 8 heads.
        width: M; for "mha" a multiple of 8. Published: 256 for features of width 512, 128 for 384.
        hidden: L, for "gated".
        branches: K.
        masked: how many of the strongest instances of a branch are candidates for masking.
        mask_drop: share of them that a training step masks.
        dropout: of the branches' and the slide's feature, for "mha".
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        attention: str = "gated",
        width: int = 256,
        hidden: int = 128,
        branches: int = 5,
        masked: int = 10,
        mask_drop: float = 0.6,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.width, self.masked, self.mask_drop = width, masked, mask_drop
        self.embed = nn.Sequential(nn.Linear(in_dim, width, bias=False), nn.ReLU())
        self.pool: GatedBranches | CrossBranches = (
            GatedBranches(width, hidden, branches)
            if known("attention", attention, ATTENTIONS) == "gated"
            else CrossBranches(width, branches, dropout)
        )
        self.branch_classifiers = nn.ModuleList(nn.Linear(width, n_classes) for _ in range(branches))
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, bag: Bag, uniforms: Tensor | None = None) -> MILOutput:
        """The attention is the slide's: the mean over branches (and heads).

        The details hold the branches' logits `sub_logits` (K, C), their scores before softmax, masked in training,
        `attn_raw` (H, K, N), which of these are `masked`, and the slide's attention by head, `bag_attn` (H, N).

        uniforms: (H, K, min(masked, N)), by whose ranks training masks; drawn unless given.
        """
        h, raw, hidden = self.attend(bag, uniforms)
        attention = raw.softmax(2)
        features = self.pool.branch_features(h, attention)  # (K, M)
        sub_logits = torch.stack([head(row) for head, row in zip(self.branch_classifiers, features, strict=True)])
        mean = attention.mean(1)  # (H, N)
        logits = self.classifier(self.pool.slide_feature(h, mean))
        details = {"sub_logits": sub_logits, "attn_raw": raw, "masked": hidden, "bag_attn": mean}
        return MILOutput(logits, mean.mean(0).detach(), details)

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """Masked in training, too."""
        h, raw, _ = self.attend(bag)
        mean = raw.softmax(2).mean(1)
        return self.pool.slide_feature(h, mean), mean.mean(0).detach()

    def attend(self, bag: Bag, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """h (N, M), the branches' scores, masked in training, and which these are, both (H, K, N)."""
        h = self.embed(bag.features)
        raw = self.pool.scores(h)
        hidden = torch.zeros_like(raw, dtype=torch.bool)
        if self.training:
            hidden = mask_strongest(raw, self.masked, self.mask_drop, uniforms)
        return h, raw.masked_fill(hidden, -1e9), hidden

    def training_loss(self, bag: Bag, label: Tensor, progress: float) -> Tensor:
        return self.losses(self(bag), label)["loss"]

    def losses(self, output: MILOutput, label: Tensor) -> dict[str, Tensor]:
        """`loss` and its summands: `slide_loss`, `sub_loss` and `diff_loss`, the last two 0 for one branch."""
        sub_logits, raw = output.details["sub_logits"].float(), output.details["attn_raw"].float()
        K = len(sub_logits)
        slide_loss = cross_entropy(output.logits.float(), label)
        sub_loss = diff_loss = torch.zeros_like(slide_loss)
        if K > 1:
            sub_loss = cross_entropy(sub_logits, label.expand(K))
            rows = normalize(raw.softmax(2), dim=2)
            cosines = rows @ rows.transpose(1, 2)  # (H, K, K)
            diff_loss = cosines.triu(1).sum((1, 2)).mean() / (K * (K - 1) / 2)
        loss = slide_loss + sub_loss + diff_loss
        return {"loss": loss, "slide_loss": slide_loss, "sub_loss": sub_loss, "diff_loss": diff_loss}


def mask_strongest(scores: Tensor, candidates: int, share: float, uniforms: Tensor | None = None) -> Tensor:
    """Which of `scores` (H, K, N) STKIM masks: of the highest `candidates` of each row, int(share x their number).

    uniforms: (H, K, min(candidates, N)); those candidates go whose uniforms are lowest.
    """
    highest = scores.detach().topk(min(candidates, scores.shape[2])).indices
    if uniforms is None:
        uniforms = torch.rand(highest.shape, device=scores.device)
    lost = uniforms.argsort(dim=2)[:, :, : int(highest.shape[2] * share)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(2, highest.gather(2, lost), True)


class GatedBranches(nn.Module):
    """Gated attention with a row a branch; a branch's feature and the slide's are the weighted sums of h."""

    def __init__(self, width: int, hidden: int, branches: int):
        super().__init__()
        self.attention = GatedAttention(width, hidden, branches)

    def scores(self, h: Tensor) -> Tensor:
        """(N, M) to (1, K, N)."""
        scores: Tensor = self.attention(h)
        return scores[None]

    def branch_features(self, h: Tensor, attention: Tensor) -> Tensor:
        """(K, M)."""
        return attention[0] @ h

    def slide_feature(self, h: Tensor, attention: Tensor) -> Tensor:
        """(1, M)."""
        return attention @ h


class CrossBranches(nn.Module):
    """Multi-head cross-attention of a query a branch to the instances; the slide has its own value projection."""

    def __init__(self, width: int, branches: int, dropout: float):
        super().__init__()
        if width % HEADS:
            raise ValueError(f"width is {width}: ACMIL with attention mha needs a multiple of {HEADS}, its heads")
        self.queries = nn.Parameter(torch.randn(branches, width) * 1e-6)
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(branches))
        self.key = nn.ModuleList(nn.Linear(width, width) for _ in range(branches))
        self.branch = nn.ModuleList(HeadedSum(width, dropout) for _ in range(branches))
        self.slide = HeadedSum(width, dropout)

    def scores(self, h: Tensor) -> Tensor:
        """(N, M) to (H, K, N)."""
        per_head = (len(h), HEADS, -1)
        rows = []
        for q, query, key in zip(self.queries, self.query, self.key, strict=True):
            keys = key(h).view(per_head)  # (N, H, M/H)
            rows.append(torch.einsum("hd,nhd->hn", query(q).view(HEADS, -1), keys) / keys.shape[2] ** 0.5)
        return torch.stack(rows, 1)

    def branch_features(self, h: Tensor, attention: Tensor) -> Tensor:
        """(K, M)."""
        return torch.cat([pool(h, row) for pool, row in zip(self.branch, attention.unbind(1), strict=True)])

    def slide_feature(self, h: Tensor, attention: Tensor) -> Tensor:
        """(1, M)."""
        feature: Tensor = self.slide(h, attention)
        return feature


class HeadedSum(nn.Module):
    """Attention (H, N) applied to the values of h (N, M): projection, Dropout and LayerNorm to (1, M)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width, eps=1e-6)

    def forward(self, h: Tensor, attention: Tensor) -> Tensor:
        values = self.value(h).view(len(h), HEADS, -1)
        summed = torch.einsum("hn,nhd->hd", attention.to(values.dtype), values).reshape(1, -1)
        feature: Tensor = self.norm(self.dropout(self.out(summed)))
        return feature
