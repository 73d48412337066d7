"""CSS as a plug-in: any method that encodes a bag, on each group, and CSS and the token classifier above (Zheng et al.,
ICCV 2025).

Shapes: N instances, G groups, M width of the host's feature, C classes.
"""

from __future__ import annotations

import torch

from gmmamba.models.bag import Bag, MILModel, MILOutput
from gmmamba.models.css import CSS
from gmmamba.models.gmmamba import TokenClassifier

HEADS = 8  # of the attention in CSS


class CSSPlugin(MILModel):
    """Each group is a bag of its own to the host; of the host, what follows its feature has no part and learns nothing.
    Trained by the cross-entropy of the new classifier.

    Args:
        host: a model with `encode` and `width`.
        published: affinity and token as published; else those of GMMamba's default, which learn surely (css.py).
    """

    def __init__(
        self,
        host: MILModel,
        n_classes: int,
        published: bool = False,
    ):
        super().__init__()
        name = type(host).__name__
        if type(host).encode is MILModel.encode:
            raise ValueError(f"{name} has no `encode`: CSS as a plug-in needs a method that gives a feature of a bag")
        if host.width % HEADS:
            raise ValueError(f"{name} has width {host.width}: CSS needs a multiple of {HEADS}")
        self.width = host.width
        self.host = host
        affinity, token = ("published", "published") if published else ("scaled", "max")
        self.css = CSS(host.width, affinity=affinity)
        self.cls = TokenClassifier(host.width, n_classes, num_layers=1, dropout=0.1, token=token)

    def forward(self, bag: Bag) -> MILOutput:
        """Any N >= 1 and any labels; a group is what shares a label, in label order, a bag without groups is one.

        The attention of an instance is the host's inside its group times the importance of the group (css.py).
        """
        labels = torch.zeros(len(bag.features)) if bag.groups is None else bag.groups
        labels = labels.to(bag.features.device)
        groups = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        encoded = [self.host.encode(Bag(bag.features[group], bag.coords[group])) for group in groups]
        features = torch.cat([feature for feature, _ in encoded])  # (G, M)
        rows, importance, details = self.css(features)
        logits, _ = self.cls(rows, features.max(0, keepdim=True).values)
        with torch.no_grad():
            attention = torch.zeros_like(bag.features[:, 0])
            for group, (_, inside), weight in zip(groups, encoded, importance, strict=True):
                attention[group] = (inside * weight).to(attention.dtype)
        return MILOutput(logits, attention, details | {"group_features": features})
