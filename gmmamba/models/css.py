"""Cross-group super-feature sampling: what the groups say together, written back to each (Zheng et al., ICCV 2025).

Shapes: G groups, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from gmmamba.models import known

VARIANTS = ("cmax", "cmax_q", "cca", "cca_q", "cmha", "cmha_q", "css")
AFFINITIES = ("published", "scaled")


class CSS(nn.Module):
    """m = max over groups; Q = softmax over groups of X m^T; c = Q^T X; r = attention of c to X; F = Q r + c.

    The variants of the poster's table: cmax is m, cca is c, cmha is r, each broadcast to all groups, or times Q
    (`…_q`); css is F.

    The affinity X m^T of rows that a LayerNorm made is in the hundreds, so the published Q is one-hot from the first
    step: c is one group, the others are lost, and a saturated softmax has no gradient. Affinity "scaled" is X m^T / D,
    for such rows about the cosine between a group and m, of which Q makes a mean with learnable weights.
    """

    def __init__(self, width: int, variant: str = "css", affinity: str = "published"):
        super().__init__()
        self.variant = known("css variant", variant, VARIANTS)
        self.scale = 1.0 if known("affinity", affinity, AFFINITIES) == "published" else 1 / width
        needs_attention = variant.startswith("cmha") or variant == "css"
        self.stoken_refine = nn.MultiheadAttention(width, 8, bias=False, batch_first=True) if needs_attention else None

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Group features (G, D) to super-features (G, D), the importance (G,) of each group, and the steps between.

        The importance is the weight with which a group's feature enters what all rows share, summing to 1: for m
        the share of channels in which the group has the maximum, for c its Q, for r its attention weight (mean
        over heads), for F the mean of the last two.
        """
        m, winner = X.max(0, keepdim=True)  # (1, D)
        Q = (self.scale * X @ m.T).softmax(0)  # (G, 1)
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
