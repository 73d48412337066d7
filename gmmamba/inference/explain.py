"""Where a prediction comes from: what each patch and each group adds to it.

The quantity explained is the log-odds of one class, log p / (1 - p); of two classes that is the difference of their
logits.

Patch contributions are integrated gradients (Sundararajan, Taly and Yan, ICML 2017) between the slide and a slide of
the same patches in the same places, all of which have the slide's mean feature: c_i = (x_i - mean) . integral of the
gradient along the straight line between the two. They sum to the difference of log-odds between the slide and its
mean, whatever the model; how far the quadrature misses that sum is part of the result (`residual`).

Group contributions are by leaving out: the log-odds of the slide less those of the slide without the group's patches.
Each is exact, they do not sum to anything.

Shapes: N instances, D feature width, G groups, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmmamba.models.bag import Bag, MILModel


@dataclass(frozen=True)
class Contributions:
    """Patch contributions (N,) float64 to log-odds; they sum to `total` - `baseline` + `residual`.

    total: log-odds of the slide; baseline: of the slide whose patches are all its mean.
    """

    values: NDArray[np.float64]
    total: float
    baseline: float

    @property
    def residual(self) -> float:
        return float(self.values.sum()) - (self.total - self.baseline)


def log_odds(logits: Tensor, target: int) -> Tensor:
    """log p / (1 - p) of the class `target`, a scalar; logits (1, C)."""
    rest = torch.cat([logits[0, :target], logits[0, target + 1 :]])
    return logits[0, target] - rest.logsumexp(0)


def patch_contributions(model: MILModel, bag: Bag, target: int, steps: int) -> Contributions:
    """Integrated gradients of the log-odds of `target`, by Gauss-Legendre quadrature with `steps` points.

    The model is in evaluation mode, on the bag's device; bag.features is (N, D) float32. A step costs a forward and a
    backward pass.
    """
    mean = bag.features.double().mean(0, keepdim=True).to(bag.features)
    difference = bag.features - mean
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    values = torch.zeros(len(difference), dtype=torch.float64, device=difference.device)
    for node, weight in zip(nodes, weights, strict=True):
        at = (mean + difference * (node + 1) / 2).requires_grad_()
        (gradient,) = torch.autograd.grad(log_odds(model(Bag(at, bag.coords, bag.groups)).logits.double(), target), at)
        values += weight / 2 * (gradient.double() * difference.double()).sum(1)
    return Contributions(
        values.cpu().numpy(), _log_odds_of(model, bag, target),
        _log_odds_of(model, Bag(mean.expand_as(difference).contiguous(), bag.coords, bag.groups), target),
    )  # fmt: skip


@torch.no_grad()
def group_contributions(model: MILModel, bag: Bag, target: int) -> dict[int, float]:
    """By group label: the log-odds of `target` less those without the group. Empty where there is but one group."""
    if bag.groups is None:
        return {}
    labels = bag.groups.unique().tolist()
    if len(labels) < 2:
        return {}
    total, found = _log_odds_of(model, bag, target), {}
    for label in labels:
        rows = (bag.groups != label).nonzero()[:, 0]
        without = Bag(bag.features[rows], bag.coords[rows], bag.groups[rows])
        found[label] = total - _log_odds_of(model, without, target)
    return found


@torch.no_grad()
def _log_odds_of(model: MILModel, bag: Bag, target: int) -> float:
    return log_odds(model(bag).logits.double(), target).item()
