"""The selective scan as fused Triton kernels: forward and backward are one launch each, deterministic, in low memory.

All groups, both directions and all blocks of channels run side by side; a direction is only the order in which rows
are visited. The backward pass recomputes the states from those kept before every CHUNK-th step. Inputs may be of
float16, bfloat16, float32 or float64 each; the state is float32, or float64 for float64 inputs.

Shapes: K directions, N instances in packed order, G groups, E inner width, S state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64  # steps between kept states
BLOCK_E = 32  # channels of one program: the threads of a warp


def triton_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: list[int], reverse: list[bool]
) -> Tensor:
    """C_t . s_t, (K, N, E) in the precision of u, with gradients in the precision of each input.

    u, dt: (K, N, E); A: (K, E, S), negative; B, C: (K, N, S). RuntimeError for inputs that no GPU holds.
    """
    import_kernels(u.device)
    y: Tensor = TritonScan.apply(u, dt, A, B, C, Plan.of(sizes, reverse, u.device))
    return y


def import_kernels(device: torch.device) -> Any:
    """The module of kernels, imported late: Triton is a part of PyTorch's CUDA builds only."""
    try:
        import triton

        from gmmamba.models import scan_triton_kernels
    except ImportError as error:
        remedy = "install a CUDA build of PyTorch, which brings it, or choose another scan"
        raise RuntimeError(f"scan 'triton' needs the package triton: {remedy}") from error
    if device.type != "cuda" and isinstance(scan_triton_kernels.scan_forward, triton.JITFunction):
        remedy = "move model and data to a GPU, choose another scan, or set TRITON_INTERPRET=1 to interpret it (slow)"
        raise RuntimeError(f"scan 'triton' runs on a GPU, and its inputs are on {str(device)!r}: {remedy}")
    return scan_triton_kernels


@dataclass
class Plan:
    """Where each direction and group finds its rows and its room for states."""

    table: Tensor
    """(K, G, 5) int64: row of the first step, rows from one step to the next (1 or -1), number of steps, first
    chunk, first scratch row; rows, chunks and scratch rows are counted through all directions."""
    chunks: int
    """Chunks of up to CHUNK steps, of all groups in all directions: the states that are kept for backward."""
    scratch: int
    """Room for the states of one chunk of every group in all directions."""

    @staticmethod
    def of(sizes: list[int], reverse: list[bool], device: torch.device) -> Plan:
        table, row, chunk, scratch = [], 0, 0, 0
        for backwards in reverse:
            for steps in sizes:
                table.append([row + steps - 1, -1] if backwards else [row, 1])
                table[-1] += [steps, chunk, scratch]
                row, chunk, scratch = row + steps, chunk - -steps // CHUNK, scratch + min(steps, CHUNK)
        return Plan(torch.tensor(table).view(len(reverse), len(sizes), 5).to(device), chunk, scratch)


class TritonScan(torch.autograd.Function):
    """The recurrence with its own backward (equations in scan_triton_kernels.py)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, plan: Plan) -> Tensor:
        dtypes = [x.dtype for x in (u, dt, A, B, C)]
        u, dt, A, B, C = (x.contiguous() for x in (u, dt, A.transpose(1, 2), B, C))
        y = torch.empty_like(u)
        keep = any(ctx.needs_input_grad)
        state = torch.float64 if torch.float64 in dtypes else torch.float32
        kept = A.new_empty(plan.chunks if keep else 0, *A.shape[1:], dtype=state)
        launch("scan_forward", plan, A, state, u, dt, A, B, C, y, kept, plan.table, KEEP=keep)
        ctx.save_for_backward(u, dt, A, B, C, kept)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        u, dt, A, B, C, kept = ctx.saved_tensors
        (K, N, E), S = u.shape, B.shape[2]
        states = kept.new_empty(plan.scratch, S, E)
        g_u, g_dt = torch.empty_like(u), torch.empty_like(dt)
        g_A = kept.new_empty(plan.table.shape[1], K, S, E)
        g_B, g_C = (kept.new_empty(-(-E // BLOCK_E), K, N, S) for _ in "BC")
        read, written = (u, dt, A, B, C, dy.contiguous(), kept, states), (g_u, g_dt, g_A, g_B, g_C)
        launch("scan_backward", plan, A, kept.dtype, *read, *written, plan.table, K * N)
        g_A, g_B, g_C = (parts.sum(0).to(x.dtype) for parts, x in ((g_A, A), (g_B, B), (g_C, C)))
        return g_u, g_dt, g_A.transpose(1, 2), g_B, g_C, None


def launch(kernel: str, plan: Plan, A: Tensor, state: torch.dtype, *arguments: Any, **options: Any) -> None:
    """Run a kernel of scan_triton_kernels.py, one warp a program, over blocks of E, groups and directions."""
    import triton
    import triton.language as tl

    K, S, E = A.shape
    grid = (triton.cdiv(E, BLOCK_E), plan.table.shape[1], K)
    blocks = {"CHUNK": CHUNK, "BLOCK_E": BLOCK_E, "BLOCK_S": triton.next_power_of_2(S)}
    options |= blocks | {"E": E, "S": S, "STATE": tl.float64 if state == torch.float64 else tl.float32}
    with torch.cuda.device_of(A):  # Triton launches on the current device
        getattr(import_kernels(A.device), kernel)[grid](*arguments, **options, num_warps=1)
