"""Replays reference cases: numbers that the published implementations produced, against what ours compute.

Reads any folder that holds (at any depth) one or more of these, of whatever seeds, shapes and sizes:

    manifest.json   GMMamba cases `<id>_inputs.npz`, `<id>_outputs.npz` (float64), or single BiMambas `<id>.npz`
    index.json      cases of one baseline, `<case>.npz` (float32); weights and bags follow from rules

Writes one line a case to standard output. The rules and tolerances are those of the reference's own documents:
forward, gradients and gradient norms, in float32 and float64 where the reference allows it.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from gmmamba.grouping import group_coords
from gmmamba.models.abmil import ABMIL
from gmmamba.models.bag import Bag, MILOutput
from gmmamba.models.bimamba import BiMamba
from gmmamba.models.gmmamba import PUBLISHED, GMMamba

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
Array = NDArray[Any]


@dataclass
class Check:
    """The error of one quantity of a case and what is allowed; infinite where the two cannot be compared."""

    quantity: str
    precision: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return ("0" if self.error == 0 else f"{self.error:.0e}") + ("" if self.passed else "!")


Checks = Iterator[Check]


def precisions(scan: str) -> list[tuple[str, torch.dtype]]:
    """Those in which the scan can be compared: the official kernels have no float64."""
    return [(name, dtype) for name, dtype in PRECISIONS.items() if name == "fp32" or scan != "mamba_ssm"]


def verify(folder: Path, scan: str = "auto", device: str = "cpu") -> bool:
    """Replay every case below `folder` and print one line each; False if any quantity is out of tolerance.

    Methods that are not built are listed as "not implemented" and do not fail. FileNotFoundError for a folder
    without cases. `scan` is the backend of the selective scan; `device` is where GMMamba runs, baselines are replayed
    on the CPU.
    """
    manifests, indices = (sorted(Path(folder).rglob(name)) for name in ("manifest.json", "index.json"))
    if not manifests and not indices:
        raise FileNotFoundError(f"{folder} holds no reference cases: no manifest.json and no index.json, at any depth")
    passed = []
    for manifest in manifests:
        print(f"{manifest.parent}: largest relative error, float32/float64")
        for name, case in json.loads(manifest.read_text()).items():
            if not isinstance(case, dict) or not {"d_model", "mask_ratio"} & set(case):
                raise ValueError(f"{manifest} is no manifest of reference cases: {name!r} has no d_model or mask_ratio")
            replay = replay_bimamba if "d_model" in case else replay_gmmamba
            passed.append(report(name, replay(manifest.parent, name, case, scan, device)))
    for index in indices:
        content = json.loads(index.read_text())
        method, cases = content["method"], content["cases"]
        if method not in ADAPTERS:
            print(f"{index.parent}: {method}, {len(cases)} cases: not implemented")
            continue
        print(f"{index.parent}: {method}, relative error of float32 (absolute of float64 logits)")
        for spec in cases:
            checks = ADAPTERS[method](BaselineCase.read(index.parent, spec, content["parameters"]))
            if checks is None:
                print(f"  {Path(spec['file']).stem}: not implemented")
            else:
                passed.append(report(Path(spec["file"]).stem, checks))
    print(f"{sum(passed)} of {len(passed)} cases within tolerance")
    return all(passed)


def report(name: str, checks: Checks) -> bool:
    """Print the worst check of each quantity and precision on one line; out of tolerance is marked by '!'."""
    worst: dict[str, dict[str, Check]] = {}
    for check in checks:
        seen = worst.setdefault(check.quantity, {}).setdefault(check.precision, check)
        if check.error / (check.tolerance or 1) > seen.error / (seen.tolerance or 1):
            worst[check.quantity][check.precision] = check
    passed = all(check.passed for by_precision in worst.values() for check in by_precision.values())
    errors = (f"{quantity} " + "/".join(map(str, by_precision.values())) for quantity, by_precision in worst.items())
    print(f"  {name}: {'ok ' if passed else 'OUT OF TOLERANCE '} " + ", ".join(errors))
    return passed


def relative_error(value: Tensor | Array | None, reference: Array, scale: float = 0.0, offset: float = 0.0) -> float:
    """max |value - reference| / (max |reference| + offset); infinite for no value, another shape, or NaN.

    A reference that is zero but for rounding, below 1e-12 of `scale`, is measured against `scale` instead.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if value is None or value.shape != reference.shape:
        return math.inf
    difference = np.abs(value.astype(np.float64) - reference).max(initial=0.0)
    size = np.abs(reference).max(initial=0.0)
    size = scale if size < 1e-12 * scale else size + offset
    if difference == 0:
        return 0.0
    return float(difference / size) if np.isfinite(difference) and size else math.inf


# --- GMMamba -----------------------------------------------------------------------------------------------------


def replay_gmmamba(folder: Path, name: str, case: Mapping[str, Any], scan: str, device: str) -> Checks:
    """One whole model: groups, weights, every intermediate quantity, loss, gradients (GMMAMBA.md, section 9)."""
    inputs, reference = (dict(np.load(folder / f"{name}_{part}.npz")) for part in ("inputs", "outputs"))
    labels = group_coords(inputs["coords"], "location", case["groups"])
    yield Check("kmeans", "", float((labels != inputs["kmeans_labels"]).sum()), 0)

    options = PUBLISHED | {key: case[key] for key in ("n_classes", "mask_ratio", "num_layers")}
    model = GMMamba(inputs["features"].shape[1], width=case["dim"], scan=scan, **options).eval()
    shipped = folder / f"{name}_weights.safetensors"
    weights = load_file(shipped) if shipped.exists() or case["weights"] != "rule" else {}
    if case["weights"] == "rule":
        rule = {key: gmmamba_weight(key, tuple(x.shape), case["seed"]) for key, x in model.state_dict().items()}
        for key, weight in weights.items():
            yield Check("weights", "", relative_error(rule[key], weight.numpy()), 1e-7)
        weights = rule
    model.load_state_dict(weights)

    for precision, dtype in precisions(scan):
        if precision == "fp32" and not case.get("keep_same_fp32_fp64", True):
            continue  # rounding chose other instances there: nothing behind the mask is comparable
        model.to(device, dtype).zero_grad()
        features = torch.tensor(inputs["features"], dtype=dtype, device=device, requires_grad=True)
        groups = torch.tensor(inputs["kmeans_labels"], dtype=torch.long)
        output = model(Bag(features, torch.tensor(inputs["coords"]), groups))
        loss = F.cross_entropy(output.logits, torch.tensor([int(inputs["label"])], device=device))
        loss.backward()
        grads = {key: parameter.grad for key, parameter in model.named_parameters()} | {"features": features.grad}
        values = output.details | {"logits": output.logits, "probs": output.logits.softmax(1), "loss": loss}
        values |= {"y_hat": output.logits.argmax(1)} | {f"grad/{key}": grad for key, grad in grads.items()}
        norms = case["grad_norms_fp64"]
        largest = max(norm for norm in norms.values() if norm is not None)
        for key, array in reference.items():
            if key in ("label", "kmeans_labels", "mask_boundary_rel_gap"):  # inputs, and the margin of the mask
                continue
            tolerance = gmmamba_tolerance(key, precision, array, case["max_rel_err_fp32_vs_fp64"].get(key, 0))
            quantity = "grad" if key.startswith("grad/") and key != "grad/features" else key
            scale = largest if key.startswith("grad/") else 0
            yield Check(quantity, precision, relative_error(values.get(key), array, scale), tolerance)
        for key, norm in norms.items():
            grad = grads[key]
            if norm is None or grad is None:
                yield Check("grad_norms", precision, 0.0 if norm is grad is None else math.inf, 0)
                continue
            error = relative_error(grad.double().norm(), np.array(norm), largest)
            yield Check("grad_norms", precision, error, 2e-5 if precision == "fp32" else 1e-12)


def gmmamba_tolerance(key: str, precision: str, reference: Array, own_error: float) -> float:
    """What the documents allow; more where the reference itself, run in float32 or stored in it, is less exact."""
    if reference.dtype.kind in "bi":
        return 0.0
    if precision == "fp64":
        return max(1e-12, float(np.finfo(reference.dtype).eps) if reference.dtype == np.float32 else 0)
    return max(2e-5 if key.startswith("grad/") else 2e-6, 4 * own_error)


def gmmamba_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The weight rule of GMMAMBA.md, section 9."""
    rs = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    z = rs.standard_normal(shape)
    if name.endswith(("A_log", "A_b_log")):
        value = np.log(np.arange(1, shape[1] + 1)) + 0.1 * z
    elif name.endswith((".D", ".D_b")):
        value = 1 + 0.2 * z
    elif "conv1d" in name:
        value = rs.uniform(-0.5, 0.5, shape)
    elif name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        value = step_bias(rs, shape)
    elif name.startswith(("imm.norm.", "imm.BiMamba1.0.", "imm.BiMamba2.0.")):
        value = 0.1 * z + name.endswith("weight")
    elif name == "cls.cls_token":
        value = z
    elif len(shape) == 2:
        value = z * np.sqrt(2 / sum(shape))
    else:
        value = 0.05 * z
    return torch.tensor(value, dtype=torch.float32)


def step_bias(rs: np.random.RandomState, shape: tuple[int, ...]) -> Array:
    """b_dt whose softplus is log-uniform in [1e-3, 1e-1]."""
    dt = np.exp(rs.uniform(0, 1, shape) * (np.log(0.1) - np.log(0.001)) + np.log(0.001))
    bias: Array = dt + np.log(-np.expm1(-dt))
    return bias


def replay_bimamba(folder: Path, name: str, case: Mapping[str, Any], scan: str, device: str) -> Checks:
    """One BiMamba on a batch of B sequences, which are B groups here; loss = sum(y * cotangent)."""
    reference = dict(np.load(folder / f"{name}.npz"))
    weights = load_file(folder / case["weights"])
    (inner, d_state), d_conv = weights["A_log"].shape, weights["conv1d.weight"].shape[2]
    mixer = BiMamba(case["d_model"], d_state, d_conv, inner // case["d_model"], scan=scan)
    mixer.load_state_dict(weights)
    batch, length, width = reference["x"].shape
    for precision, dtype in precisions(scan):
        mixer.to(device, dtype).zero_grad()
        x = torch.tensor(reference["x"], dtype=dtype, device=device, requires_grad=True)
        y = mixer(x.view(-1, width), torch.full((batch,), length, device=device)).view_as(x)
        (y * torch.tensor(reference["cotangent"], dtype=dtype, device=device)).sum().backward()
        values = {"y": y, "dx": x.grad} | {f"grad/{key}": p.grad for key, p in mixer.named_parameters()}
        for key, array in reference.items():
            if key not in ("x", "cotangent"):
                tolerance = 1e-12 if precision == "fp64" else 2e-6 if key == "y" else 2e-5
                error = relative_error(values.get(key), array)
                yield Check(key.split("/")[0], precision, error, tolerance)


# --- Baselines ---------------------------------------------------------------------------------------------------


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


def bernoulli_loss(output: MILOutput, label: Tensor) -> Tensor:
    """Ilse et al.: negative log-likelihood with the probability clamped to [1e-5, 1 - 1e-5]."""
    p = output.logits.sigmoid()[0].clamp(1e-5, 1 - 1e-5)
    return F.binary_cross_entropy(p, label.to(p.dtype))


ADAPTERS: dict[str, Callable[[BaselineCase], Checks | None]] = {"abmil": replay_abmil}
