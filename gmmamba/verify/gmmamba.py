"""Replays the cases of GMMamba itself and of its BiMamba."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from gmmamba.grouping import group_coords
from gmmamba.models.bag import Bag
from gmmamba.models.bimamba import BiMamba
from gmmamba.models.gmmamba import PUBLISHED, GMMamba
from gmmamba.verify.checks import Array, Check, Checks, relative_error, step_bias

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


def precisions(scan: str) -> list[tuple[str, torch.dtype]]:
    """Those in which the scan can be compared: the official kernels have no float64."""
    return [(name, dtype) for name, dtype in PRECISIONS.items() if name == "fp32" or scan != "mamba_ssm"]


def replay_gmmamba(folder: Path, name: str, case: Mapping[str, Any], scan: str, device: str) -> Checks:
    """One whole model: groups, weights, every intermediate quantity, loss, gradients."""
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
    """The rule that the cases' weights are made by."""
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
