"""The selective scan of Mamba over packed groups, in both directions at once.

All groups of a slide lie behind one another in one sequence, without padding; the state starts at zero in each
group. Backends of one interface, chosen by name and held equal by the tests:

    torch    the recurrence as it is written on paper: the oracle of the others, slow backward
    packed   pure PyTorch, all groups and directions advance together, states recomputed in backward: the CPU's

Shapes: N instances, K directions, E inner width (1024), S state size (16), G groups, T the longest group's length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmmamba.models import known


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    sizes: Tensor,
    reverse: Sequence[bool] = (False, True),
    backend: str = "packed",
) -> Tensor:
    """y of  s_t = exp(dt_t A) * s_{t-1} + dt_t B_t u_t,  y_t = C_t . s_t + D u_t  (GMMAMBA.md, section 3).

    Args:
        u: (K, N, E) inputs after convolution and SiLU, rows in packed order for every direction.
        dt: (K, N, E) step sizes, after softplus.
        A: (K, E, S), negative.
        B: (K, N, S).
        C: (K, N, S).
        D: (K, E).
        sizes: (G,) int64, instances of each group, all >= 1; they sum to N.
        reverse: for each direction, whether t runs from a group's last instance to its first.
        backend: one of BACKENDS.

    Returns:
        (K, N, E), rows in packed order also for the reversed directions. The state is float32 for inputs of
        lower precision.
    """
    scan = BACKENDS[known("scan backend", backend, BACKENDS)]
    given, state_dtype = u.dtype, torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        u, dt, A, B, C, D = (x.to(state_dtype) for x in (u, dt, A, B, C, D))
        y = scan(u, dt, A, B, C, sizes.tolist(), list(reverse))
        return (y + D.unsqueeze(1) * u).to(given)


def torch_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: list[int], reverse: list[bool]) -> Tensor:
    """C_t . s_t, one direction, group and instance after the other."""
    y: list[Tensor] = []
    for k, backwards in enumerate(reverse):
        for u_g, dt_g, B_g, C_g in zip(*(x[k].split(sizes) for x in (u, dt, B, C)), strict=True):
            steps = list(zip(u_g.unbind(), dt_g.unbind(), B_g.unbind(), C_g.unbind(), strict=True))
            state, outputs = torch.zeros_like(A[k]), []
            for u_t, dt_t, B_t, C_t in reversed(steps) if backwards else steps:
                state = torch.exp(dt_t[:, None] * A[k]) * state + (dt_t * u_t)[:, None] * B_t
                outputs.append(state @ C_t)
            y += reversed(outputs) if backwards else outputs
    return torch.stack(y).view_as(u)


@dataclass
class TimeMajor:
    """Instances ordered by their time t inside their group, then by their group's length, longest first.

    The groups that still run at time t are then the first `rows[t]` ones, at time-major rows
    starts[t] … starts[t] + rows[t] - 1.
    """

    slot: Tensor
    """(K, N) the time-major row of each packed row, for each direction."""
    rows: list[int]
    """(T,) groups that have an instance at time t; never increases."""
    starts: list[int]
    """(T,) the time-major row of the first of them."""

    @staticmethod
    def of(sizes: list[int], reverse: list[bool], device: torch.device) -> TimeMajor:
        length = torch.tensor(sizes)
        rank = torch.empty_like(length)
        rank[length.argsort(descending=True, stable=True)] = torch.arange(len(sizes))
        group = torch.repeat_interleave(length)
        position = torch.arange(len(group)) - (length.cumsum(0) - length)[group]
        rows = (length[:, None] > torch.arange(max(sizes))).sum(0)
        starts = rows.cumsum(0) - rows
        time = torch.stack([length[group] - 1 - position if backwards else position for backwards in reverse])
        return TimeMajor((starts[time] + rank[group]).to(device), rows.tolist(), starts.tolist())

    def gather(self, x: Tensor) -> Tensor:
        """Packed (K, N, ·) to time-major (N, K, ·)."""
        out = x.new_empty(x.shape[1], x.shape[0], x.shape[2])
        for k, slot in enumerate(self.slot):
            out[:, k].index_copy_(0, slot, x[k])
        return out

    def scatter(self, x: Tensor) -> Tensor:
        """Time-major (N, K, ·) to packed (K, N, ·)."""
        return torch.stack([x[:, k].index_select(0, slot) for k, slot in enumerate(self.slot)])


def packed_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: list[int], reverse: list[bool]
) -> Tensor:
    """C_t . s_t, one step of all groups and directions after the other."""
    y: Tensor = PackedScan.apply(u, dt, A, B, C, TimeMajor.of(sizes, reverse, u.device))
    return y


class PackedScan(torch.autograd.Function):
    """The recurrence with its own backward: linear in N, and states kept only at every sqrt(T)-th step.

    Inside, states are (R, K, S, E) for the R groups that still run: E innermost, so that every operation runs
    along contiguous memory, and the sums over S are small matrix products.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, layout: TimeMajor) -> Tensor:
        u, dt, B, C = (layout.gather(x) for x in (u, dt, B, C))
        A = A.transpose(1, 2).contiguous()  # (K, S, E)
        du = dt * u
        y = torch.empty_like(u)
        state = A.new_zeros(layout.rows[0], *A.shape)
        decay = torch.empty_like(state)
        every = math.isqrt(len(layout.rows) - 1) + 1
        kept = []  # the states before steps 0, every, 2 every, …
        for t, (R, start) in enumerate(zip(layout.rows, layout.starts, strict=True)):
            if t % every == 0 and any(ctx.needs_input_grad):
                kept.append(state[:R].clone())
            now = slice(start, start + R)
            step(state[:R], state[:R], decay[:R], dt[now], du[now], A, B[now])
            torch.matmul(C[now].unsqueeze(2), state[:R], out=y[now].unsqueeze(2))
        ctx.save_for_backward(u, dt, A, B, C, *kept)
        ctx.layout = layout
        return layout.scatter(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: TimeMajor = ctx.layout
        u, dt, A, B, C, *kept = ctx.saved_tensors
        dy = layout.gather(grads[0])
        du = dt * u
        g_u, g_dt, g_A, g_B, g_C = (torch.zeros_like(x) for x in (u, dt, A, B, C))
        T = len(layout.rows)
        every = math.isqrt(T - 1) + 1
        g = A.new_zeros(layout.rows[0], *A.shape)  # gradient of the state
        q = torch.empty_like(g)
        states = A.new_empty(every + 1, *g.shape)
        decays = A.new_empty(every, *g.shape)
        for first in reversed(range(0, T, every)):
            steps = range(first, min(first + every, T))
            states[0, : layout.rows[first]] = kept[first // every]
            for j, t in enumerate(steps):
                R, now = layout.rows[t], slice(layout.starts[t], layout.starts[t] + layout.rows[t])
                step(states[j + 1, :R], states[j, :R], decays[j, :R], dt[now], du[now], A, B[now])
            for j, t in reversed(list(enumerate(steps))):
                R, now = layout.rows[t], slice(layout.starts[t], layout.starts[t] + layout.rows[t])
                g_t, q_t, before, after = g[:R], q[:R], states[j, :R], states[j + 1, :R]
                outer(g_t, C[now], dy[now])
                torch.matmul(dy[now].unsqueeze(2), after.mT, out=g_C[now].unsqueeze(2))
                torch.matmul(du[now].unsqueeze(2), g_t.mT, out=g_B[now].unsqueeze(2))
                torch.matmul(B[now].unsqueeze(2), g_t, out=g_u[now].unsqueeze(2))  # of dt u, as yet
                g_t.mul_(decays[j, :R])  # now the gradient of the state before
                torch.mul(g_t, before, out=q_t)  # the gradient of dt A
                torch.sum(torch.mul(q_t, A, out=after), 2, out=g_dt[now])  # `after` has served
                g_A += q_t.mul_(dt[now].unsqueeze(2)).sum(0)
        g_dt += g_u * u
        g_u *= dt
        g_u, g_dt, g_B, g_C = (layout.scatter(x) for x in (g_u, g_dt, g_B, g_C))
        return g_u, g_dt, g_A.transpose(1, 2), g_B, g_C, None


def step(after: Tensor, before: Tensor, decay: Tensor, dt: Tensor, du: Tensor, A: Tensor, B: Tensor) -> None:
    """after = exp(dt A) * before + B du, and the decay exp(dt A), for one time of R groups.

    after, before, decay: (R, K, S, E); dt, du: (R, K, E); A: (K, S, E); B: (R, K, S).
    """
    torch.mul(dt.unsqueeze(2), A, out=decay).exp_()
    torch.mul(before, decay, out=after)
    outer(after, B, du)


def outer(state: Tensor, over_s: Tensor, over_e: Tensor) -> None:
    """state += over_s ⊗ over_e, in place. state: (R, K, S, E); over_s: (R, K, S); over_e: (R, K, E)."""
    state.flatten(0, 1).baddbmm_(over_s.flatten(0, 1).unsqueeze(2), over_e.flatten(0, 1).unsqueeze(1))


BACKENDS = {"torch": torch_scan, "packed": packed_scan}
