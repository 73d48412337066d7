"""The rebuilt published procedure computes what GMMamba computes, so that the benchmark compares like with like."""

import pytest
import torch

from benchmarks.published import SCANS, PublishedLoop
from gmmamba.grouping import group_coords
from gmmamba.models.bag import Bag
from gmmamba.models.gmmamba import PUBLISHED, GMMamba


def bag_of(N: int, in_dim: int, G: int) -> Bag:
    generator = torch.Generator().manual_seed(N)
    coords = torch.randint(100_000, (N, 2), generator=generator, dtype=torch.int32)
    labels = torch.from_numpy(group_coords(coords.numpy(), "location", G)).long()
    assert labels.bincount(minlength=G).min() >= 2
    return Bag(torch.randn(N, in_dim, generator=generator, dtype=torch.float64, requires_grad=True), coords, labels)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("N", "G", "in_dim", "mask_ratio"), [(2, 1, 32, 0.3), (23, 3, 32, 0.0), (60, 4, 24, 0.3)])
def test_the_published_loop_gives_the_logits_and_gradients_of_ours(
    scan: str, N: int, G: int, in_dim: int, mask_ratio: float
) -> None:
    torch.manual_seed(0)
    model = GMMamba(in_dim, 3, width=32, mask_ratio=mask_ratio, **PUBLISHED).double().eval()
    bag, weights = bag_of(N, in_dim, G), torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    inputs = [bag.features, *model.parameters()]

    logits = model(bag).logits
    published = PublishedLoop(model, G, scan)(bag).logits
    torch.testing.assert_close(published, logits, rtol=1e-10, atol=1e-10)

    ours = torch.autograd.grad((logits * weights).sum(), inputs, allow_unused=True)
    theirs = torch.autograd.grad((published * weights).sum(), inputs, allow_unused=True)
    names = ["features", *(name for name, _ in model.named_parameters())]
    assert {name for name, g in zip(names, ours, strict=True) if g is None} <= {
        *(name for name in names if name.startswith("imm.mask_attention")),
        *(() if in_dim != 32 else ("imm._fc1.0.weight", "imm._fc1.0.bias")),
    }
    for name, own, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-9, atol=1e-9, msg=name) if own is not None else None
        assert (own is None) == (other is None), name


def test_both_scans_agree_with_each_other_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, bag = GMMamba(16, 2, width=16, **PUBLISHED).eval(), bag_of(30, 16, 2)
    bag.features = bag.features.detach().float()
    reference, unbound = (PublishedLoop(model, 2, scan)(bag).logits for scan in SCANS)
    assert torch.equal(reference, unbound)
