"""The layout for the official kernels. They need a GPU: here a plain function of their signature stands in."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gmmamba.models import scan_mamba_ssm
from gmmamba.models.scan import torch_scan
from gmmamba.models.scan_mamba_ssm import RESET, mamba_ssm_scan

CASES = [
    ([1], [False]),
    ([5, 1, 3], [False, True]),
    ([2, 7], [True, False]),
    ([1, 1, 1], [True]),
    ([70, 1, 130], [False, True]),
]


def stand_in(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What selective_scan_fn computes, and what it demands of its inputs.

    u, delta: (b, dim, L); A: (dim, S) float32; B, C: (b, groups, S, L), dim split evenly over groups. (b, dim, L).
    """
    assert u.dtype == delta.dtype == B.dtype == C.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert A.dtype == torch.float32
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C))
    given, (u, delta, B, C) = u.dtype, (x.float() for x in (u, delta, B, C))
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))  # (b, dim, S, L)
    state, outputs = torch.zeros_like(B[..., 0]), []
    for t in range(u.shape[2]):
        state = torch.exp(delta[..., t, None] * A) * state + (delta[..., t] * u[..., t])[..., None] * B[..., t]
        outputs.append((state * C[..., t]).sum(2))
    return torch.stack(outputs, 2).to(given)


@pytest.fixture
def use_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_mamba_ssm, "official_kernel", lambda u, S: stand_in)


def inputs(sizes: list[int], K: int, E: int = 6, S: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    N = sum(sizes)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    u, dt, A = random(K, N, E), random(K, N, E).exp(), -random(K, E, S).exp()
    return [x.requires_grad_() for x in (u, dt, A, random(K, N, S), random(K, N, S))]


def outputs_and_gradients(scan, arguments: list[Tensor], sizes: list[int], reverse: list[bool]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    y = scan(*arguments, sizes, reverse)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().to(y.dtype)
    return [y, *torch.autograd.grad(y, arguments, dy)]


@pytest.mark.usefixtures("use_stand_in")
@pytest.mark.parametrize(("sizes", "reverse"), CASES)
def test_agrees_with_the_reference_scan(sizes: list[int], reverse: list[bool]) -> None:
    arguments = inputs(sizes, len(reverse))
    ours, reference = (outputs_and_gradients(s, arguments, sizes, reverse) for s in (mamba_ssm_scan, torch_scan))
    for value, expected in zip(ours, reference, strict=True):
        assert value.shape == expected.shape
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.usefixtures("use_stand_in")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype: torch.dtype) -> None:
    sizes, reverse = [5, 1, 3], [False, True]
    u, dt, A, B, C = (x.detach() for x in inputs(sizes, 2))
    low = [x.requires_grad_() for x in (u.to(dtype), dt.to(dtype), A, B.to(dtype), C.to(dtype))]
    exact = [x.detach().float().requires_grad_() for x in low]
    ours = outputs_and_gradients(mamba_ssm_scan, low, sizes, reverse)
    reference = outputs_and_gradients(torch_scan, exact, sizes, reverse)
    for value, argument, expected in zip(ours, [low[0], *low], reference, strict=True):
        assert value.dtype == argument.dtype
        assert (value - expected).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.usefixtures("use_stand_in")
def test_no_group_sees_another() -> None:
    sizes, reverse = [3, 4, 2], [False, True]
    arguments = inputs(sizes, 2)
    first = outputs_and_gradients(mamba_ssm_scan, arguments, sizes, reverse)
    u, dt, A, B, C = (x.detach().clone() for x in arguments)
    for x in (u, dt, B, C):
        x[:, 3:7] *= 100
    other = outputs_and_gradients(mamba_ssm_scan, [x.requires_grad_() for x in (u, dt, A, B, C)], sizes, reverse)
    for i in (0, 1, 2, 4, 5):  # y and the gradients of u, dt, B and C
        for x, (group, changed) in zip(first[i].split(sizes, 1), enumerate(other[i].split(sizes, 1)), strict=True):
            assert torch.equal(x, changed) == (group != 1)


@pytest.mark.parametrize("A", [-1e-17, -1e15])
def test_a_separator_resets_exactly_and_its_gradients_are_zero(A: float) -> None:
    """In the terms of the kernels' backward pass, with s_before = s - dt u B: for any gradient g of the state."""
    dt, A_, g = torch.tensor(RESET), torch.tensor(A), torch.tensor(1e18)
    assert torch.exp(dt * A_) == 0
    s = torch.exp(dt * A_) * 1e30 + dt * 0 * 0
    carried = s - dt * 0 * 0  # decay * s_before
    for gradient in (g * torch.exp(dt * A_), g * A_ * carried, g * dt * carried, g * 0 * dt, g * dt * 0):
        assert gradient == 0


def test_off_the_gpu_the_error_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match="its inputs are on 'cpu': move model and data to a GPU"):
        mamba_ssm_scan(*inputs([2], 1), [2], [False])


def test_without_mamba_ssm_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    with pytest.raises(RuntimeError, match=r"needs the package mamba-ssm: pip install 'gmmamba\[cuda\]'"):
        scan_mamba_ssm.official_kernel(on_gpu, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 256 states per channel, got d_state 257"):
        scan_mamba_ssm.official_kernel(on_gpu, 257)  # type: ignore[arg-type]


@pytest.mark.usefixtures("use_stand_in")
def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match="has no float64"):
        mamba_ssm_scan(*(x.double() for x in inputs([2], 1)), [2], [False])
