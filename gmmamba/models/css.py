"""Cross-group super-feature sampling: what the groups say together, written back to each (GMMAMBA.md, section 4).

Shapes: G groups, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from gmmamba.models import known

VARIANTS = ("cmax", "cmax_q", "cca", "cca_q", "cmha", "cmha_q", "css")


class CSS(nn.Module):
    """m = max over groups; Q = softmax over groups of X m^T; c = Q^T X; r = attention of c to X; F = Q r + c.

    The variants of the poster's table: cmax is m, cca is c, cmha is r, each broadcast to all groups, or times Q
    (`…_q`); css is F.
    """

    def __init__(self, width: int, variant: str = "css"):
        super().__init__()
        self.variant = known("css variant", variant, VARIANTS)
        needs_attention = variant.startswith("cmha") or variant == "css"
        self.stoken_refine = nn.MultiheadAttention(width, 8, bias=False, batch_first=True) if needs_attention else None

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Group features (G, D) to super-features (G, D), the importance (G,) of each group, and the steps between.

        The importance is the weight with which a group's feature enters what all rows share, summing to 1: for m
        the share of channels in which the group has the maximum, for c its Q, for r its attention weight (mean
        over heads), for F the mean of the last two.
        """
        m, winner = X.max(0, keepdim=True)  # (1, D)
        Q = (X @ m.T).softmax(0)  # (G, 1), not scaled: as published
        c = Q.T @ X  # (1, D)
        details = {"max_super": m, "affinity": Q, "cross_super": c}
        if self.variant.startswith("cmax"):
            source, importance = m, winner[0].bincount(minlength=len(X)) / X.shape[1]
        else:
            source, importance = c, Q[:, 0]
        if self.stoken_refine is not None:
            source, weights = self.stoken_refine(c[None], X[None], X[None])  # (1, 1, D), (1, 1, G)
            source, importance = source[0], weights[0, 0]
            details |= {"mha_super": source, "mha_attn_weights": weights[0]}
        if self.variant == "css":
            F, importance = Q @ source + c, (Q[:, 0] + importance) / 2
        elif self.variant.endswith("_q"):
            F = Q @ source
        else:
            F = source.expand_as(X)
        return F, importance, details | {"super_features": F}
