"""Replays of the baselines that pool by attention. Each takes a case and says how its parameters are ours; sizes and
flavours are told from the parameters' shapes and from the variant's name. None for a flavour that is not built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models.abmil import ABMIL
from gmmamba.models.acmil import ACMIL
from gmmamba.models.bag import Bag, MILOutput
from gmmamba.models.clam import CLAM, smooth_svm
from gmmamba.models.dsmil import DSMIL
from gmmamba.models.dtfd import DTFD
from gmmamba.models.ibmil import IBMIL
from gmmamba.models.ilra import ILRA
from gmmamba.verify.baselines import BaselineCase, backward, norm_checks, replay_model, value_checks
from gmmamba.verify.checks import Checks


def replay_abmil(case: BaselineCase) -> Checks | None:
    """Every flavour is told from the shapes: V before the optional gate U, one output for Ilse's sigmoid."""
    shapes = [tuple(shape) for _, shape, _ in case.parameters]
    (width, in_dim), bias = shapes[0], len(shapes[1]) == 1
    V, after_V = shapes[1 + bias], shapes[3 + bias]
    model = ABMIL(in_dim, shapes[-2][0], width, V[0], gated=after_V == V, bias=bias)
    published = load_in_order(model, case)
    if published is None:
        return None
    if shapes[-2][0] > 1:
        return replay_model(case, model, published)
    return replay_model(case, model, published, bernoulli_loss)


def bernoulli_loss(output: MILOutput, label: Tensor) -> dict[str, Tensor]:
    """Ilse et al.: negative log-likelihood with the probability clamped to [1e-5, 1 - 1e-5]."""
    p = output.logits.sigmoid()[0].clamp(1e-5, 1 - 1e-5)
    return {"loss": F.binary_cross_entropy(p, label.to(p.dtype))}


def replay_clam(case: BaselineCase) -> Checks | None:
    if case.spec["mode"] == "unit":
        return replay_svm(case) if "svm" in case.spec["variant"] else None
    flavour = re.fullmatch(r"clam_(sb|mb)_(sub|nosub)_(svm|ce)", case.spec["variant"])
    if flavour is None:
        return None
    branches = {"sb": "single", "mb": "multi"}[flavour[1]]
    options: dict[str, Any] = {"branches": branches, "subtyping": flavour[2] == "sub", "instance_loss": flavour[3]}
    shapes = shapes_of(case)
    width, hidden = shapes["attention_net.0.weight"][0], shapes["attention_net.3.attention_a.0.weight"][0]
    model = CLAM(case.spec["D"], case.spec["C"], width=width, hidden=hidden, **options)
    published = load_in_order(model, case)
    if published is None:
        return None

    def losses(output: MILOutput, label: Tensor) -> dict[str, Tensor]:
        parts = model.losses(output, label)
        counted = parts["inst_counted"]
        return parts | {name: parts[name][counted] for name in ("inst_labels", "inst_preds")}

    return replay_model(case, model, published, losses)


def replay_svm(case: BaselineCase) -> Checks:
    """The smooth SVM alone, on the recorded scores, for each number of classes."""
    values: dict[str, Tensor] = {}
    for key, array in case.reference.items():
        if key.startswith("scores"):
            classes = key.removeprefix("scores")
            scores = torch.from_numpy(array).requires_grad_()
            values[f"loss{classes}"] = smooth_svm(scores, torch.from_numpy(case.reference[f"y{classes}"])).mean()
            (values[f"grad{classes}"],) = torch.autograd.grad(values[f"loss{classes}"], scores)
    results = {key: array for key, array in case.reference.items() if not key.startswith(("scores", "y"))}
    return value_checks(values, results, 1e-4, 1e-9)


def replay_dsmil(case: BaselineCase) -> Checks | None:
    shapes = shapes_of(case)
    if not case.spec["variant"].startswith("official"):
        return None
    nonlinear = "b_classifier.q.0.weight" in shapes
    query = shapes["b_classifier.q.0.weight" if nonlinear else "b_classifier.q.weight"]
    model = DSMIL(case.spec["D"], case.spec["C"], query[0], nonlinear)
    published = load_in_order(model, case)
    return None if published is None else replay_model(case, model, published, model.losses, tolerance_f64=1e-7)


def replay_dtfd(case: BaselineCase) -> Checks | None:
    """One split, the recorded one. The tiers' gradients do not mix, so that one backward pass gives both."""
    distill = re.fullmatch(r"dtfd_(MaxMinS|AFS|MaxS)", case.spec["variant"])
    if distill is None:
        return None
    shapes, names = shapes_of(case), {"dimReduction.fc1": "embed.0"}
    for own, theirs in {"": "", "tier2.": "attCls."}.items():
        names |= {theirs + name: own + ours for name, ours in GATED.items()}
        names[theirs + "classifier.fc"] = own + "classifier"
    width, hidden = shapes["dimReduction.fc1.weight"][0], shapes["attention.attention_V.0.weight"][0]
    sizes = {"pseudo_bags": case.spec["numGroup"], "instances": case.spec["instance_per_group"]}
    model = DTFD(case.spec["D"], case.spec["C"], distill[1], width, hidden, **sizes)
    published = load_renamed(model, case, names)
    return None if published is None else replay_split(case, model, published)


def replay_split(case: BaselineCase, model: DTFD, published: Mapping[str, str]) -> Checks:
    order = torch.from_numpy(case.reference["perm"])
    bag = Bag(case.features.requires_grad_(), torch.zeros(len(order), 2, dtype=torch.int32))
    split = model.split(*model.embed_bag(bag), order, detach=True)
    losses = model.losses(split, torch.tensor([case.spec["label"]]))
    gradients, norms = backward(losses["loss"], bag, model, published)
    yield from norm_checks(norms, case.spec["grad_norms"])
    values = {f"out_{name}": value for name, value in split.items()} | losses
    values |= {f"tier1_{name}": value for name, value in gradients.items()}
    values["out_probs"] = split["logits"].softmax(1)
    if "selected_idx" in split:
        values["selected_global_idx"] = split["selected_idx"]
    exact = model.double().embed_bag(Bag(bag.features.double(), bag.coords))
    values["out_logits_f64"] = model.split(*exact, order)["logits"]
    results = {key: array for key, array in case.reference.items() if key not in ("perm", "y_label")}
    yield from value_checks(values, results, 1e-4, 1e-9)


def replay_ibmil(case: BaselineCase) -> Checks | None:
    flavour = re.fullmatch(r"stage(1|2)(?:_(cat|add|sub))?", case.spec["variant"])
    if flavour is None:
        return None
    shapes, stage = shapes_of(case), int(flavour[1])
    options: dict[str, Any] = {"stage": stage, "merge": flavour[2] or "cat"}
    if stage == 2:
        options |= {"confounders": shapes["confounder"][0], "hidden": shapes["W_q.weight"][0]}
    model = IBMIL(case.spec["D"], case.spec["C"], **options)
    names = {"attention.0": "attention.0", "attention.2": "attention.2", "classifier": "classifier"}
    published = load_renamed(model, case, names | {"W_q": "query", "W_k": "key", "confounder": "confounders"})
    exact = 1e-9 if stage == 1 else 1e-7  # the published second stage takes a root in float32
    return None if published is None else replay_model(case, model, published, model.losses, tolerance_f64=exact)


def replay_ilra(case: BaselineCase) -> Checks | None:
    flavour = re.fullmatch(r"official_topk(\d+)_ln([01])", case.spec["variant"])
    if flavour is None:
        return None
    shapes = shapes_of(case)
    layers = sum(name.endswith(".latent") for name in shapes)
    rank, width = shapes["gab_blocks.0.latent"][1:]
    model = ILRA(case.spec["D"], case.spec["C"], width, rank, layers, layer_norm=flavour[2] == "1")
    attention = {"multihead_attn": "attention", "fc_q": "q", "fc_k": "k", "fc_v": "v", "ln0": "norm0", "ln1": "norm1"}
    attention |= {"fc_o": "feed.0", "gate.0": "gate.0"}
    places = {"pooling.mha": "pooling"}
    for i in range(layers):
        places |= {f"gab_blocks.{i}.project_forward": f"blocks.{i}.gather"}
        places |= {f"gab_blocks.{i}.project_backward": f"blocks.{i}.spread"}
    names = {f"{place}.{part}": f"{own}.{ours}" for place, own in places.items() for part, ours in attention.items()}
    names |= {f"gab_blocks.{i}.latent": f"blocks.{i}.latent" for i in range(layers)}
    published = load_renamed(model, case, names | {"pooling.S": "query", "classifier": "classifier"})
    return None if published is None else replay_model(case, model, published)


def replay_acmil(case: BaselineCase) -> Checks | None:
    """In train mode only of the gated attention, whose draws are on record."""
    flavour = re.fullmatch(r"(ga|mha)_(?:K\d+|stkim)", case.spec["variant"])
    train = case.spec["mode"] == "train"
    if flavour is None or (train and "uniforms" not in case.reference) or (train and flavour[1] == "mha"):
        return None
    shapes = shapes_of(case)
    width, branches = shapes["dimreduction.fc1.weight"][0], sum(name.endswith(".fc.weight") for name in shapes) - 1
    names = {"dimreduction.fc1": "embed.0", "Slide_classifier.fc": "classifier"}
    names |= {f"classifier.{i}.fc": f"branch_classifiers.{i}" for i in range(branches)}
    if flavour[1] == "ga":
        hidden = shapes["attention.attention_V.0.weight"][0]
        model = ACMIL(case.spec["D"], case.spec["C"], "gated", width, hidden, branches)
        names |= {name: f"pool.{own}" for name, own in GATED.items()}
    else:
        model = ACMIL(case.spec["D"], case.spec["C"], "mha", width, branches=branches)
        names |= {"q": "pool.queries"} | headed_sum("bag_attention", "pool.slide")
        for i in range(branches):
            names |= headed_sum(f"sub_attention.{i}", f"pool.branch.{i}")
            names |= {f"sub_attention.{i}.{name}_proj": f"pool.{own}.{i}" for name, own in QUERY_KEY.items()}
    published = load_renamed(model, case, names)
    if published is None:
        return None
    if not train:
        return replay_model(case, model, published, model.losses)
    uniforms = torch.from_numpy(case.reference["uniforms"])[None]

    def forward(bag: Bag) -> MILOutput:
        output = model(bag, uniforms)
        output.details["attn_kept"] = output.details["attn_raw"].masked_fill(output.details["masked"], 0)
        return output

    results = {key: array for key, array in case.reference.items() if key != "uniforms"}
    results["out_masked"], scores = results.pop("masked"), results.pop("out_attn_masked")
    results["out_attn_kept"] = np.where(scores == -1e9, 0, scores)  # beside -1e9 an error in the others is nothing
    model.train()
    return replay_model(replace(case, reference=results), model, published, model.losses, run=forward)


GATED = {
    "attention.attention_V.0": "attention.v.0",
    "attention.attention_U.0": "attention.u.0",
    "attention.attention_weights": "attention.score",
}
"""The published names in a gated attention, and ours."""
QUERY_KEY = {"q": "query", "k": "key"}


def headed_sum(name: str, own: str) -> dict[str, str]:
    parts = {"v_proj": "value", "out_proj": "out", "layer_norm": "norm"}
    return {f"{name}.{theirs}": f"{own}.{ours}" for theirs, ours in parts.items()}


def shapes_of(case: BaselineCase) -> dict[str, list[int]]:
    return {name: shape for name, shape, _ in case.parameters}


def load_in_order(model: nn.Module, case: BaselineCase) -> dict[str, str] | None:
    """Load the case's weights where both list them in the same order; the published name of each, None if the shapes
    differ."""
    own = model.state_dict()
    if [list(value.shape) for value in own.values()] != [shape for _, shape, _ in case.parameters]:
        return None
    names = {name: name for name, _, _ in case.parameters}
    return load_renamed(model, case, dict(zip(names, own, strict=True)))


def load_renamed(model: nn.Module, case: BaselineCase, names: Mapping[str, str]) -> dict[str, str] | None:
    """Load the case's weights, published by the names (or beginnings of names) that `names` maps to ours.

    The published name of each of ours; None where one has no counterpart of as many numbers, or a parameter of ours
    has none.
    """
    own, published = model.state_dict(), {}
    for name, weight in case.weights.items():
        begin = next((begin for begin in names if name == begin or name.startswith(begin + ".")), None)
        ours = None if begin is None else names[begin] + name.removeprefix(begin)
        if ours not in own or own[ours].numel() != weight.numel():
            return None
        published[ours] = name
        own[ours] = weight.view_as(own[ours])
    model.load_state_dict(own)
    return published if set(dict(model.named_parameters())) <= set(published) else None
