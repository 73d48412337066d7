"""What is each attention-pooling baseline's own, beside the reference cases (test_verify.py) and what every model
shares (test_models.py)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gmmamba.models import create_model
from gmmamba.models.bag import Bag, MILModel

IN_DIM = 8


def make(method: str, n_classes: int = 3, seed: int = 0, **options: Any) -> MILModel:
    torch.manual_seed(seed)
    return create_model(method, IN_DIM, n_classes, **options).eval()


def make_bag(N: int, seed: int = 0) -> Bag:
    features = torch.randn(N, IN_DIM, generator=torch.Generator().manual_seed(seed))
    return Bag(features, torch.zeros(N, 2, dtype=torch.int32))


def embeddings(model: MILModel, bag: Bag) -> Tensor:
    return model.embed(bag.features) if hasattr(model, "embed") else bag.features


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("abmil", {}),
        ("clam", {}),
        ("acmil", {}),
        ("ibmil", {"stage": 1}),
        *(("dtfd", {"distill": distill, "instances": 2}) for distill in ("MaxMinS", "MaxS", "AFS")),
    ],
)
@pytest.mark.parametrize("N", [1, 3, 50])
def test_attention_is_the_weight_of_the_embeddings_in_the_slide_feature(
    method: str, options: dict[str, Any], N: int
) -> None:
    model, bag = make(method, **options), make_bag(N)
    feature, attention = model.encode(bag)
    assert feature.shape == (1, model.width)
    torch.testing.assert_close(feature, attention[None] @ embeddings(model, bag))
    torch.testing.assert_close(attention, model(bag).attention)


@pytest.mark.parametrize(
    ("method", "classifier"), [("clam", "classifiers.0"), ("ilra", "classifier"), ("acmil", "classifier")]
)
def test_the_classifier_sees_the_encoded_feature(method: str, classifier: str) -> None:
    model, bag = make(method), make_bag(20)
    torch.testing.assert_close(model.get_submodule(classifier)(model.encode(bag)[0]), model(bag).logits)


@pytest.mark.parametrize("branches", ["single", "multi"])
@pytest.mark.parametrize("N", [1, 3, 12])
def test_clam_learns_from_a_slide_of_fewer_patches_than_it_ranks(branches: str, N: int) -> None:
    model, bag, label = make("clam", branches=branches, dropout=0, attention_dropout=0), make_bag(N), torch.tensor([1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        parts = model.losses(model.train()(bag), label)
        assert parts["inst_labels"].shape == (3, 2 * min(N, 8))
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    assert losses[-1] < losses[0]


def test_clam_drops_what_it_is_told_to() -> None:
    bag = make_bag(30)
    without = make("clam", dropout=0, attention_dropout=0)
    assert torch.equal(without(bag).logits, without.train()(bag).logits)
    inside = make("clam", dropout=0, attention_dropout=0.5)
    assert not torch.equal(inside(bag).logits, inside.train()(bag).logits)


def test_clam_of_several_branches_has_no_one_slide_feature() -> None:
    with pytest.raises(NotImplementedError, match="use branches: single"):
        make("clam", branches="multi").encode(make_bag(3))


@pytest.mark.parametrize(("method", "options"), [("dsmil", {}), ("ibmil", {}), ("ibmil", {"stage": 1})])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_probabilities_are_the_sigmoids_over_their_sum(method: str, options: dict[str, Any], n_classes: int) -> None:
    model = make(method, n_classes, **options)
    for seed in range(10):
        output = model(make_bag(20, seed))
        sigmoids, p = output.details["logits"].sigmoid(), output.logits.softmax(1)
        torch.testing.assert_close(p, sigmoids / sigmoids.sum())
        assert p.argmax() == output.details["logits"].argmax()
    if n_classes == 2:  # sigmoids that agree are the probabilities themselves
        last = model.classifier
        with torch.no_grad():
            last.weight[1], last.bias[1] = -last.weight[0], -last.bias[0]
        output = model(make_bag(20))
        torch.testing.assert_close(output.logits.softmax(1), output.details["logits"].sigmoid())


@pytest.mark.parametrize("distill", ["MaxMinS", "MaxS", "AFS"])
def test_dtfd_predicts_the_same_twice_and_leaves_chance_alone(distill: str) -> None:
    model, bag = make("dtfd", distill=distill), make_bag(50)
    state = torch.get_rng_state()
    first = model(bag)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = model(bag)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.attention, second.attention)
    torch.testing.assert_close(first.logits.exp().sum(), torch.tensor(1.0))
    splits = torch.cat([split["logits"] for split in model.fixed_splits(bag)]).softmax(1)
    torch.testing.assert_close(first.logits.softmax(1)[0], splits.mean(0))
    assert not torch.equal(splits[0], splits[1])


def test_dtfd_trains_on_a_split_that_changes() -> None:
    model, bag, label = make("dtfd").train(), make_bag(50), torch.tensor([1])
    assert model.training_loss(bag, label, 0.0) != model.training_loss(bag, label, 0.0)


def test_dtfd_keeps_the_second_tier_out_of_the_first() -> None:
    """As the published order of updates has it."""
    model, bag, label = make("dtfd"), make_bag(50), torch.tensor([1])
    split = model.split(*model.embed_bag(bag), torch.randperm(50), detach=True)
    first = [parameter for name, parameter in model.named_parameters() if not name.startswith("tier2")]
    grads = torch.autograd.grad(model.losses(split, label)["loss_tier2"], first, allow_unused=True)
    assert set(grads) == {None}


def test_ibmil_takes_the_clusters_of_the_first_stage_as_confounders() -> None:
    first, second = make("ibmil", stage=1), make("ibmil", seed=1, confounders=2)
    with torch.no_grad():
        first.attention[2].weight.zero_()  # equal attention: M is the mean of the features
    here, there = torch.eye(IN_DIM)[:2]
    Ms = [here, 3 * here, 2 * there]  # lengths must not count in the clusters, but do in their means
    before = second(make_bag(5)).logits
    second.start_from(first, lambda: (Bag(M.expand(4, IN_DIM), torch.zeros(4, 2)) for M in Ms))
    order = second.confounders[:, 0].argsort(descending=True)
    torch.testing.assert_close(second.confounders[order], torch.stack([2 * here, 2 * there]))
    assert not torch.equal(second(make_bag(5)).logits, before)
    assert "confounders" in second.state_dict()
    assert not second.confounders.requires_grad


def test_ibmil_has_fewer_confounders_where_there_are_fewer_slides() -> None:
    first, second = make("ibmil", stage=1), make("ibmil", seed=1)
    second.start_from(first, lambda: map(make_bag, range(1, 6)))
    assert second.confounders.shape == (8, IN_DIM)
    Ms = torch.cat([first.encode(make_bag(N))[0] for N in range(1, 6)])
    torch.testing.assert_close(second.confounders[:5].sort(0).values, Ms.sort(0).values)
    weights = second(make_bag(9)).details["attn_or_deconf_attn"][:, 0]
    assert (weights[:5] > 0).all()
    assert (weights[5:] == 0).all()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_ibmil_does_not_train_without_confounders() -> None:
    model = make("ibmil")
    with pytest.raises(ValueError, match="stage 2 of IBMIL has no confounders"):
        model.training_loss(make_bag(5), torch.tensor([1]), 0.0)
    model.start_from(make("ibmil", stage=1), lambda: [make_bag(5)])
    assert torch.isfinite(model.training_loss(make_bag(5), torch.tensor([1]), 0.0))


@pytest.mark.parametrize("attention", ["gated", "mha"])
@pytest.mark.parametrize(("N", "masked"), [(1, 0), (3, 1), (7, 4), (50, 6)])
def test_acmil_masks_some_of_the_strongest_in_training_alone(attention: str, N: int, masked: int) -> None:
    model, bag = make("acmil", attention=attention, dropout=0), make_bag(N)
    plain = model(bag).details
    assert not plain["masked"].any()
    hidden = model.train()(bag).details["masked"]
    assert (hidden.sum(2) == masked).all()
    strongest = plain["attn_raw"].argsort(dim=2, descending=True).argsort(dim=2) < 10
    assert not (hidden & ~strongest).any()
