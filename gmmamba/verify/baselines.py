"""What the cases of all baselines share: weights and bags by rule, and the checks of a whole model
(reference/baselines/README.md)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models.bag import Bag, MILOutput
from gmmamba.verify.checks import Array, Check, Checks, relative_error, step_bias


@dataclass
class BaselineCase:
    """One case of baselines/<method>/index.json; see the README there."""

    spec: dict[str, Any]
    parameters: list[tuple[str, list[int], str]]
    """Published name, shape and kind of each."""
    reference: dict[str, Array]

    @staticmethod
    def read(folder: Path, spec: dict[str, Any], parameters: dict[str, Any]) -> BaselineCase:
        own = parameters[spec["parameters"]] if spec["parameters"] else []  # a unit may have none
        return BaselineCase(spec, own, dict(np.load(folder / spec["file"])))

    @property
    def features(self) -> Tensor:
        """(N, D) by the input rule."""
        N, D = self.spec["N"], self.spec["D"]
        return torch.from_numpy(np.random.RandomState(1000003 * N + D).standard_normal((N, D)).astype(np.float32))

    @property
    def weights(self) -> dict[str, Tensor]:
        """By published name, by the weight rule."""
        return {name: baseline_weight(name, shape, kind, self.spec["seed"]) for name, shape, kind in self.parameters}


def baseline_weight(name: str, shape: list[int], kind: str, seed: int) -> Tensor:
    """The weight rule of baselines/README.md."""
    rs = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    z = rs.standard_normal(shape)
    rules: dict[str, Callable[[], Array]] = {
        "gain": lambda: 1 + 0.1 * z,
        "matrix": lambda: z * np.sqrt(2 / (shape[0] + shape[1])),
        "kernel": lambda: rs.uniform(-0.5, 0.5, shape) / np.sqrt(np.prod(shape[1:])),
        "vector": lambda: 0.05 * z,
        "token": lambda: 0.5 * z,
        "A_log": lambda: np.log(np.arange(1, shape[1] + 1)) + 0.1 * z,
        "mamba_D": lambda: 1 + 0.2 * z,
        "dt_bias": lambda: step_bias(rs, tuple(shape)),
        "log_dt": lambda: rs.uniform(np.log(0.001), np.log(0.1), shape),
        "s4_C": lambda: z * np.sqrt(0.5),
        "log_A_real": lambda: np.log(0.5) + 0.1 * z,
        "A_imag": lambda: np.pi * np.arange(shape[1]) + 0.1 * z,
        "s4_D": lambda: z,
    }
    return torch.tensor(rules[kind](), dtype=torch.float32)


Losses = Callable[[MILOutput, Tensor], dict[str, Tensor]]
"""The `loss` of a model's output for a label (1,), and its published parts by name."""


def cross_entropy_loss(output: MILOutput, label: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(output.logits, label)}


def replay_model(
    case: BaselineCase,
    model: nn.Module,
    published: Mapping[str, str],
    losses: Losses = cross_entropy_loss,
    tolerance: float = 1e-4,
    tolerance_f64: float = 1e-9,
    run: Callable[[Bag], MILOutput] | None = None,
) -> Checks:
    """The checks that all whole models share: eval outputs, losses, gradients of bag and parameters, f64 logits.

    `published` gives the published name of each parameter of `model`, which holds the case's weights. What the output
    holds in its details under a published name is compared with that, its `logits` in place of the output's own.
    `run` is the forward, unless that of `model` in eval mode.
    """
    groups = torch.zeros(case.spec["N"], dtype=torch.long)
    bag = Bag(case.features.requires_grad_(), torch.zeros(case.spec["N"], 2, dtype=torch.int32), groups)
    run = run or model.eval()
    output = run(bag)
    logits = output.logits
    values = {"out_logits": logits, "out_probs": logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)}
    values["out_y_hat"] = logits.argmax(1, keepdim=True)
    if output.attention is not None:
        values["out_attn"] = output.attention[None]
    values |= {f"out_{key}": value for key, value in output.details.items()}
    for label in sorted({key.split("_")[0] for key in case.reference if re.match(r"y\d+_", key)}):
        parts = losses(output, torch.tensor([int(label[1:])]))
        gradients, norms = backward(parts["loss"], bag, model, published)
        values |= {f"{label}_{name}": value for name, value in (parts | gradients).items()}
        yield from norm_checks(norms, case.spec[f"{label}_grad_norms"])
    if "out_logits_f64" in case.reference:
        model.double()
        exact = run(Bag(bag.features.double(), bag.coords, groups))
        values["out_logits_f64"] = exact.details.get("logits", exact.logits)
    yield from value_checks(values, case.reference, tolerance, tolerance_f64)


def backward(
    loss: Tensor, bag: Bag, model: nn.Module, published: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """d loss / d bag as `grad_x` and its norm, and the norm of each parameter's gradient by published name."""
    inputs = [bag.features, *model.parameters()]
    grad_x, *grads = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    norms: dict[str, float] = {
        published[own]: 0.0 if grad is None else float(grad.double().norm())
        for (own, _), grad in zip(model.named_parameters(), grads, strict=True)
    }
    return {"grad_x": grad_x, "grad_x_norm": grad_x.double().norm()}, norms


def norm_checks(norms: Mapping[str, float], expected: Mapping[str, float]) -> Checks:
    """A parameter that is not in `expected` got no gradient."""
    for name, norm in norms.items():
        reference = expected.get(name, 0.0)
        error = abs(norm - reference) / (reference + 1e-6) if max(norm, reference) > 1e-6 else 0.0
        yield Check("grad_norms", "", error, 1e-3)


def value_checks(
    values: Mapping[str, Tensor], references: Mapping[str, Array], tolerance: float, tolerance_f64: float
) -> Checks:
    """Every reference against the value of its name: indices exactly, gradients and f64 logits by their own rules."""
    for key, reference in references.items():
        quantity = re.sub(r"^(out|y\d+)_", "", key)
        if key.endswith("_f64"):
            error = relative_error(values.get(key), reference) * float(np.abs(reference).max())
            yield Check(quantity, "", error, tolerance_f64)
        else:
            allowed = 0.0 if reference.dtype.kind in "biu" else 1e-3 if "grad" in key else tolerance
            yield Check(quantity, "", relative_error(values.get(key), reference, offset=1e-6), allowed)
