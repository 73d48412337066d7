"""Replays of the baselines that pool by attention. Each takes a case and says how its parameters are ours."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gmmamba.models.abmil import ABMIL
from gmmamba.models.bag import MILOutput
from gmmamba.verify.baselines import BaselineCase, replay_model
from gmmamba.verify.checks import Checks


def replay_abmil(case: BaselineCase) -> Checks | None:
    """Every flavour is told from the shapes: V before the optional gate U, one output for Ilse's sigmoid."""
    shapes = [tuple(shape) for _, shape, _ in case.parameters]
    (width, in_dim), bias = shapes[0], len(shapes[1]) == 1
    V, after_V = shapes[1 + bias], shapes[3 + bias]
    model = ABMIL(in_dim, shapes[-2][0], width, V[0], gated=after_V == V, bias=bias)
    if [tuple(p.shape) for p in model.parameters()] != shapes:
        return None
    published = {own: name for own, (name, _, _) in zip(model.state_dict(), case.parameters, strict=True)}
    weights = case.weights
    model.load_state_dict({own: weights[name] for own, name in published.items()})
    if shapes[-2][0] > 1:
        return replay_model(case, model, published)
    return replay_model(case, model, published, bernoulli_loss)


def bernoulli_loss(output: MILOutput, label: Tensor) -> dict[str, Tensor]:
    """Ilse et al.: negative log-likelihood with the probability clamped to [1e-5, 1 - 1e-5]."""
    p = output.logits.sigmoid()[0].clamp(1e-5, 1 - 1e-5)
    return {"loss": F.binary_cross_entropy(p, label.to(p.dtype))}
