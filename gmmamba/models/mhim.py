"""MHIM-MIL: a student learns from the patches that its teacher finds hard (Tang et al., ICCV 2023).

Shapes: N instances, D feature width, M embedding width, H heads (1 for abmil), C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models import known
from gmmamba.models.bag import Bag, MILModel, MILOutput
from gmmamba.models.initial import xavier_linears
from gmmamba.models.transmil import TransEncoder, magnitude_share

ENCODERS = ("abmil", "transmil")


class MHIM(MILModel):
    """h = Dropout(ReLU(Lin x)); z = encoder(h); logits = Lin(z).

    Trained in two stages: alone (stage=1), then (stage=2) as the student of a teacher that begins with the first
    stage's weights and follows the student's by a moving average. In each step the teacher sees the whole slide. Masked
    away from the student are patches at random, those of the teacher's lowest attention, and a part of those of its
    highest, whose share sinks to 0 over the training; the loss is CE(logits) + consistency * the cross-entropy of the
    two softmaxed features z, the teacher's at a temperature of 0.1.

    The teacher is no part of the state dict: prediction is the student's, on all patches.

    The published code gives the student's patches the order of a hash table, which its TransMIL encoder does not
    ignore; here they keep the order of the bag. Its dropout is fixed at 0.25. Where its masks together would leave no
    patch, it fails; here nothing is masked in that step.

    Args:
        in_dim: D.
        width: M; a multiple of 8 for transmil.
        encoder: abmil, h weighted by the softmax of w . ReLU(V h), or transmil, a `TransEncoder`.
        hidden: attention width of abmil.
        dropout: of the embedding, in student and teacher.
        attention_dropout: of the output of each attention of transmil.
        mask_ratio: share of the patches that is masked at random.
        mask_ratio_low: share that is masked from the lowest attention up.
        mask_ratio_high: share that is masked from the highest attention down, at the first step.
        high_drawn: what is masked of the highest are this share of them, drawn from correspondingly more.
        consistency: weight of the consistency loss.
        momentum: of the moving average.
        momentum_to_1: whether the momentum rises to 1 over the training.
        stage: 1 for the student alone, without mask and teacher.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        width: int = 512,
        encoder: str = "abmil",
        hidden: int = 128,
        dropout: float = 0.25,
        attention_dropout: float = 0.1,
        mask_ratio: float = 0.5,
        mask_ratio_low: float = 0.0,
        mask_ratio_high: float = 0.01,
        high_drawn: float = 0.5,
        consistency: float = 0.1,
        momentum: float = 0.9999,
        momentum_to_1: bool = False,
        stage: int = 2,
    ):
        super().__init__()
        known("encoder", encoder, ENCODERS)
        shares = {"mask_ratio": mask_ratio, "mask_ratio_low": mask_ratio_low, "mask_ratio_high": mask_ratio_high}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}: give a share of the patches, 0 <= {name} < 1")
        if not 0 < high_drawn <= 1:
            raise ValueError(f"high_drawn is {high_drawn}: give a share, 0 < high_drawn <= 1")
        if stage not in (1, 2):
            raise ValueError(f"stage is {stage}: give 1 or 2")
        self.width, self.stage = width, stage
        self.ratios = (mask_ratio, mask_ratio_low, mask_ratio_high, high_drawn)
        self.consistency, self.momentum, self.momentum_to_1 = consistency, momentum, momentum_to_1
        self.embed = nn.Sequential(nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout))
        if encoder == "abmil":
            self.encoder: nn.Module = ReLUAttention(width, hidden)
        else:
            self.encoder = TransEncoder(width, attention_dropout, square=False)
        self.classifier = nn.Linear(width, n_classes)
        self.teachers: list[MHIM] = []  # a list, which hides it from parameters and state dict; empty before start_from
        xavier_linears(self)

    def forward(self, bag: Bag) -> MILOutput:
        """The attention: abmil's weights; for transmil that of the first layer, by which the method itself masks, as a
        share of magnitudes (`TransMIL.forward`). The details hold `bag_feat` (1, M), and `attn_layer1` and
        `attn_layer2` (1, H, N), the class token's signed attention (for abmil twice its weights)."""
        feature, row1, row2 = self.encoder(self.embed(bag.features))
        details = {"bag_feat": feature, "attn_layer1": row1[None], "attn_layer2": row2[None]}
        return MILOutput(self.classifier(feature), magnitude_share(row1), details)

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        feature, row, _ = self.encoder(self.embed(bag.features))
        return feature, magnitude_share(row)

    def training_loss(self, bag: Bag, label: Tensor, progress: float) -> Tensor:
        """Raises RuntimeError in the second stage before `start_from`."""
        if self.stage == 1:
            return super().training_loss(bag, label, progress)
        if not self.teachers:
            raise RuntimeError("MHIM learns from a first stage: call start_from, or make it with stage=1")
        teacher = self.teachers[0].train(self.training)  # its dropout is active, as published
        with torch.no_grad():
            target, attention, _ = teacher.encoder(teacher.embed(bag.features))
        random, low, high, drawn = self.ratios
        keep = unmasked(attention, (random, low, high * half_cosine(progress), drawn))
        ce, consistency, _ = self.student_loss(bag, label, keep, target)
        return ce + self.consistency * consistency

    def student_loss(self, bag: Bag, label: Tensor, keep: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the patches `keep`, int64, in that order: cross-entropy, consistency with the teacher's feature `target`
        (1, M), and logits."""
        feature, _, _ = self.encoder(self.embed(bag.features)[keep])
        logits = self.classifier(feature)
        consistency = F.cross_entropy(feature.float(), (target.float() / 0.1).softmax(1))
        return F.cross_entropy(logits.float(), label), consistency, logits

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The teacher takes a small step towards the student."""
        momentum = 1 - (1 - self.momentum) * half_cosine(progress) if self.momentum_to_1 else self.momentum
        for teacher in self.teachers:
            for theirs, ours in zip(teacher.parameters(), self.parameters(), strict=True):
                theirs.lerp_(ours, 1 - momentum)

    def start_from(self, first: MILModel, bags: Callable[[], Iterable[Bag]]) -> None:
        """The first stage becomes the teacher, and its embedding the student's. `bags` is not needed."""
        assert isinstance(first, MHIM)
        self.embed.load_state_dict(first.embed.state_dict())
        self.teachers = [copy.deepcopy(first)]


class ReLUAttention(nn.Module):
    """sum a h, a = softmax over instances of w . ReLU(V h)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 1, bias=False))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, M) to (1, M), and twice a (1, N) without gradient: the encoders give the attention of two layers."""
        attention = self.score(h).T.softmax(1)
        return attention @ h, attention.detach(), attention.detach()


def half_cosine(progress: float) -> float:
    """From 1 at the first step to 0 after the last."""
    return (1 + math.cos(math.pi * progress)) / 2


def unmasked(
    attention: Tensor,
    ratios: tuple[float, float, float, float],
    draw: Callable[[int], Tensor] = torch.randperm,
    ranked: bool = False,
) -> Tensor:
    """The patches that the student sees, ascending int64: all but those drawn at random, of the lowest and of the
    highest attention (H, N).

    ratios: shares of the patches that are masked (random, low, high), and the share of the highest that is drawn. draw:
    gives a permutation of 0 … n - 1, on the CPU. ranked: whether it is of patches in order of their heads' votes, which
    matters to recorded draws alone.
    """
    random, low, high, drawn = ratios
    keep = torch.ones_like(attention[0], dtype=torch.bool)
    for ratio, largest, share in ((random, False, 0.001), (low, False, 1.0), (high, True, drawn)):
        if ratio > 0:
            keep[extreme(attention, ratio, largest, share, draw, ranked)] = False
    return keep.nonzero()[:, 0] if keep.any() else torch.arange(len(keep), device=keep.device)


def extreme(
    attention: Tensor, ratio: float, largest: bool, share: float, draw: Callable[[int], Tensor], ranked: bool
) -> Tensor:
    """About ratio * N patches: `share` of the ratio / share * N of largest or smallest attention, drawn at random; of
    all N where there are not so many. Over several heads, the patches that most heads would take."""
    N, wider = attention.shape[1], ratio / share
    if wider > 1:
        wider, share = 1.0, ratio
    k = math.ceil(N * wider)
    if len(attention) > 1:
        votes = torch.zeros_like(attention).scatter_(1, attention.topk(k, largest=largest).indices, 1)
        chosen = votes.sum(0).topk(k, sorted=ranked).indices  # of equal votes, any
    else:
        chosen = attention[0].topk(k, largest=largest).indices
    return chosen[draw(k)[: math.ceil(k * share)].to(chosen.device)] if share < 1 else chosen
