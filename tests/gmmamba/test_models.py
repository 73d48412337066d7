"""Every registered model: any bag, gradients everywhere, attention that sums to 1; and what is GMMamba's own.

What is the other methods' own: test_attention_models.py.
"""

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gmmamba.models import MODELS, TWO_STAGES, create_model, imm
from gmmamba.models.bag import Bag, MILModel, MILOutput
from gmmamba.models.css import CSS, VARIANTS
from gmmamba.models.gmmamba import PUBLISHED
from gmmamba.models.imm import MASKS, keep_highest

IN_DIM = 24
SMALL: dict[str, dict[str, Any]] = {"dsmil": {}, "ibmil": {}}  # these take features as they are; all others width 32
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": PUBLISHED,
    "BMP": PUBLISHED | {"pooling": "max", "css": None},
    "without masking": PUBLISHED | {"mask": None, "css": None},
    "with IMM": PUBLISHED | {"css": None},
    "with CSS": PUBLISHED | {"mask": None},
    "two layers": {"num_layers": 2},
    "small mask": PUBLISHED | {"mask_ratio": 0.0},
    "straight through": {"mask": "straight_through"},
    "gated": {"mask": "gated"},
    "adaptive": {"mask": "adaptive"},
}
FLAVOURS: list[tuple[str, dict[str, Any]]] = [
    ("clam", {"branches": "multi"}),
    ("clam", {"instance_loss": "ce", "subtyping": False}),
    ("dsmil", {"nonlinear": False}),
    ("dtfd", {"distill": "AFS"}),
    ("dtfd", {"distill": "MaxS", "instances": 3}),
    ("ibmil", {"stage": 1}),
    ("ibmil", {"merge": "sub"}),
    ("ilra", {"rank": 3, "layer_norm": False}),
    ("acmil", {"attention": "mha"}),
    ("acmil", {"branches": 1, "masked": 0}),
]
VARIED = [("gmmamba", options) for options in ABLATIONS.values()]
VARIED += [(method, {}) for method in MODELS if method != "gmmamba"] + FLAVOURS
ORDERED = {"gmmamba", "dtfd"}
"""Methods to which the order of the patches matters: the scan's, and by which the pseudo-bags are drawn."""


def make(method: str, seed: int = 0, in_dim: int = IN_DIM, **options: Any) -> MILModel:
    torch.manual_seed(seed)
    model = create_model(method, in_dim, 3, **(SMALL.get(method, {"width": 32}) | options)).eval()
    if method in TWO_STAGES and options.get("stage") != 1:
        first = create_model(method, in_dim, 3, **(options | {"stage": 1})).eval()
        model.start_from(first, lambda: (make_bag(9, seed=seed, in_dim=in_dim) for seed in range(5)))
    return model


def make_bag(N: int, groups: int | None = 4, seed: int = 0, in_dim: int = IN_DIM) -> Bag:
    generator = torch.Generator().manual_seed(seed)
    labels = None if groups is None else torch.randint(groups, (N,), generator=generator)
    coords = torch.randint(10_000, (N, 2), generator=generator, dtype=torch.int32)
    return Bag(torch.randn(N, in_dim, generator=generator), coords, labels)


@pytest.mark.parametrize(("method", "options"), VARIED)
@settings(deadline=None, max_examples=12)
@given(N=st.integers(1, 50), groups=st.sampled_from([None, 1, 3, 10, 60]))
def test_any_bag(method: str, options: dict[str, Any], N: int, groups: int | None) -> None:
    output: MILOutput = make(method, **options)(make_bag(N, groups))
    assert output.logits.shape == (1, 3)
    assert torch.isfinite(output.logits).all()
    assert output.attention is not None
    assert output.attention.shape == (N,)
    assert not output.attention.requires_grad
    assert (output.attention >= 0).all()
    torch.testing.assert_close(output.attention.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(("method", "options"), VARIED)
def test_every_parameter_learns(method: str, options: dict[str, Any]) -> None:
    model = make(method, **options).train()
    model.training_loss(make_bag(40), torch.tensor([1]), 0.5).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # As published: the mask is hard, so its head keeps its initial weights; one branch is no use for a loss of its own.
    left = "imm.mask_attention" if options.get("mask") == "published" else "-"
    left = "branch_classifiers" if options.get("branches") == 1 else left
    assert without == {name for name, _ in model.named_parameters() if name.startswith(left)}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", MODELS)
def test_same_seed_same_step(method: str) -> None:
    losses = []
    for _ in range(2):
        model = make(method).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for step in range(3):
            loss = model.training_loss(make_bag(30, seed=step), torch.tensor([step]), step / 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.after_step(step / 3)
        losses.append([loss, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize("method", MODELS)
def test_bfloat16_autocast_runs(method: str) -> None:
    model, bag = make(method), make_bag(30)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(bag)
        loss = model.training_loss(bag, torch.tensor([1]), 0.0)
    loss.backward()
    torch.testing.assert_close(output.logits.float(), model(bag).logits, atol=0.2, rtol=0.05)


@pytest.mark.parametrize(("method", "options"), [(method, {}) for method in MODELS] + FLAVOURS)
def test_order_of_the_patches(method: str, options: dict[str, Any]) -> None:
    """Another order gives the same logits and the attention in that order, or not, as each method says."""
    model, bag = make(method, **options).double(), make_bag(30, groups=None)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    bag.features = bag.features.double()
    first, second = model(bag), model(Bag(bag.features[order], bag.coords[order]))
    same = torch.allclose(first.logits, second.logits, rtol=1e-9, atol=1e-12)
    assert same == (method not in ORDERED)
    if same:
        torch.testing.assert_close(second.attention, first.attention[order])


@pytest.mark.parametrize(("method", "options"), VARIED)
def test_saved_weights_are_all_that_a_prediction_depends_on(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    trained, other, bag = make(method, **options), make(method, seed=1, **options), make_bag(30)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(trained(bag).logits, other(bag).logits)


def test_published_number_of_parameters() -> None:
    model = create_model("gmmamba", 512, 2, **PUBLISHED)
    trained = [p for name, p in model.named_parameters() if not name.startswith(("imm._fc1", "imm.mask_attention"))]
    assert sum(p.numel() for p in trained) == 5_801_219
    assert sum(p.numel() for p in model.parameters()) == 6_129_668


def test_features_of_the_models_width_enter_as_they_are() -> None:
    model, bag = make("gmmamba", in_dim=32), make_bag(20, in_dim=32)
    before = model(bag).logits
    torch.nn.init.normal_(model.get_parameter("imm._fc1.0.weight"))
    assert torch.equal(model(bag).logits, before)


@pytest.mark.parametrize("options", ABLATIONS.values())
def test_permuting_group_labels_permutes_group_features(options: dict[str, Any]) -> None:
    model, bag = make("gmmamba", **options).double(), make_bag(30, groups=3)
    bag.features = bag.features.double()
    assert bag.groups is not None
    first = model(bag)
    for permutation in itertools.permutations(range(3)):
        relabelled = Bag(bag.features, bag.coords, torch.tensor(permutation)[bag.groups])
        second = model(relabelled)
        features = second.details["group_features"][list(permutation)]
        torch.testing.assert_close(features, first.details["group_features"])
        torch.testing.assert_close(second.logits, first.logits)
        torch.testing.assert_close(second.attention, first.attention)


def test_groups_need_not_be_numbered_from_zero() -> None:
    model, bag = make("gmmamba"), make_bag(30, groups=3)
    assert bag.groups is not None
    assert torch.equal(model(bag).logits, model(Bag(bag.features, bag.coords, bag.groups * 7 + 2)).logits)


def test_no_groups_is_one_group() -> None:
    model, bag = make("gmmamba"), make_bag(30, groups=None)
    assert torch.equal(model(bag).logits, model(Bag(bag.features, bag.coords, torch.zeros(30).long())).logits)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), ratio=st.sampled_from([0, 0.01, 0.3, 0.5, 0.99]))
def test_mask_drops_the_lowest_and_never_the_last(sizes: list[int], ratio: float) -> None:
    scores = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(sum(sizes)))
    group = torch.repeat_interleave(torch.tensor(sizes))
    keep = keep_highest(scores, group, torch.tensor(sizes), ratio)
    for kept, values in zip(keep.split(sizes), scores.split(sizes), strict=True):
        dropped = min(max(1, int(ratio * len(values))), len(values) - 1)
        assert (~kept).sum() == dropped
        assert not dropped or values[~kept].max() < values[kept].min()


@settings(deadline=None, max_examples=20)
@given(N=st.integers(1, 40), ratio=st.sampled_from([0, 0.01, 0.3, 0.99]))
def test_adaptive_mask_drops_what_the_head_is_sure_of(N: int, ratio: float) -> None:
    model, bag = make("gmmamba", mask="adaptive", mask_ratio=ratio), make_bag(N, groups=3)
    assert model(bag).details["keep"].all()  # the head knows nothing yet
    torch.nn.init.normal_(model.get_parameter("imm.mask_attention.2.weight"), std=3)
    details = model(bag).details
    parts = [details[name].split(details["group_sizes"].tolist()) for name in ("mask_scores", "keep")]
    for p, keep in zip(*parts, strict=True):
        assert torch.equal(keep, p * len(p) >= ratio)
        assert keep.any()


def test_straight_through_computes_what_published_computes() -> None:
    bag = make_bag(40)
    published, straight = (make("gmmamba", mask=mask) for mask in ("published", "straight_through"))
    straight.load_state_dict(published.state_dict())
    assert torch.equal(published(bag).logits, straight(bag).logits)


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4), mask=st.sampled_from([None, *MASKS]))
def test_a_group_does_not_know_the_others(sizes: list[int], mask: str | None) -> None:
    """Features of each group are those that it has alone, and groups need not go through the mixers together."""
    model, N = make("gmmamba", mask=mask).double(), sum(sizes)
    bag = make_bag(N)
    bag.features, bag.groups = bag.features.double(), torch.repeat_interleave(torch.tensor(sizes))
    together = model(bag).details["group_features"]
    with mock.patch.object(imm, "ROWS", 5):
        torch.testing.assert_close(model(bag).details["group_features"], together)
    for g in range(len(sizes)):
        own = bag.groups == g
        alone = model(Bag(bag.features[own], bag.coords[own], None)).details["group_features"]
        torch.testing.assert_close(alone[0], together[g])


@pytest.mark.parametrize("options", [PUBLISHED, {}, {"mask": "gated"}], ids=["published", "default", "gated"])
def test_gradients_of_the_whole_model_against_finite_differences(options: dict[str, Any]) -> None:
    model = make("gmmamba", in_dim=8, width=8, d_state=2, **options).double()
    for name, parameter in model.named_parameters():
        if name == "imm.mask_attention.2.weight":
            torch.nn.init.normal_(parameter)  # equal scores would change order under any difference
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 1])

    def logits(features: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        bag = Bag(features, torch.zeros(7, 2), labels)
        return torch.func.functional_call(model, named, (bag,)).logits

    features = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = [features, *(p.detach() for p in model.parameters())]
    assert torch.autograd.gradcheck(logits, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_instance_dropout_is_for_training_alone() -> None:
    model, bag = make("gmmamba", instance_dropout=0.5), make_bag(41)
    assert len(model(bag).details["order"]) == 41
    torch.manual_seed(0)
    output = model.train()(bag)
    assert len(output.details["order"]) == 21
    assert (output.attention > 0).sum() == 21
    assert len(model(make_bag(1)).details["order"]) == 1


def test_scaled_affinity_is_not_one_hot() -> None:
    """Of LayerNorm's outputs, whose affinity is in the hundreds."""
    X = torch.nn.functional.layer_norm(torch.randn(10, 512, generator=torch.Generator().manual_seed(0)), (512,))
    published, scaled = (CSS(512, affinity=affinity)(X)[2]["affinity"] for affinity in ("published", "scaled"))
    assert published.max() > 0.9
    assert scaled.max() < 0.2


def test_masked_instances_have_no_attention() -> None:
    output = make("gmmamba", **PUBLISHED)(make_bag(40))
    masked = output.details["order"][~output.details["keep"]]
    assert len(masked) > 0
    assert (output.attention[masked] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_css_variants_are_what_the_table_says(variant: str) -> None:
    torch.manual_seed(0)
    css, X = CSS(32, variant), torch.randn(5, 32) * 0.3
    F_, importance, steps = css(X)
    m, Q, c, r = (steps.get(name) for name in ("max_super", "affinity", "cross_super", "mha_super"))
    source = {"cmax": m, "cca": c, "cmha": r, "css": r}[variant.removesuffix("_q")]
    expected = Q @ source if variant.endswith("_q") or variant == "css" else source.expand(5, 32)
    torch.testing.assert_close(F_, expected + c if variant == "css" else expected)
    torch.testing.assert_close(importance.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gmamba", {}, "unknown method 'gmamba': did you mean 'gmmamba'"),
        ("gmmamba", {"mask_ration": 0.1}, "unknown hyperparameter of gmmamba 'mask_ration': did you mean 'mask_ratio'"),
        ("abmil", {"widht": 8}, "unknown hyperparameter of abmil 'widht': did you mean 'width'"),
        ("gmmamba", {"css": "cmhaq"}, "unknown css variant 'cmhaq': did you mean 'cmha_q'"),
        ("gmmamba", {"mask": "publishd"}, "unknown mask 'publishd': did you mean 'published'"),
        ("gmmamba", {"mask_ratio": 1.0}, r"mask_ratio is 1.0: give a share"),
        ("gmmamba", {"instance_dropout": 1.0}, r"instance_dropout is 1.0: give a share"),
        ("gmmamba", {"affinity": "scald"}, "unknown affinity 'scald': did you mean 'scaled'"),
        ("gmmamba", {"token": "mx"}, "unknown token 'mx': did you mean 'max'"),
        ("clam", {"branches": "mlti"}, "unknown branches 'mlti': did you mean 'multi'"),
        ("clam", {"instance_loss": "hinge"}, "unknown instance_loss 'hinge': Known: svm, ce"),
        ("dtfd", {"distill": "MaxMin"}, "unknown distill 'MaxMin': did you mean 'MaxMinS'"),
        ("ibmil", {"stage": 3}, "stage is 3: IBMIL has the stages 1 and 2"),
        ("ibmil", {"merge": "ad"}, "unknown merge 'ad': did you mean 'add'"),
        ("ilra", {"width": 12}, "width is 12: ILRA needs a multiple of its heads, 8"),
        ("acmil", {"attention": "mha", "width": 12}, "width is 12: ACMIL with attention mha needs a multiple of 8"),
    ],
)
def test_wrong_names_and_values_are_errors(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(method, IN_DIM, 2, **options)
