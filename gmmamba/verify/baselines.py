"""What the cases of all baselines share: weights and bags by rule, and the checks of a whole model
(reference/baselines/README.md)."""

from __future__ import annotations

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
        return BaselineCase(spec, parameters[spec["parameters"]], dict(np.load(folder / spec["file"])))

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


def replay_model(
    case: BaselineCase,
    model: nn.Module,
    published: Mapping[str, str],
    loss: Callable[[MILOutput, Tensor], Tensor] = lambda output, label: F.cross_entropy(output.logits, label),
    tolerance: float = 1e-4,
) -> Checks:
    """The checks that all whole models share: eval outputs, losses, gradients of bag and parameters, f64 logits.

    `published` gives the published name of each parameter of `model`, which holds the case's weights.
    """
    groups = torch.zeros(case.spec["N"], dtype=torch.long)
    bag = Bag(case.features.requires_grad_(), torch.zeros(case.spec["N"], 2, dtype=torch.int32), groups)
    output: MILOutput = model.eval()(bag)
    logits = output.logits
    values = {"out_logits": logits, "out_probs": logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)}
    values |= {f"out_{key}": value for key, value in output.details.items()}
    if output.attention is not None:
        values["out_attn"] = output.attention[None]
    for key in sorted(key for key in case.reference if key.startswith("y") and key.endswith("_loss")):
        label = key.removesuffix("_loss")
        values[key] = loss(output, torch.tensor([int(label[1:])]))
        inputs = [bag.features, *model.parameters()]
        grad_x, *grads = torch.autograd.grad(values[key], inputs, retain_graph=True, allow_unused=True)
        values |= {f"{label}_grad_x": grad_x, f"{label}_grad_x_norm": grad_x.double().norm()}
        norms = {
            published[own]: 0.0 if grad is None else float(grad.double().norm())
            for (own, _), grad in zip(model.named_parameters(), grads, strict=True)
        }
        expected = case.spec[f"{label}_grad_norms"]  # a parameter missing there got no gradient
        for name, norm in norms.items():
            reference = expected.get(name, 0.0)
            error = abs(norm - reference) / (reference + 1e-6) if max(norm, reference) > 1e-6 else 0.0
            yield Check("grad_norms", "", error, 1e-3)
    values["out_logits_f64"] = model.double()(Bag(bag.features.double(), bag.coords, groups)).logits
    for key, reference in case.reference.items():
        if key == "out_logits_f64":
            error = relative_error(values[key], reference) * float(np.abs(reference).max())
            yield Check("logits_f64", "", error, 1e-9)
        else:
            quantity = key.split("_", 1)[1]
            allowed = 1e-3 if "grad" in key else tolerance
            yield Check(quantity, "", relative_error(values.get(key), reference, offset=1e-6), allowed)
