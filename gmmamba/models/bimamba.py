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

    def __init__(self, width: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, scan: str = "packed"):
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
        u, z = self.in_proj(x).chunk(2, dim=1)
        directions = [
            (self.conv1d, self.x_proj, self.dt_proj),
            (self.conv1d_b, self.x_proj_b, self.dt_proj_b),
        ]
        inputs = []  # u, dt, B, C of each direction
        padded, row = zero_separated(u, sizes, self.conv1d.kernel_size[0] - 1)
        for (conv, x_proj, dt_proj), reverse in zip(directions, (False, True), strict=True):
            u = F.silu(causal_conv(padded, row, conv, reverse))  # (N, E)
            dt, B, C = x_proj(u).split(self.split, dim=1)
            inputs.append((u, F.softplus(dt_proj(dt)), B, C))
        u, dt, B, C = (torch.stack(pair) for pair in zip(*inputs, strict=True))
        A = -torch.stack([self.A_log, self.A_b_log]).exp()
        D = torch.stack([self.D, self.D_b])
        y = selective_scan(u, dt, A, B, C, D, sizes, reverse=(False, True), backend=self.scan)
        out: Tensor = self.out_proj(y.sum(0) * F.silu(z))  # W_out (y_forward silu(z) + y_backward silu(z))
        return out


def step_projection(rank: int, inner: int) -> nn.Linear:
    """W_dt and b_dt as Mamba initialises them: softplus(b_dt) is log-uniform in [1e-3, 1e-1]."""
    projection = nn.Linear(rank, inner)
    nn.init.uniform_(projection.weight, -(rank**-0.5), rank**-0.5)
    dt = torch.exp(torch.rand(inner) * math.log(1e-1 / 1e-3) + math.log(1e-3))
    with torch.no_grad():
        projection.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    return projection


def zero_separated(x: Tensor, sizes: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """x (N, E) with `gap` zero rows before, between and after its groups, and the row (N,) of each instance there."""
    group = torch.repeat_interleave(sizes)
    row = torch.arange(len(x), device=x.device) + gap * (group + 1)
    padded = x.new_zeros(len(x) + gap * (len(sizes) + 1), x.shape[1])
    return padded.index_copy(0, row, x), row


def causal_conv(padded: Tensor, row: Tensor, conv: nn.Conv1d, reverse: bool) -> Tensor:
    """Depthwise convolution over the past of each group, or with `reverse` over its future, as shifted sums.

    padded, row: from `zero_separated` with a gap of the kernel size - 1. Returns (N, E).
    """
    taps = conv.weight.squeeze(1).T  # (W, E), the last one meets the instance itself
    gap = len(taps) - 1
    length = len(padded) - 2 * gap
    assert conv.bias is not None
    out = conv.bias.expand(length, -1)
    for j, tap in enumerate(taps):
        start = 2 * gap - j if reverse else j
        out = torch.addcmul(out, padded[start : start + length], tap)
    return out.index_select(0, row - gap)
