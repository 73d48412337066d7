"""Replays of the baselines that take a slide as a sequence of tokens. Each takes a case and says how its parameters are
ours: sizes are told from their shapes, flavours from the variant's name. None for a flavour that is not built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models.bag import Bag, MILModel, MILOutput
from gmmamba.models.bimamba import BiMamba, Mamba
from gmmamba.models.mambamil import MambaMIL, SRMamba
from gmmamba.models.mhim import MHIM, unmasked
from gmmamba.models.nystrom import NystromAttention
from gmmamba.models.s4mil import S4D, S4MIL
from gmmamba.models.transmil import TransMIL
from gmmamba.verify.baselines import BaselineCase, baseline_weight, norm_checks, replay_model, shapes_of, value_checks
from gmmamba.verify.checks import Array, Check, Checks

LOOSE = 5e-4
"""Float32 tolerance of TransMIL, MHIM's transformer and MambaMIL; 1e-4 for the others."""

# From published names to ours: patterns, replaced one after the other
TRANSFORMER = {
    r"^(online_encoder\.)?(cls_token|norm|layer\d)": r"encoder.\2",
    r"^(pos_layer|online_encoder\.pos_embedding)\.proj\.": "encoder.ppeg.convs.0.",
    r"^(pos_layer|online_encoder\.pos_embedding)\.proj(\d)\.": r"encoder.ppeg.convs.\2.",
    r"\.attn\.": ".attention.",
    r"to_out\.0": "to_out",
    r"res_conv\.weight": "res_conv",
}
TRANSMIL = {r"^_fc1": "embed", r"^_fc2": "classifier"} | TRANSFORMER
MHIM_NAMES = {
    r"^patch_to_emb": "embed",
    r"^predictor": "classifier",
    r"^online_encoder\.attention\.attention": "encoder.score",
} | TRANSFORMER
S4 = {
    r"^fc1": "embed",
    r"^fc2": "classifier",
    r"^s4_block\.0": "norm",
    r"^s4_block\.1": "s4d",
    r"kernel\.": "",
    r"output_linear\.0": "output_linear",
}
MAMBAMIL = {r"^_fc1": "embed", r"^layers\.(\d+)\.0\.": r"norms.\1.", r"^layers\.(\d+)\.1\.": r"mixers.\1."}


def replay_transmil(case: BaselineCase) -> Checks | None:
    """Cases of nystrom-attention 0.0.9 have its fault."""
    shapes, variant = shapes_of(case), case.spec["variant"]
    if variant == "nystrom_unit":
        heads, _, kernel, _ = shapes["res_conv.weight"]
        attention = NystromAttention(shapes["to_qkv.weight"][1], heads, kernel)
        return replay_unit(case, attention, TRANSFORMER, lambda x: attention(x)[0], lambda y: y.square().mean())
    if not variant.startswith("official"):
        return None
    model = TransMIL(case.spec["D"], case.spec["C"], shapes["_fc1.0.weight"][0])
    for layer in (model.encoder.layer1, model.encoder.layer2):
        layer.attention.front_slip = "0.0.9" in variant
    published = load(model, case, TRANSMIL)
    return replay_model(case, model, published, tolerance=LOOSE, run=runner(model, y_hat))


def replay_mhim(case: BaselineCase) -> Checks | None:
    """Forwards of the student, and steps of student and teacher."""
    flavour = re.fullmatch(r"(attn|selfattn)(_step)?", case.spec["variant"])
    if flavour is None:
        return None
    shapes = shapes_of(case)
    hidden = shapes.get("online_encoder.attention.attention.0.weight", [128])[0]
    encoder, tolerance = ("abmil", 1e-4) if flavour[1] == "attn" else ("transmil", LOOSE)
    models = [MHIM(case.spec["D"], case.spec["C"], shapes["predictor.weight"][1], encoder, hidden) for _ in range(2)]
    student, teacher = (model.eval() for model in models)
    published = load(student, case, MHIM_NAMES)
    if not flavour[2]:
        return replay_model(case, student, published, tolerance=tolerance)
    load(teacher, case, MHIM_NAMES, case.spec["teacher_seed"])
    return replay_step(case, student, teacher, published, tolerance)


def replay_step(
    case: BaselineCase, student: MHIM, teacher: MHIM, published: Mapping[str, str], tolerance: float
) -> Checks:
    """The mask from the recorded attention and draws; the rest with the recorded order of the patches, which ours is
    not. Dropout is off in both."""
    cfg, reference = case.spec["cfg"], case.reference
    recorded = reference.get("teacher_attn", reference.get("teacher_attn_l1"))
    assert recorded is not None
    ratios = (cfg["mask_ratio"], cfg["mask_ratio_l"], cfg["mask_ratio_h"], cfg["mask_ratio_hr"])
    attention = torch.from_numpy(recorded).view(-1, case.spec["N"])
    keep = torch.from_numpy(reference["mask_ids"])[0, : int(reference["len_keep"])].long()
    wrong = []
    for ranked in (False, True):  # votes are often equal, and their published order is arbitrary
        ours = unmasked(attention, ratios, recorded_draws(reference), ranked)
        wrong.append(float(len({*ours.tolist()} ^ {*keep.tolist()})))
    yield Check("mask_ids", "", min(wrong), 0)

    x = case.features.requires_grad_()
    bag = Bag(x, torch.zeros(len(x), 2, dtype=torch.int32))
    with torch.no_grad():
        target, row1, row2 = teacher.encoder(teacher.embed(x))
    values = {"teacher_feat": target, "teacher_attn": row1}
    values |= {"teacher_attn_l1": row1[None], "teacher_attn_l2": row2[None]}
    ce, consistency, logits = student.student_loss(bag, torch.tensor([case.spec["label"]]), keep, target)
    loss = ce + cfg["cl_alpha"] * consistency
    values |= {"out_logits": logits, "ce": ce, "consistency": consistency, "loss": loss}
    grad_x, norms, _ = gradients(loss, x, student, published)
    values |= {"grad_x": grad_x[None], "grad_x_norm": grad_x.double().norm()}
    yield from norm_checks(norms, case.spec["grad_norms"])
    student.teachers = [teacher]
    for key in reference:
        if key.startswith("ema_predictor_weight_after_mm"):
            student.momentum = float(key.removeprefix("ema_predictor_weight_after_mm"))
            student.after_step(0.0)
            values[key] = teacher.classifier.weight
    inputs = ("randperm", "mask_ids", "len_keep")
    results = {key: array for key, array in reference.items() if not key.startswith(inputs)}
    yield from value_checks(values, results, tolerance, 1e-9)


def recorded_draws(reference: Mapping[str, Array]) -> Callable[[int], Tensor]:
    """The permutations of a step, one after the other."""
    draws = (torch.from_numpy(reference[f"randperm{i}"]) for i in count())
    return lambda n: next(draws)


def replay_s4mil(case: BaselineCase) -> Checks | None:
    """The published loss is of the softmax; its float64 forward takes one step in float32."""
    shapes, variant = shapes_of(case), case.spec["variant"]
    if variant == "s4d_unit":
        width, modes, _ = shapes["kernel.C"]
        s4d = S4D(width, 2 * modes)
        extra = {"kernel": lambda: s4d.kernel(case.spec["N"])}
        return replay_unit(case, s4d, S4, s4d, lambda y: y.square().sum(), extra)
    if not variant.startswith("official"):
        return None
    width, modes, _ = shapes["s4_block.1.kernel.C"]
    model = S4MIL(case.spec["D"], case.spec["C"], width, 2 * modes)
    published = load(model, case, S4)

    def losses(output: MILOutput, label: Tensor) -> dict[str, Tensor]:
        ce = F.cross_entropy(output.logits, label)
        return {"loss": F.cross_entropy(output.logits.softmax(1), label), "ce_on_logits": ce}

    return replay_model(case, model, published, losses, tolerance_f64=1e-7, run=runner(model, y_hat))


def replay_mambamil(case: BaselineCase) -> Checks | None:
    """Whole models, and blocks, of which the variant's name gives mixer and rate."""
    flavour = re.fullmatch(r"(block_)?(?:(Mamba|BiMamba)|SRMamba(?:_rate)?(\d+))", case.spec["variant"])
    if flavour is None:
        return None
    shapes, rate = shapes_of(case), int(flavour[3] or 1)
    if flavour[1]:
        width, d_state = shapes["in_proj.weight"][1], shapes["A_log"][1]
        if flavour[3]:
            block: Mamba = SRMamba(width, d_state, rate)
        else:
            block = (BiMamba if flavour[2] == "BiMamba" else Mamba)(width, d_state)
        return replay_unit(case, block, {}, lambda x: block(x, torch.tensor([len(x)])), lambda y: y.square().sum())
    model = MambaMIL(
        case.spec["D"],
        case.spec["C"],
        width=shapes["_fc1.0.weight"][0],
        mixer=(flavour[2] or "SRMamba").lower(),
        rate=rate,
        layers=sum(name.endswith("in_proj.weight") for name in shapes),
        d_state=shapes["layers.0.1.A_log"][1],
        hidden=shapes["attention.0.weight"][0],
    )
    published = load(model, case, MAMBAMIL)
    return replay_model(case, model, published, tolerance=LOOSE, run=runner(model, published_attention))


def replay_unit(
    case: BaselineCase,
    module: nn.Module,
    names: Mapping[str, str],
    run: Callable[[Tensor], Tensor],
    reduce: Callable[[Tensor], Tensor],
    extra: Mapping[str, Callable[[], Tensor]] | None = None,
) -> Checks:
    """A part of a model on (1, N, D): output, `reduce` of it as the loss, gradients, and what `extra` names."""
    published = load(module, case, names)
    module.eval()
    x = case.features.requires_grad_()
    out = run(x)
    values = {"out": out[None], "loss": reduce(out)} | {key: value() for key, value in (extra or {}).items()}
    grad_x, norms, grads = gradients(values["loss"], x, module, published)
    values |= {"grad_x": grad_x[None], "grad_x_norm": grad_x.double().norm()}
    for name, shape, _ in case.parameters:
        values[f"grad/{name}"] = grads[name].view(shape)
    yield from norm_checks(norms, case.spec["grad_norms"])
    if "out_f64" in case.reference:
        module.double()
        values["out_f64"] = run(x.double())[None]
    results = {re.sub("^g_", "grad/", key): array for key, array in case.reference.items()}
    yield from value_checks(values, results, 1e-4, 1e-9)


def load(module: nn.Module, case: BaselineCase, names: Mapping[str, str], seed: int | None = None) -> dict[str, str]:
    """Load the case's weights, those of another seed if given; the published name of each of ours.

    RuntimeError where the parameters are not the same.
    """
    own, published = module.state_dict(), {}
    weights = {}
    for name, shape, kind in case.parameters:
        ours = name
        for pattern, replacement in names.items():
            ours = re.sub(pattern, replacement, ours)
        published[ours] = name
        weight = baseline_weight(name, shape, kind, case.spec["seed"] if seed is None else seed)
        weights[ours] = weight.view_as(own[ours]) if ours in own and own[ours].numel() == weight.numel() else weight
    module.load_state_dict(weights)
    return published


def gradients(
    loss: Tensor, x: Tensor, module: nn.Module, published: Mapping[str, str]
) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    """d loss / d x; the norm of each parameter's gradient and the gradient itself, by published name."""
    grad_x, *grads = torch.autograd.grad(loss, [x, *module.parameters()])
    by_name = {published[own]: grad for (own, _), grad in zip(module.named_parameters(), grads, strict=True)}
    return grad_x, {name: float(grad.double().norm()) for name, grad in by_name.items()}, by_name


def runner(model: MILModel, shaped: Callable[[MILOutput], dict[str, Tensor]]) -> Callable[[Bag], MILOutput]:
    """The forward in eval mode, with details in the published shape."""
    model.eval()

    def run(bag: Bag) -> MILOutput:
        output = model(bag)
        output.details |= shaped(output)
        return output

    return run


def y_hat(output: MILOutput) -> dict[str, Tensor]:
    return {"y_hat": output.logits.argmax(1)}


def published_attention(output: MILOutput) -> dict[str, Tensor]:
    assert output.attention is not None
    return {"attn": output.attention[None, None], "attn_raw": output.details["attn_raw"][None]}
