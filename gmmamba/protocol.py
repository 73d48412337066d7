"""How a model is trained: the settings, the optimizer and its learning rate, which epoch is kept.

The defaults are the published protocol of GMMamba; the others are what the published protocols of the methods it is
compared with need (`official` in config/models.yaml).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from gmmamba.metrics import selection_score
from gmmamba.models import known

OPTIMIZERS = ("adamw", "adam", "lookahead_radam", "lookahead_adam")
SCHEDULES = ("constant", "cosine", "cosine_epochs", "step")
SELECTIONS = ("f1_auroc", "auroc", "loss", "last")


@dataclass(frozen=True)
class TrainingSettings:
    """One slide at a time; the learning rate falls from `learning_rate` to `end_rate`.

    optimizer     adam adds the weight decay to the gradient, the others to the weights; lookahead_: look_ahead below
    decay_vectors whether weight decay is for parameters of one dimension (biases, norms), too
    schedule      constant; cosine: half a cosine over all steps; cosine_epochs: the same, a value an epoch;
                  step: learning_rate for the first half of the epochs, then end_rate
    balanced      an epoch draws as many slides as there are, with replacement, each class as often as the others
    accumulation  slides whose mean gradient makes one step of the optimizer
    clip_norm     largest gradient norm of each part of the model (each of its direct modules), or None
    selection     which epoch is kept by its validation slides: highest F1 + AUROC, highest AUROC, lowest loss, or the
                  last one whatever they say
    select_after  the first epochs whose weights are never kept
    patience      epochs without a better validation score after which training stops,
    min_epochs    though not before this many are done and one more
    precision     bf16: matrix products of training in bfloat16; validation and prediction are always fp32
    """

    epochs: int = 100
    optimizer: Literal["adamw", "adam", "lookahead_radam", "lookahead_adam"] = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-5
    decay_vectors: bool = True
    schedule: Literal["constant", "cosine", "cosine_epochs", "step"] = "constant"
    end_rate: float = 0.0
    balanced: bool = False
    accumulation: int = 1
    clip_norm: float | None = None
    selection: Literal["f1_auroc", "auroc", "loss", "last"] = "f1_auroc"
    select_after: int = 5
    patience: int = 20
    min_epochs: int = 50
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        known("training.optimizer", self.optimizer, OPTIMIZERS)
        known("training.schedule", self.schedule, SCHEDULES)
        known("training.selection", self.selection, SELECTIONS)
        if self.epochs <= self.select_after:
            raise ValueError(
                f"training.epochs {self.epochs} must be above training.select_after {self.select_after}: no epoch "
                f"could be kept; raise epochs"
            )

    def rate_at(self, epoch: int, progress: float) -> float:
        """The learning rate. Epochs count from 1; progress: share of all training steps that are done."""
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "step":
            return self.learning_rate if 2 * (epoch - 1) < self.epochs else self.end_rate
        done = progress if self.schedule == "cosine" else (epoch - 1) / self.epochs
        return self.end_rate + (self.learning_rate - self.end_rate) * (1 + math.cos(math.pi * done)) / 2

    def score(self, epoch: int, metrics: dict[str, float], loss: float, n_classes: int) -> float:
        """What the kept epoch maximises, from the metrics (gmmamba.metrics) and the loss of its validation slides."""
        if self.selection == "f1_auroc":
            return selection_score(metrics, n_classes)
        return {"auroc": metrics["auroc"], "loss": -loss, "last": float(epoch)}[self.selection]


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> Optimizer:
    """The optimizer of all parameters of `model` that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if settings.decay_vectors or p.ndim > 1]},
        {"params": [p for p in trained if not settings.decay_vectors and p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate, (beta1, beta2), decay = settings.learning_rate, settings.betas, settings.weight_decay
    betas = beta1, beta2  # a list in JSON
    optimizer: Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, fused=True)
    elif settings.optimizer == "lookahead_radam":
        optimizer = torch.optim.RAdam(groups, lr=rate, betas=betas, weight_decay=decay, decoupled_weight_decay=True)
    else:
        optimizer = torch.optim.Adam(groups, lr=rate, betas=betas, weight_decay=decay, fused=True)
    if settings.optimizer.startswith("lookahead"):
        look_ahead(optimizer)
    return optimizer


def look_ahead(optimizer: Optimizer, every: int = 6, share: float = 0.5) -> None:
    """Lookahead (Zhang et al., NeurIPS 2019): after each `every` steps of `optimizer`, slow weights go this share of
    the way to the weights that it reached, and it goes on from there."""
    fast = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slow = [parameter.detach().clone() for parameter in fast]
    steps = count(1)

    @torch.no_grad()
    def pull_back(*_: object) -> None:
        if next(steps) % every == 0:
            for behind, ahead in zip(slow, fast, strict=True):
                ahead.copy_(behind.lerp_(ahead, share))

    optimizer.register_step_post_hook(pull_back)


def clip_gradients(model: nn.Module, norm: float) -> None:
    """Scale down the gradient of each direct module of `model` whose norm is above `norm`; parameters of its own count
    as one more."""
    parts: Iterator[list[nn.Parameter]] = (list(child.parameters()) for child in model.children())
    for part in (*parts, list(model.parameters(recurse=False))):
        nn.utils.clip_grad_norm_(part, norm)


class BestEpoch:
    """Which epoch is kept, and when to stop. Epochs count from 1.

    epoch, score, loss: the kept one's; epoch is 0 before any was eligible. first: the earliest of that score, from
    which patience counts.
    """

    def __init__(self, select_after: int, patience: int, min_epochs: int) -> None:
        self.select_after, self.patience, self.min_epochs = select_after, patience, min_epochs
        self.epoch, self.score, self.loss, self.first = 0, -np.inf, np.inf, 0

    def update(self, epoch: int, score: float, loss: float) -> bool:
        """Take in the validation score and loss of `epoch`; True where it is the best so far.

        Of equal scores, the usual case where few slides validate, the one of lower loss is better.
        """
        if epoch <= self.select_after or (score, -loss) <= (self.score, -self.loss):
            return False
        if score > self.score:
            self.first = epoch
        self.epoch, self.score, self.loss = epoch, score, loss
        return True

    def should_stop(self, epoch: int) -> bool:
        """Whether training ends after `epoch`."""
        return epoch > self.min_epochs and epoch - max(self.first, self.select_after) >= self.patience
