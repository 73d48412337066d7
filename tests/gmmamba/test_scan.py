"""The selective scan: its backends agree with the recurrence as written, and groups do not see each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmmamba.models.bimamba import BiMamba
from gmmamba.models.scan import selective_scan

ON_CPU = ["numba", "torch"]
group_sizes = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def inputs(sizes: list[int], E: int = 5, S: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes) + sum(sizes))
    N = sum(sizes)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    u, dt, A = random(2, N, E), random(2, N, E).exp(), -random(2, E, S).exp()
    return [x.requires_grad_() for x in (u, dt, A, random(2, N, S), random(2, N, S), random(2, E))]


def outputs_and_gradients(arguments: list[Tensor], sizes: list[int], backend: str) -> list[Tensor]:
    y = selective_scan(*arguments, torch.tensor(sizes), backend=backend)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), arguments)]


@settings(deadline=None, max_examples=25)
@given(sizes=st.one_of(group_sizes, st.lists(st.integers(60, 70), min_size=1, max_size=2)), E=st.integers(1, 130))
def test_numba_agrees_with_the_reference_scan(sizes: list[int], E: int) -> None:
    """Groups longer than a chunk, channels that fill no block."""
    arguments = inputs(sizes, E)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        cast = [x.detach().to(dtype).requires_grad_() for x in arguments]
        ours, reference = (outputs_and_gradients(cast, sizes, backend) for backend in ("numba", "torch"))
        for value, expected in zip(ours, reference, strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@settings(deadline=None)
@given(x=st.floats(-200, 0, width=32))
def test_exp_of_numba(x: float) -> None:
    """One step of decay exp(dt A) = exp(x) on a state of 1; below -87 it stays at 1e-38."""
    one, A = torch.ones(1, 2, 1), torch.full((1, 1, 1), x)
    u = torch.tensor([[[1.0], [0.0]]])
    y = selective_scan(u, one, A, one, one, torch.zeros(1, 1), torch.tensor([2]), reverse=[False], backend="numba")
    assert abs(y[0, 1, 0].item() - math.exp(x)) <= max(3e-7 * math.exp(x), 2e-38)


def test_threads_do_not_change_a_bit() -> None:
    arguments, sizes = inputs([50, 3], E=200, dtype=torch.float32), [50, 3]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(outputs_and_gradients(arguments, sizes, "numba"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_reference_scan_follows_the_recurrence() -> None:
    u, dt, A, B, C, D = (x.detach() for x in inputs([3]))
    y = selective_scan(u, dt, A, B, C, D, torch.tensor([3]), reverse=(False, True), backend="torch")
    for k, order in ((0, [0, 1, 2]), (1, [2, 1, 0])):
        for e in range(u.shape[2]):
            state = torch.zeros(A.shape[2], dtype=u.dtype)
            for t in order:
                state = torch.exp(dt[k, t, e] * A[k, e]) * state + dt[k, t, e] * B[k, t] * u[k, t, e]
                torch.testing.assert_close(y[k, t, e], (C[k, t] * state).sum() + D[k, e] * u[k, t, e])


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_against_finite_differences(backend: str) -> None:
    sizes = [4, 1, 6]
    arguments = inputs(sizes, E=2, S=2)
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, torch.tensor(sizes), backend=backend), arguments)


@settings(deadline=None, max_examples=25)
@given(sizes=group_sizes)
def test_packed_groups_equal_separate_groups(sizes: list[int]) -> None:
    torch.manual_seed(0)
    mixer = BiMamba(16, d_state=4).double()
    x = torch.randn(sum(sizes), 16, dtype=torch.float64)
    packed = mixer(x, torch.tensor(sizes))
    separate = torch.cat([mixer(part, torch.tensor([len(part)])) for part in x.split(sizes)])
    torch.testing.assert_close(packed, separate, rtol=1e-11, atol=1e-11)


def test_reversing_the_groups_swaps_the_directions() -> None:
    torch.manual_seed(0)
    mixer = BiMamba(16).double()
    x, sizes = torch.randn(9, 16, dtype=torch.float64), torch.tensor([9])
    swapped = BiMamba(16).double()
    swapped.load_state_dict({twin(name): value for name, value in mixer.state_dict().items()})
    torch.testing.assert_close(swapped(x.flip(0), sizes), mixer(x, sizes).flip(0))


def twin(name: str) -> str:
    """The parameter of the other direction."""
    first, *rest = name.split(".")
    other = {"A_log": "A_b_log", "D": "D_b", "conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b"}
    both = other | {b: a for a, b in other.items()}
    return ".".join([both.get(first, first), *rest])


def test_mamba_initialises_steps_between_1e_3_and_1e_1() -> None:
    steps = torch.nn.functional.softplus(BiMamba(64).dt_proj.bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 1.01e-1


def test_low_precision_keeps_a_float32_state() -> None:
    sizes = [40]
    exact = [x.detach() for x in inputs(sizes, dtype=torch.float32)]
    y = selective_scan(*(x.bfloat16() for x in exact), torch.tensor(sizes))
    reference = selective_scan(*(x.bfloat16().float() for x in exact), torch.tensor(sizes))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference.bfloat16(), rtol=0, atol=0)


def test_two_runs_are_bit_identical() -> None:
    arguments, sizes = inputs([5, 2, 9, 1], E=64, S=16, dtype=torch.float32), [5, 2, 9, 1]
    first, second = (outputs_and_gradients(arguments, sizes, "numba") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown scan backend 'nunba': did you mean 'numba'"):
        selective_scan(*inputs([2]), torch.tensor([2]), backend="nunba")
