"""The selective scan compiled for the CPU by numba: a block of channels at a time, in cache, vectorised over channels.

Shapes as in scan.py; a block is LANES of the E channels. A task is one direction and one block; tasks share nothing,
so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

LANES = 64
CHUNK = 32  # the state before every CHUNK-th instance is stored, those between are computed again in backward
FAST = {"contract", "reassoc", "nsz"}  # fused multiply-add, vectorised sums; NaN and infinity stay what they are


def numba_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: list[int], reverse: list[bool]) -> Tensor:
    """C_t . s_t on CPU tensors, all of float32 or all of float64."""
    if u.device.type != "cpu":
        raise ValueError(f"scan 'numba' is for the CPU, the model is on {u.device}: set scan: auto")
    y: Tensor = NumbaScan.apply(u, dt, A, B, C, sizes, reverse)
    return y


class NumbaScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: list[int], reverse: list[bool]
    ) -> Tensor:
        u, dt, A, B, C = (x.contiguous() for x in (u, dt, A, B, C))
        K, _, E = u.shape
        chunks = sum(-(-n // CHUNK) for n in sizes) if any(ctx.needs_input_grad) else 0
        kept = u.new_empty(K, chunks, A.shape[2], E)
        y = torch.empty_like(u)
        run_tasks(scan_block, K, E, reverse, (u, dt, A, B, C, np.array(sizes), y, kept))
        ctx.save_for_backward(u, dt, A, B, C, kept)
        ctx.sizes, ctx.reverse = sizes, reverse
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, kept = ctx.saved_tensors
        K, _, E = u.shape
        g_u, g_dt, g_A = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(A)
        # Each block has a share of the sums over channels; they are added in a fixed order.
        g_B, g_C = (u.new_empty(math.ceil(E / LANES), *x.shape) for x in (B, C))
        arrays = (u, dt, A, B, C, np.array(ctx.sizes), grads[0].contiguous(), kept, g_u, g_dt, g_A, g_B, g_C)
        run_tasks(scan_block_backward, K, E, ctx.reverse, arrays)
        return g_u, g_dt, g_A, g_B.sum(0), g_C.sum(0), None, None


def run_tasks(kernel: Callable[..., None], K: int, E: int, reverse: list[bool], arrays: tuple[Any, ...]) -> None:
    """The kernel on every direction and block, on as many threads as torch uses; the kernels let go of the GIL."""
    arrays = tuple(x.detach().numpy() if isinstance(x, Tensor) else x for x in arrays)
    tasks = [(k, first) for k in range(K) for first in range(0, E, LANES)]
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1:
        for k, first in tasks:
            kernel(*arrays, k, first, reverse[k])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda task: kernel(*arrays, *task, reverse[task[0]]), tasks))


@njit(nogil=True, cache=True, fastmath=FAST)
def scan_block(u, dt, A, B, C, sizes, y, kept, k, first, reverse):  # type: ignore[no-untyped-def]
    """y of one direction and block; `kept` (K, chunks, S, E) gets the states before each chunk, if it has room."""
    S, width = A.shape[2], min(LANES, u.shape[2] - first)
    a, state = np.zeros((S, LANES), u.dtype), np.empty((S, LANES), u.dtype)
    a[:, :width] = A[k, first : first + width].T
    dt_t, du_t, y_t = np.zeros(LANES, u.dtype), np.zeros(LANES, u.dtype), np.empty(LANES, u.dtype)
    start = chunk = 0
    for n in sizes:
        state[:] = 0
        for t in range(n):
            i = start + (n - 1 - t if reverse else t)
            if t % CHUNK == 0 and kept.shape[1] > 0:
                kept[k, chunk, :, first : first + width] = state[:, :width]
                chunk += 1
            for e in range(width):
                dt_t[e] = dt[k, i, first + e]
                du_t[e] = dt_t[e] * u[k, i, first + e]
            y_t[:] = 0
            for s in range(S):
                b, c = B[k, i, s], C[k, i, s]
                for e in range(LANES):
                    state[s, e] = exp_of_negative(dt_t[e] * a[s, e]) * state[s, e] + du_t[e] * b
                    y_t[e] += c * state[s, e]
            for e in range(width):
                y[k, i, first + e] = y_t[e]
        start += n


@njit(nogil=True, cache=True, fastmath=FAST)
def scan_block_backward(  # type: ignore[no-untyped-def]
    u, dt, A, B, C, sizes, g_y, kept, g_u, g_dt, g_A, g_B, g_C, k, first, reverse
):
    """Gradients of one direction and block, chunk after chunk from the last: states forward, then back in time."""
    S, width = A.shape[2], min(LANES, u.shape[2] - first)
    block = first // LANES
    a, g, g_a = np.zeros((S, LANES), u.dtype), np.empty((S, LANES), u.dtype), np.zeros((S, LANES), u.dtype)
    a[:, :width] = A[k, first : first + width].T
    states, decays = np.zeros((CHUNK + 1, S, LANES), u.dtype), np.empty((CHUNK, S, LANES), u.dtype)
    dt_t, u_t = np.zeros((CHUNK, LANES), u.dtype), np.zeros((CHUNK, LANES), u.dtype)
    g_y_t, g_du_t, g_dt_t = np.zeros(LANES, u.dtype), np.empty(LANES, u.dtype), np.empty(LANES, u.dtype)
    end, chunk = sizes.sum(), kept.shape[1]
    for group in range(len(sizes) - 1, -1, -1):
        n = sizes[group]
        start = end - n
        g[:] = 0
        for since in range((n - 1) // CHUNK * CHUNK, -1, -CHUNK):
            chunk -= 1
            length = min(CHUNK, n - since)
            states[0, :, :width] = kept[k, chunk, :, first : first + width]
            for j in range(length):
                i = start + (n - 1 - since - j if reverse else since + j)
                for e in range(width):
                    dt_t[j, e] = dt[k, i, first + e]
                    u_t[j, e] = u[k, i, first + e]
                for s in range(S):
                    b = B[k, i, s]
                    for e in range(LANES):
                        decays[j, s, e] = exp_of_negative(dt_t[j, e] * a[s, e])
                        states[j + 1, s, e] = decays[j, s, e] * states[j, s, e] + dt_t[j, e] * u_t[j, e] * b
            for j in range(length - 1, -1, -1):
                i = start + (n - 1 - since - j if reverse else since + j)
                for e in range(width):
                    g_y_t[e] = g_y[k, i, first + e]
                g_du_t[:] = 0
                g_dt_t[:] = 0
                for s in range(S):
                    b, c = B[k, i, s], C[k, i, s]
                    sum_b = sum_c = u.dtype.type(0)
                    for e in range(LANES):
                        g_state = g[s, e] + c * g_y_t[e]
                        sum_c += g_y_t[e] * states[j + 1, s, e]
                        sum_b += g_state * dt_t[j, e] * u_t[j, e]
                        g_du_t[e] += g_state * b
                        g[s, e] = g_state * decays[j, s, e]
                        g_dt_a = g[s, e] * states[j, s, e]
                        g_dt_t[e] += g_dt_a * a[s, e]
                        g_a[s, e] += g_dt_a * dt_t[j, e]
                    g_B[block, k, i, s] = sum_b
                    g_C[block, k, i, s] = sum_c
                for e in range(width):
                    g_u[k, i, first + e] = g_du_t[e] * dt_t[j, e]
                    g_dt[k, i, first + e] = g_dt_t[e] + g_du_t[e] * u_t[j, e]
        end = start
    g_A[k, first : first + width] = g_a[:, :width].T


def exp_of_negative(x: float) -> float:
    """exp(x) for x <= 0, of the precision of x."""
    return math.exp(x)


@overload(exp_of_negative)
def _exp_of_negative(x):  # type: ignore[no-untyped-def]
    return exp_float32 if x == types.float32 else lambda x: math.exp(x)


# exp(x) = 2^n e^r with n = round(x / ln 2), |r| <= ln(2) / 2 and e^r by Cephes' polynomial: relative error 1e-7, no
# branch, so that LLVM computes it for 16 channels at once. ln 2 in two parts keeps r exact.
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
LOWEST, HALF, ONE = np.float32(-87), np.float32(0.5), np.float32(1)
P5, P4, P3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
P2, P1 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1)


def exp_float32(x):  # type: ignore[no-untyped-def]
    x = max(x, LOWEST)  # below, 2^n would leave float32: 1e-38 instead of 0
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN2_HIGH - n * LN2_LOW
    polynomial = ((((P5 * r + P4) * r + P3) * r + P2) * r + P1) * r + HALF
    return (polynomial * r * r + r + ONE) * power_of_two(n)  # type: ignore[call-arg]


@intrinsic
def power_of_two(typing_context: Any, n: types.Type) -> Any:
    """2^n for a whole float32 n in -126 … 127: n + 127 is the exponent's bit field."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[Any]) -> Any:
        i32 = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], i32), ir.Constant(i32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(i32, 23)), ir.FloatType())

    return types.float32(types.float32), generate
