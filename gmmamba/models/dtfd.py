"""DTFD-MIL: a slide as several pseudo-bags, pooled, and their distilled instances pooled again (Zhang et al., CVPR
2022).

Shapes: N instances, D feature width, M embedding width, L attention width, C classes, G pseudo-bags, k instances of
each end of a pseudo-bag, R distilled rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gmmamba.models import known
from gmmamba.models.abmil import GatedAttention
from gmmamba.models.bag import Bag, MILModel, MILOutput

DISTILLATIONS = ("MaxMinS", "AFS", "MaxS")


class DTFD(MILModel):
    """Tier 1 pools each of G random pseudo-bags by attention and classifies it as the slide. It hands on distilled
    rows: its feature (AFS), or the embeddings of the k instances that speak most for the last class (MaxS), with the
    k that do least (MaxMinS). Tier 2 pools the rows by attention and classifies the slide.

    The tiers learn in one step here. The published two optimizers wipe the gradient of the second loss into tier 1
    before any step, so that tier 1 learns from its own loss alone: detaching the distilled rows is the same. (In the
    published order AFS fails on current torch.) Published training clips each tier's gradient to the norm 5; that is
    the training's affair.

    Two traps of the published code are avoided. Its predictions depend on the random pseudo-bags; here they are
    means over `inference_splits` splits drawn from seeds of their own, always the same, and the global random state
    is left alone. And its threshold is tuned on the slides that are tested; here the most probable class is predicted.
    A slide of fewer than G patches has a pseudo-bag a patch.

    Args:
        in_dim: D.
        distill: "MaxMinS", "AFS" or "MaxS".
        width: M.
        hidden: L.
        pseudo_bags: G.
        instances: k; a pseudo-bag of fewer gives all, and one of fewer than 2k some of them twice (MaxMinS).
        inference_splits: splits into pseudo-bags over which a prediction is averaged.
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        distill: str = "MaxMinS",
        width: int = 512,
        hidden: int = 128,
        pseudo_bags: int = 4,
        instances: int = 1,
        inference_splits: int = 5,
    ):
        super().__init__()
        self.distill = known("distill", distill, DISTILLATIONS)
        self.width, self.pseudo_bags, self.instances = width, pseudo_bags, instances
        self.inference_splits = inference_splits
        self.embed = nn.Sequential(nn.Linear(in_dim, width, bias=False), nn.ReLU())
        self.attention = GatedAttention(width, hidden)
        self.classifier = nn.Linear(width, n_classes)
        parts = {"attention": GatedAttention(width, hidden), "classifier": nn.Linear(width, n_classes)}
        self.tier2 = nn.ModuleDict(parts)  # one part of the model: published training clips its gradient as one

    def forward(self, bag: Bag) -> MILOutput:
        """The logits are the log of the mean probability over the splits. The pseudo-bags are drawn by the patches'
        places in the bag, so that another order of the same patches gives slightly other logits.

        The attention is the weight that an instance has in tier 2: of a distilled one tier 2's attention to it; for
        AFS tier 2's attention to its pseudo-bag times tier 1's to it. Mean over the splits.
        """
        splits = self.fixed_splits(bag)
        probabilities = torch.cat([split["logits"] for split in splits]).log_softmax(1)
        return MILOutput(probabilities.logsumexp(0, keepdim=True) - math.log(len(splits)), mean_attention(splits))

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """Tier 2's feature: of one random split in training, else the mean over those of `forward`."""
        N = len(bag.features)
        splits = [self.split(*self.embed_bag(bag), torch.randperm(N))] if self.training else self.fixed_splits(bag)
        return torch.stack([split["feature"] for split in splits]).mean(0), mean_attention(splits)

    def fixed_splits(self, bag: Bag) -> list[dict[str, Tensor]]:
        """What `split` gives for the splits of prediction."""
        h, scores = self.embed_bag(bag)
        generators = (torch.Generator().manual_seed(seed) for seed in range(self.inference_splits))
        return [self.split(h, scores, torch.randperm(len(h), generator=generator)) for generator in generators]

    def embed_bag(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """h (N, M), and tier 1's scores before softmax (N,)."""
        h = self.embed(bag.features)
        return h, self.attention(h)[0]

    def split(self, h: Tensor, scores: Tensor, order: Tensor, detach: bool = False) -> dict[str, Tensor]:
        """Both tiers on the pseudo-bags into which `order`, a permutation of the N instances, is cut.

        `sub_logits` (G, C) of tier 1, `pseudo_feat` (R, M), the distilled rows, and unless AFS `selected_idx` (R,),
        whose they are; `feature` (1, M), `logits` (1, C) and `attention` (N,) of tier 2, which sends no gradient
        into tier 1 if `detach`.
        """
        order = order.to(h.device)
        members = order.tensor_split(min(self.pseudo_bags, len(order)))
        inside = [scores[own].softmax(0) for own in members]
        weighted = [a[:, None] * h[own] for a, own in zip(inside, members, strict=True)]
        features = torch.stack([t.sum(0) for t in weighted])  # (G, M)
        if self.distill == "AFS":
            rows, selected = features, None
        else:
            selected = torch.cat([self.select(t, own) for t, own in zip(weighted, members, strict=True)])
            rows = h[selected]
        if detach:
            rows = rows.detach()
        outer = self.tier2["attention"](rows).softmax(1)  # (1, R)
        feature = outer @ rows
        values = {"sub_logits": self.classifier(features), "pseudo_feat": rows, "feature": feature}
        values["logits"] = self.tier2["classifier"](feature)
        with torch.no_grad():
            attention = torch.zeros_like(scores, dtype=outer.dtype)
            if selected is None:
                in_order = torch.cat([a * share for a, share in zip(inside, outer[0], strict=True)])
                values["attention"] = attention.index_add(0, order, in_order.to(attention))
            else:
                values["attention"] = attention.index_add(0, selected, outer[0])
                values["selected_idx"] = selected
        return values

    @torch.no_grad()
    def select(self, weighted: Tensor, members: Tensor) -> Tensor:
        """Which of `members` (n,) the class activation distils: the highest k, most probable first, then the lowest.

        weighted: (n, M), the summands of the pseudo-bag's feature. As published, classified without bias, and ranked
        by the probability of the last class, however many there are.
        """
        activation = weighted @ self.classifier.weight.T  # (n, C)
        ranked = members[activation.softmax(1)[:, -1].argsort(descending=True)]
        highest, lowest = ranked[: self.instances], ranked[-self.instances :]
        return torch.cat([highest, lowest]) if self.distill == "MaxMinS" else highest

    def training_loss(self, bag: Bag, label: Tensor, progress: float) -> Tensor:
        """On one random split."""
        order = torch.randperm(len(bag.features))
        return self.losses(self.split(*self.embed_bag(bag), order, detach=True), label)["loss"]

    def losses(self, split: Mapping[str, Tensor], label: Tensor) -> dict[str, Tensor]:
        """`loss` and its parts, `loss_tier1`, the mean over the pseudo-bags, and `loss_tier2`."""
        tier1 = cross_entropy(split["sub_logits"].float(), label.expand(len(split["sub_logits"])))
        tier2 = cross_entropy(split["logits"].float(), label)
        return {"loss": tier1 + tier2, "loss_tier1": tier1, "loss_tier2": tier2}


def mean_attention(splits: Sequence[Mapping[str, Tensor]]) -> Tensor:
    return torch.stack([split["attention"] for split in splits]).mean(0)
