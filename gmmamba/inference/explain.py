"""Where a prediction comes from: what each patch and each group adds to it.

The quantity explained is the log-odds of one class, log p / (1 - p); of two classes that is the difference of their
logits.

Patch contributions are integrated gradients (Sundararajan, Taly and Yan, ICML 2017) between the slide and a slide all
of whose patches are its mean patch: c_i = (x_i - mean) . integral of the gradient along the straight line between the
two. They sum to the difference of the log-odds of slide and mean patch; how far the quadrature misses that sum is part
of the result (`residual`). What x_i is depends on the model:

  GMMamba      the instance as the last attention pooling sees it, with the attention of the prediction held: what a
               patch adds by what was made of it, masked ones nothing. The features themselves would not do: the scans
               carry a patch along to its neighbours, and the credit with it.
  all others   the patch's features. Also GMMamba with pooling "max", which has no attention to hold.

Evidence is what the model says of each patch alone: the log-odds of a slide that has only this one. Exact, for every
model alike, and it sums to nothing: many patches may say the same.

Group contributions are by leaving out: the log-odds of the slide less those of the slide without the group's patches.
Each is exact, they do not sum to anything.

Shapes: N instances, M of them kept, G groups, D feature or model width, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gmmamba.models.bag import Bag, MILModel, MILOutput
from gmmamba.models.gmmamba import GMMamba

STEPS = 16  # points of the quadrature
SLOW = 5.0  # seconds without an end after which evidence shows how far it is, inside the bar of slides
TOGETHER = 1024  # patches whose evidence is found at once: memory grows with the square


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


def mean_attention(attentions: Sequence[Tensor | None]) -> NDArray[np.float64] | None:
    """(N,), the mean over models of their attention (N,), each summing to 1; None where one has none."""
    found = [attention.double().cpu().numpy() for attention in attentions if attention is not None]
    if len(found) < len(attentions):
        return None
    return np.mean([attention / attention.sum() for attention in found], axis=0)


def log_odds(logits: Tensor, target: int) -> Tensor:
    """log p / (1 - p) of the class `target`, a scalar; logits (1, C)."""
    rest = torch.cat([logits[0, :target], logits[0, target + 1 :]])
    return logits[0, target] - rest.logsumexp(0)


def patch_contributions(model: MILModel, bag: Bag, output: MILOutput, target: int, steps: int = STEPS) -> Contributions:
    """Contributions of the patches to the log-odds of `target`, by Gauss-Legendre quadrature with `steps` points.

    The model is in evaluation mode, on the bag's device; bag.features is (N, D) float32; `output` is what the model
    said of the bag.
    """
    if isinstance(model, GMMamba) and model.imm.group_ins_attention is not None:
        return _of_instances(model, output, target, steps)

    def odds(features: Tensor) -> Tensor:
        return log_odds(model(Bag(features, bag.coords, bag.groups)).logits.double(), target)

    start = bag.features.double().mean(0, keepdim=True).to(bag.features)
    gradient, baseline = _integrated_gradient(odds, start.expand_as(bag.features), bag.features, steps)
    values = (gradient * (bag.features - start).double()).sum(1)
    return Contributions(values.cpu().numpy(), _log_odds_of(output, target), baseline)


def _of_instances(model: GMMamba, output: MILOutput, target: int, steps: int) -> Contributions:
    """Group features are the means of h, weighted by attention, so credit of a group's feature is that of its h."""
    details = output.details
    keep, sizes, attention = details["keep"], details["group_sizes"], details["ins_attn"].detach()
    group = torch.repeat_interleave(sizes)[keep]
    with torch.no_grad():
        h = model.imm.norm(details["h2"]).double()  # (M, D)
    features = details["group_features"].detach()  # (G, D)

    def odds(rows: Tensor) -> Tensor:
        strongest = rows.max(0, keepdim=True).values
        logits, _ = model.cls(rows if model.css is None else model.css(rows)[0], strongest)
        return log_odds(logits.double(), target)

    mean = h.mean(0, keepdim=True)
    gradient, baseline = _integrated_gradient(odds, mean.to(features).expand_as(features), features, steps)
    values = torch.zeros(len(keep), dtype=torch.float64, device=h.device)
    values[details["order"][keep]] = attention.double() * ((h - mean) * gradient[group]).sum(1)
    return Contributions(values.cpu().numpy(), _log_odds_of(output, target), baseline)


def _integrated_gradient(
    odds: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, steps: int
) -> tuple[Tensor, float]:
    """The mean gradient of `odds`, float64, between two tensors of one shape, and its value at the start."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(end, dtype=torch.float64)
    for node, weight in zip(nodes, weights, strict=True):
        at = (start + (end - start) * (node + 1) / 2).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(odds(at), at)
        total += weight / 2 * gradient.double()
    with torch.no_grad():
        return total, odds(start.contiguous()).item()


@torch.no_grad()
def patch_evidence(model: MILModel, bag: Bag, target: int) -> NDArray[np.float64]:
    """(N,): the log-odds of `target` of a slide that has only this patch; model and bag as above."""
    if isinstance(model, GMMamba):
        return _evidence_in_groups_of_one(model, bag, target)
    alone = bag.groups is not None
    found = []
    for i in tqdm(range(len(bag.features)), "evidence", unit="patch", leave=False, disable=None, delay=SLOW):
        groups = torch.zeros(1, dtype=torch.long, device=bag.features.device) if alone else None
        found.append(
            log_odds(model(Bag(bag.features[i : i + 1], bag.coords[i : i + 1], groups)).logits.double(), target)
        )
    return torch.stack(found).cpu().numpy()


def _evidence_in_groups_of_one(model: GMMamba, bag: Bag, target: int) -> NDArray[np.float64]:
    """A group is a sequence of its own: as many slides of one patch as fit go through the scans together."""
    found = []
    with tqdm(total=len(bag.features), desc="evidence", unit="patch", leave=False, disable=None, delay=SLOW) as bar:
        for some in bag.features.split(TOGETHER):
            rows, _ = model.imm(some, torch.ones(len(some), dtype=torch.long, device=some.device))
            for row in rows.split(1):
                logits, _ = model.cls(row if model.css is None else model.css(row)[0], row)
                found.append(log_odds(logits.double(), target))
                bar.update()
    return torch.stack(found).cpu().numpy()


@torch.no_grad()
def group_contributions(model: MILModel, bag: Bag, target: int) -> dict[int, float]:
    """By group label: the log-odds of `target` less those without the group. Empty where there is but one group."""
    if bag.groups is None:
        return {}
    labels = bag.groups.unique().tolist()
    if len(labels) < 2:
        return {}

    def odds(rows: Tensor) -> float:
        return _log_odds_of(model(Bag(bag.features[rows], bag.coords[rows], groups[rows])), target)

    groups, found = bag.groups, {}
    total = odds(torch.arange(len(groups), device=groups.device))
    for label in labels:
        found[label] = total - odds((groups != label).nonzero()[:, 0])
    return found


def _log_odds_of(output: MILOutput, target: int) -> float:
    return log_odds(output.logits.detach().double(), target).item()
