"""GMMamba (Zheng et al., ICCV 2025): groups of patches -> IMM -> CSS -> class-token classifier.

Shapes: N instances, G groups, M instances that the mask kept, D width, C classes. Batch = one slide.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gmmamba.models import known
from gmmamba.models.bag import Bag, MILModel, MILOutput
from gmmamba.models.css import CSS
from gmmamba.models.imm import IMM

PUBLISHED: dict[str, Any] = {
    "mask": "published",
    "init": "published",
    "affinity": "published",
    "token": "published",
    "instance_dropout": 0.0,
}
"""What makes GMMamba the published one, to the last digit; its defaults otherwise are those that learn surely."""
TOKENS = ("published", "max")


class GMMamba(MILModel):
    """The whole model, with the published sizes and names of parameters. GMMamba(…, **PUBLISHED) is the published one.

    Args:
        in_dim: width of the features; another than `width` enters through Lin + GELU + Dropout(0.25).
        width: D of the model. The classifier's attention keeps 8 heads of 64 for every width.
        d_state: S of the selective scan.
        mask: one of imm.MASKS, or None to drop nothing.
        mask_ratio: M_r, the share of each group's instances that the mask drops.
        pooling: "attention", or "max" for one BiMamba and max-pooling in each group (BMP, LG-BMP).
        css: one of css.VARIANTS, or None: the classifier sees the group features.
        affinity: between groups and max super-feature in CSS, "published" or "scaled" (css.py says why).
        token: "published", a learned class token of N(0, 1); "max", one of N(0, 0.02²) to which the max super-feature
            is added, so that the strongest group has a short way to the logits.
        instance_dropout: share of the instances that a training step leaves out at random.
        num_layers: attention layers of the classifier.
        dropout: of the classifier's attention weights and output projection.
        init: "published", or "mamba": the mixers keep Mamba's own initialisation.
        scan: backend of the selective scan, see scan.py.

    The poster's ablation rows: BMP is pooling "max", css None and a bag without groups; LG-BMP the same with groups;
    w/o masking is mask None, css None; w IMM is css None; w CSS is mask None.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        width: int = 512,
        d_state: int = 16,
        mask: str | None = None,
        mask_ratio: float = 0.3,
        pooling: str = "attention",
        css: str | None = "css",
        affinity: str = "scaled",
        token: str = "max",
        instance_dropout: float = 0.5,
        num_layers: int = 1,
        dropout: float = 0.1,
        init: str = "mamba",
        scan: str = "auto",
    ):
        super().__init__()
        self.imm = IMM(in_dim, width, d_state, mask, mask_ratio, pooling, init, scan)
        self.css = None if css is None else CSS(width, css, affinity)
        self.cls = TokenClassifier(width, n_classes, num_layers, dropout, token)
        if not 0 <= instance_dropout < 1:
            raise ValueError(f"instance_dropout is {instance_dropout}: give a share, 0 <= instance_dropout < 1")
        self.instance_dropout = instance_dropout

    def forward(self, bag: Bag) -> MILOutput:
        """Any N >= 1 and any labels; a group is what shares a label, groups in label order, instances in bag order.

        The attention of an instance is its weight inside its group (step 5 of the IMM; for pooling "max" the share
        of channels in which it has the maximum) times the importance of its group: the one that CSS documents, or
        without CSS the class token's attention to the group (last layer, mean over heads, the token's attention to
        itself left out). 0 for masked instances. Details by instance are in the order of `order`.
        """
        labels = torch.zeros(len(bag.features), dtype=torch.long) if bag.groups is None else bag.groups
        labels = labels.to(bag.features.device)
        order = labels.argsort(stable=True)
        if self.training and self.instance_dropout:
            n = math.ceil(len(order) * (1 - self.instance_dropout))
            order = order[torch.randperm(len(order), device=order.device)[:n].sort().values]
        _, sizes = labels[order].unique(return_counts=True)
        features, details = self.imm(bag.features.index_select(0, order), sizes)
        details |= {"order": order, "group_sizes": sizes, "group_features": features}
        strongest, importance = features.max(0, keepdim=True).values, None
        if self.css is not None:
            features, importance, steps = self.css(features)
            details |= steps
        logits, token_attention = self.cls(features, strongest)
        importance = token_attention if importance is None else importance
        keep = details["keep"]
        with torch.no_grad():
            group = torch.repeat_interleave(sizes)[keep]
            attention = torch.zeros_like(bag.features[:, 0])
            attention[order[keep]] = (details["ins_attn"] * importance[group]).to(attention.dtype)
        return MILOutput(logits, attention, details)


class TokenClassifier(nn.Module):
    """A class token before the rows, `num_layers` of x + Attention(x), logits of the token (section 5)."""

    def __init__(self, width: int, n_classes: int, num_layers: int, dropout: float, token: str):
        super().__init__()
        self.from_max = known("token", token, TOKENS) == "max"
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * (0.02 if self.from_max else 1.0))
        # The nesting only spells the published names: GroupsSuper_Layer.0.AttenLayer.attn.to_qkv.weight
        self.GroupsSuper_Layer = nn.ModuleList(
            nn.ModuleDict({"AttenLayer": nn.ModuleDict({"attn": Attention(width, dropout)})}) for _ in range(num_layers)
        )
        self.fc2 = nn.Linear(width, n_classes)

    def forward(self, rows: Tensor, strongest: Tensor) -> tuple[Tensor, Tensor]:
        """(G, D) and the maximum over group features (1, D) to logits (1, C) and the last layer's attention of the
        token to each row (G,), summing to 1."""
        token = self.cls_token[0] + strongest if self.from_max else self.cls_token[0]
        x = torch.cat([token, rows])  # (1 + G, D)
        for layer in self.GroupsSuper_Layer:
            out, weights = layer["AttenLayer"]["attn"](x)  # type: ignore[index]
            x = x + out
        to_rows = weights[:, 0, 1:].mean(0)
        return self.fc2(x[:1]), to_rows / to_rows.sum()


class Attention(nn.Module):
    """Self-attention of 8 heads of 64; qkv without bias, scale 1/8."""

    heads, head_dim = 8, 64

    def __init__(self, width: int, dropout: float):
        super().__init__()
        inner = self.heads * self.head_dim
        self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(L, D) to (L, D) and the attention weights (heads, L, L)."""
        q, k, v = self.to_qkv(x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # (heads, L, 64) each
        weights = (q @ k.mT * self.head_dim**-0.5).softmax(-1)
        out = self.dropout(weights) @ v
        return self.to_out(out.transpose(0, 1).flatten(1)), weights
