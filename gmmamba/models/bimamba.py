"""The Mamba mixer: one scan over packed groups, or one in each direction (Zheng et al., ICCV 2025).

Shapes: N instances in packed order, G groups, D model width, E = 2 D inner width, S state size, R rank of dt,
K branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models.scan import selective_scan


class Mamba(nn.Module):
    """The mixer of Mamba: each instance sees those before it in its group.

    A mixer of more branches, below, shares W_in, W_out and the gate z; the rest exists once a branch, under the
    published parameter names (`…`, `…_b`). Initialised as Mamba does it; a model's own `init` may overwrite that.
    """

    branches: tuple[str, ...] = ("",)
    """What the parameter names of each end in."""
    reverse: tuple[bool, ...] = (False,)
    """Whether each runs from a group's last instance to its first."""
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(self, width: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, scan: str = "auto"):
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.scan = scan
        self.split = [rank, d_state, d_state]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for branch in self.branches:
            self.add_module("conv1d" + branch, nn.Conv1d(inner, inner, d_conv, groups=inner))
        for branch in self.branches:
            self.add_module("x_proj" + branch, nn.Linear(inner, sum(self.split), bias=False))
        for branch in self.branches:
            self.add_module("dt_proj" + branch, step_projection(rank, inner))
            A_log = torch.arange(1.0, d_state + 1).log().repeat(inner, 1)
            self.register_parameter(f"A{branch}_log", nn.Parameter(A_log))
            self.register_parameter("D" + branch, nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """(N, D) of groups of `sizes` (G,), one behind the other, to (N, D); no group sees another."""
        W_u, W_z = self.in_proj.weight.chunk(2)  # [u; z] = W_in x; z comes last, when the rest is gone from memory
        y = self.merge(self.state_space(self.convolve(F.linear(x, W_u), sizes), sizes))
        gate = F.silu(F.linear(x, W_z))
        out: Tensor = self.out_proj(y * gate)  # W_out (sum over branches of y silu(z))
        return out

    def convolve(self, u: Tensor, sizes: Tensor) -> Tensor:
        """What each branch scans, but for SiLU: (N, E) to (K, N, E)."""
        return causal_conv(u, sizes, self.convs, self.reverse)

    def merge(self, y: Tensor) -> Tensor:
        """The branches' (K, N, E) to (N, E)."""
        return y.sum(0)

    def state_space(self, u: Tensor, sizes: Tensor) -> Tensor:
        """SiLU, dt, B and C of it, and the scan, of all branches at once: (K, N, E) to (K, N, E)."""
        u = F.silu(u, inplace=not torch.is_grad_enabled())
        dt, B, C = torch.bmm(u, self.stack("x_proj{}.weight").mT).split(self.split, dim=2)
        b_dt = self.stack("dt_proj{}.bias").unsqueeze(1)
        dt = F.softplus(torch.baddbmm(b_dt, dt, self.stack("dt_proj{}.weight").mT))
        A = -self.stack("A{}_log").exp()
        return selective_scan(u, dt, A, B, C, self.stack("D{}"), sizes, self.reverse, self.scan)

    @property
    def convs(self) -> list[nn.Conv1d]:
        """The branches' convolutions."""
        return [getattr(self, "conv1d" + branch) for branch in self.branches]

    def stack(self, name: str) -> Tensor:
        """A parameter of every branch, (K, …)."""
        return torch.stack([attrgetter(name.format(branch))(self) for branch in self.branches])


class BiMamba(Mamba):
    """Two branches, one forward and one backward."""

    branches = ("", "_b")
    reverse = (False, True)
    A_b_log: nn.Parameter
    D_b: nn.Parameter


def step_projection(rank: int, inner: int) -> nn.Linear:
    """W_dt and b_dt as Mamba initialises them: softplus(b_dt) is log-uniform in [1e-3, 1e-1]."""
    projection = nn.Linear(rank, inner)
    nn.init.uniform_(projection.weight, -(rank**-0.5), rank**-0.5)
    dt = torch.exp(torch.rand(inner) * math.log(1e-1 / 1e-3) + math.log(1e-3))
    with torch.no_grad():
        projection.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    return projection


def causal_conv(x: Tensor, sizes: Tensor, convs: Sequence[nn.Conv1d], reverse: Sequence[bool]) -> Tensor:
    """Depthwise convolutions of each group over its past, or in reverse over its future: (N, E) to (K, N, E).

    A sum of shifted copies of x, in which gaps of zeros keep the groups apart.
    """
    gap = convs[0].kernel_size[0] - 1
    group = torch.repeat_interleave(sizes)
    row = torch.arange(len(x), device=x.device) + gap * group
    length = len(x) + gap * (len(sizes) - 1)
    padded = x.new_zeros(length + 2 * gap, x.shape[1]).index_copy(0, row + gap, x)
    outputs = []
    for conv, backwards in zip(convs, reverse, strict=True):
        taps = conv.weight.squeeze(1)  # (E, W), the last tap meets the instance itself
        assert conv.bias is not None
        out = conv.bias.expand(length, -1)
        for j in range(gap + 1):
            start = 2 * gap - j if backwards else j
            out = torch.addcmul(out, padded[start : start + length], taps[:, j])
        outputs.append(out.index_select(0, row))
    return torch.stack(outputs)
