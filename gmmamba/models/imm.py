"""Intra-group masking Mamba: each group of instances becomes one feature (Zheng et al., ICCV 2025).

Shapes: N instances in packed order (groups one behind the other), G groups, D width, M instances kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models import known
from gmmamba.models.bimamba import BiMamba
from gmmamba.models.initial import xavier_linears

MASKS = ("published", "straight_through", "gated", "adaptive")
POOLINGS = ("attention", "max")
INITS = ("published", "mamba")
ROWS = 16384  # instances that go through a mixer together, unless a group has more


class IMM(nn.Module):
    """h1 = x + BiMamba1(LN x); drop the instances of lowest score; h2 = h1 + BiMamba2(LN h1); attention pooling.

    Which instances are dropped is `mask`: those of the lowest score s of a head, p = softmax of s over the n instances
    of the group. By a hard choice alone no gradient reaches that head: the published one stays the random projection
    that it began as. The others, ours, add to each score a of the attention pooling a term that teaches the head; it
    begins with s = 0 everywhere.

        published         the max(1, floor(M_r n)) instances of lowest p
        straight_through  the same; a + s - stop(s): the same values, and s learns what the pooling wants of a
        gated             the same; a + log sigmoid(s): the head's gate weighs what is kept (as in gPool, Gao and Ji,
                          ICML 2019)
        adaptive          those with p < M_r / n, none at first, many where the head is sure; a + s - stop(s)
        None              none

    With pooling "max" there is one BiMamba and no mask, and a group's feature is the maximum over its LN h1 (the
    poster's BMP and LG-BMP).

    `_fc1` projects features of another width; it exists but is not used where in_dim == width, as published.
    """

    def __init__(
        self,
        in_dim: int,
        width: int,
        d_state: int,
        mask: str | None,
        mask_ratio: float,
        pooling: str,
        init: str,
        scan: str,
    ):
        super().__init__()
        if mask is not None:
            known("mask", mask, MASKS)
        known("pooling", pooling, POOLINGS)
        known("init", init, INITS)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}: give a share of the instances, 0 <= mask_ratio < 1")
        self.project = in_dim != width
        self.mask, self.mask_ratio = mask, mask_ratio
        self._fc1 = nn.Sequential(nn.Linear(in_dim, width), nn.GELU(), nn.Dropout(0.25))
        self.norm = nn.LayerNorm(width)
        self.BiMamba1 = nn.ModuleList([nn.LayerNorm(width), BiMamba(width, d_state, scan=scan)])
        attend = pooling == "attention"
        self.mask_attention = score_head(width) if attend and mask else None
        self.BiMamba2 = nn.ModuleList([nn.LayerNorm(width), BiMamba(width, d_state, scan=scan)]) if attend else None
        self.group_ins_attention = score_head(width) if attend else None
        # The published initialisation reaches into the mixers: it overwrites W_dt and sets b_dt = 0.
        xavier_linears(self, spare=() if init == "published" else (BiMamba,))
        if self.mask_attention is not None and mask != "published":
            nn.init.zeros_(self.mask_attention[2].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Instances (N, in_dim) of groups of `sizes` (G,) to group features (G, D) and what led there.

        The details hold `keep` (N,) bool and `ins_attn` (M,), the weights of the kept instances, which sum to 1 in
        each group, besides h1 (N, D), h2 (M, D), mask_logits (N,) and mask_scores (N,).
        """
        if self.project:
            x = self._fc1(x)
        group = torch.repeat_interleave(sizes)
        members = group == torch.arange(len(sizes), device=x.device)[:, None]  # (G, N)
        h1 = residual(self.BiMamba1, x, sizes)
        h = self.norm(h1)
        details = {"h1": h1, "keep": torch.ones_like(group, dtype=torch.bool)}
        if self.BiMamba2 is None or self.group_ins_attention is None:
            features, attention = max_pool(h, sizes)
            return features, details | {"ins_attn": attention}

        kept, taught = h1, None
        if self.mask_attention is not None:
            logits = self.mask_attention(h).squeeze(1)
            p = logits.where(members, -torch.inf).softmax(1).sum(0)
            if self.mask == "adaptive":
                keep = p.detach() * sizes[group] >= self.mask_ratio  # true for a group's highest
            else:
                keep = keep_highest(logits.detach(), group, sizes, self.mask_ratio)
            if self.mask == "gated":
                taught = F.logsigmoid(logits[keep])
            elif self.mask != "published":
                taught = (logits - logits.detach())[keep]
            kept, members = h1[keep], members[:, keep]
            details |= {"keep": keep, "mask_logits": logits, "mask_scores": p}
        h2 = residual(self.BiMamba2, kept, members.sum(1))
        h = self.norm(h2)
        scores = self.group_ins_attention(h).squeeze(1)
        scores = scores if taught is None else scores + taught
        attention = scores.where(members, -torch.inf).softmax(1)  # (G, M), zero outside the group
        details |= {"h2": h2, "ins_attn": attention.sum(0)}
        return attention @ h, details


def score_head(width: int) -> nn.Sequential:
    """Lin(tanh(Lin(x))): one score an instance; 128 hidden units at width 512."""
    return nn.Sequential(nn.Linear(width, width // 4), nn.Tanh(), nn.Linear(width // 4, 1))


def residual(norm_and_mixer: nn.ModuleList, x: Tensor, sizes: Tensor) -> Tensor:
    """x + BiMamba(LN x), a few groups at a time: the inner activations of a whole slide would not fit a laptop."""
    norm, mixer = norm_and_mixer
    parts = []
    for some in runs_of_groups(sizes.tolist(), ROWS):
        part, x = x.split([sum(some), len(x) - sum(some)])
        parts.append(part + mixer(norm(part), torch.tensor(some, device=x.device)))
    return torch.cat(parts)


def runs_of_groups(sizes: list[int], most: int) -> Iterator[list[int]]:
    """The sizes in runs that sum to at most `most`, or are one group."""
    run: list[int] = []
    for size in sizes:
        if run and sum(run) + size > most:
            yield run
            run = []
        run.append(size)
    yield run


def keep_highest(scores: Tensor, group: Tensor, sizes: Tensor, mask_ratio: float) -> Tensor:
    """(N,) bool: false for the max(1, floor(M_r n)) instances of lowest score of each group of n.

    As published, at least one instance goes even for M_r = 0; unlike published, the last one of a group stays.
    """
    by_score = scores.argsort(stable=True)
    order = by_score[group[by_score].argsort(stable=True)]  # group after group, lowest score first
    rank = torch.arange(len(scores), device=scores.device) - (sizes.cumsum(0) - sizes)[group]
    dropped = (sizes.double() * mask_ratio).long().clamp(min=1).minimum(sizes - 1)
    keep = torch.empty_like(group, dtype=torch.bool)
    keep[order] = rank >= dropped[group]
    return keep


def max_pool(h: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the instances of each group (G, D), and the share of channels that each instance decided (N,)."""
    pooled, shares = [], []
    for rows in h.split(sizes.tolist()):
        highest, winner = rows.max(0)
        pooled.append(highest)
        shares.append(winner.bincount(minlength=len(rows)) / h.shape[1])
    return torch.stack(pooled), torch.cat(shares)
