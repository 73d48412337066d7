"""CSS on top of every method that encodes a bag."""

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmmamba.models import CSS_HOSTS, MODELS, TWO_STAGES, create_model
from gmmamba.models.bag import Bag, MILModel
from gmmamba.models.css_plugin import CSSPlugin

OPTIONS: dict[str, dict[str, Any]] = {"dtfd": {"distill": "AFS"}}  # where a method encodes only so


def encodes(method: str) -> bool:
    module, _, name = MODELS[method].partition(":")
    return getattr(import_module(module), name).encode is not MILModel.encode


HOSTS = [method for method in MODELS if encodes(method) and method not in TWO_STAGES]


def plugged(host: str, css: bool | str = True, width: int = 16) -> Any:
    torch.manual_seed(0)
    return create_model(host, 12, 3, width=width, css=css, **OPTIONS.get(host, {})).eval()


def make_bag(N: int, groups: int | None) -> Bag:
    generator = torch.Generator().manual_seed(N)
    labels = None if groups is None else torch.randint(groups, (N,), generator=generator)
    coords = torch.randint(10_000, (N, 2), generator=generator, dtype=torch.int32)
    return Bag(torch.randn(N, 12, generator=generator), coords, labels)


def test_the_registry_knows_the_hosts() -> None:
    assert CSS_HOSTS & set(MODELS) == set(HOSTS)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("css", [True, "published"])
@settings(deadline=None, max_examples=8)
@given(N=st.integers(1, 30), groups=st.sampled_from([None, 1, 4, 40]))
def test_any_bag_and_the_attention_is_the_hosts_times_the_groups(
    host: str, css: bool | str, N: int, groups: int | None
) -> None:
    model, bag = plugged(host, css), make_bag(N, groups)
    output = model(bag)
    assert output.logits.shape == (1, 3)
    assert output.attention.shape == (N,)
    assert not output.attention.requires_grad
    assert (output.attention >= 0).all()
    torch.testing.assert_close(output.attention.sum(), torch.tensor(1.0))
    labels = torch.zeros(N) if bag.groups is None else bag.groups
    _, importance, _ = model.css(output.details["group_features"])
    for i, label in enumerate(labels.unique()):
        own = labels == label
        feature, inside = model.host.encode(Bag(bag.features[own], bag.coords[own]))
        torch.testing.assert_close(output.details["group_features"][i], feature[0])
        torch.testing.assert_close(output.attention[own], inside * importance[i])


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_learns_from_the_classifier_above(host: str) -> None:
    model = plugged(host).train()
    bag = make_bag(30, 4)
    first = model.training_loss(bag, torch.tensor([1]), 0.0)
    first.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grads[name] is not None for name in grads if name.startswith(("css.", "cls.")))
    assert any(name.startswith("host.") and grad is not None for name, grad in grads.items())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.training_loss(bag, torch.tensor([1]), 0.0)
        loss.backward()
        optimizer.step()
    assert loss < first / 2


def test_a_width_that_the_heads_do_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"ABMIL has width 20: CSS needs a multiple of 8"):
        plugged("abmil", width=20)


def test_what_cannot_encode_is_no_host() -> None:
    with pytest.raises(ValueError, match="MILModel has no `encode`"):
        CSSPlugin(MILModel(), 2)
    with pytest.raises(ValueError, match="unknown hyperparameter of mean 'css'"):
        create_model("mean", 12, 2, css=True)
