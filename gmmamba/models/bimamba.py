"""Bidirectional Mamba over packed groups (GMMAMBA.md, section 3).

Shapes: N instances in packed order, G groups, D model width, E = 2 D inner width, S state size, R rank of dt.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models.scan import selective_scan


class BiMamba(nn.Module):
    """The mixer: W_in, W_out and the gate z are shared by both directions, the rest exists twice (`…` and `…_b`).

    Parameter names are the published ones. Initialised as Mamba does it; the IMM may overwrite that.
    """

    def __init__(self, width: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, scan: str = "auto"):
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.scan = scan
        self.split = [rank, d_state, d_state]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.x_proj_b = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_proj = step_projection(rank, inner)
        self.dt_proj_b = step_projection(rank, inner)
        A_log = torch.arange(1.0, d_state + 1).log().repeat(inner, 1)
        self.A_log = nn.Parameter(A_log)
        self.A_b_log = nn.Parameter(A_log.clone())
        self.D = nn.Parameter(torch.ones(inner))
        self.D_b = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """(N, D) of groups of `sizes` (G,), one behind the other, to (N, D); no group sees another."""
        W_u, W_z = self.in_proj.weight.chunk(2)  # [u; z] = W_in x; z comes last, when the rest is gone from memory
        # Both directions, forward and backward, at once: (2, N, ·)
        u = causal_conv(F.linear(x, W_u), sizes, self.conv1d, self.conv1d_b)
        u = F.silu(u, inplace=not torch.is_grad_enabled())
        dt, B, C = torch.bmm(u, both(self.x_proj.weight, self.x_proj_b.weight).mT).split(self.split, dim=2)
        W_dt, b_dt = both(self.dt_proj.weight, self.dt_proj_b.weight), both(self.dt_proj.bias, self.dt_proj_b.bias)
        dt = F.softplus(torch.baddbmm(b_dt.unsqueeze(1), dt, W_dt.mT))
        A = -both(self.A_log, self.A_b_log).exp()
        D = both(self.D, self.D_b)
        y = selective_scan(u, dt, A, B, C, D, sizes, reverse=(False, True), backend=self.scan).sum(0)
        del u, dt  # room for the gate
        gate = F.silu(F.linear(x, W_z))
        out: Tensor = self.out_proj(y * gate)  # W_out (y_forward silu(z) + y_backward silu(z))
        return out


def both(forward: Tensor, backward: Tensor) -> Tensor:
    """The parameters of both directions, (2, …)."""
    return torch.stack([forward, backward])


def step_projection(rank: int, inner: int) -> nn.Linear:
    """W_dt and b_dt as Mamba initialises them: softplus(b_dt) is log-uniform in [1e-3, 1e-1]."""
    projection = nn.Linear(rank, inner)
    nn.init.uniform_(projection.weight, -(rank**-0.5), rank**-0.5)
    dt = torch.exp(torch.rand(inner) * math.log(1e-1 / 1e-3) + math.log(1e-3))
    with torch.no_grad():
        projection.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    return projection


def causal_conv(x: Tensor, sizes: Tensor, forward: nn.Conv1d, backward: nn.Conv1d) -> Tensor:
    """Depthwise convolution of each group over its past, and over its future: (N, E) to (2, N, E).

    A sum of shifted copies of x, in which gaps of zeros keep the groups apart.
    """
    taps = both(forward.weight, backward.weight).squeeze(2)  # (2, E, W), the last tap meets the instance itself
    gap = taps.shape[2] - 1
    group = torch.repeat_interleave(sizes)
    row = torch.arange(len(x), device=x.device) + gap * group
    length = len(x) + gap * (len(sizes) - 1)
    padded = x.new_zeros(length + 2 * gap, x.shape[1]).index_copy(0, row + gap, x)
    assert forward.bias is not None
    assert backward.bias is not None
    directions = []
    for k, bias in enumerate((forward.bias, backward.bias)):
        out = bias.expand(length, -1)
        for j in range(gap + 1):
            start = 2 * gap - j if k else j
            out = torch.addcmul(out, padded[start : start + length], taps[k, :, j])
        directions.append(out.index_select(0, row))
    return torch.stack(directions)
