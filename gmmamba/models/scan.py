"""The selective scan of Mamba over packed groups, in both directions at once.

All groups of a slide lie behind one another in one sequence, without padding; the state starts at zero in each
group. Backends of one interface, chosen by name and held equal by the tests:

    torch      the recurrence as it is written on paper, below: the oracle of the others, slow
    numba      compiled for the CPU, vectorised over channels (scan_numba.py)
    triton     fused kernels for CUDA, no build step (scan_triton.py)
    mamba_ssm  the official CUDA kernels, where the user has them (scan_mamba_ssm.py)
    auto       numba on the CPU, triton on CUDA

Shapes: N instances, K directions, E inner width (1024), S state size (16), G groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from gmmamba.models import known

BACKENDS = ("auto", "torch", "numba", "triton", "mamba_ssm")
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, list[int], list[bool]], Tensor]

logger = logging.getLogger(__name__)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    sizes: Tensor,
    reverse: Sequence[bool] = (False, True),
    backend: str = "auto",
) -> Tensor:
    """y of  s_t = exp(dt_t A) * s_{t-1} + dt_t B_t u_t,  y_t = C_t . s_t + D u_t  (Gu and Dao, 2023).

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
    scan = find_backend(backend, u.device.type)
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        given = u.dtype
        if u.device.type == "cpu":  # kernels on the GPU read low precision as it is: half the traffic
            u, dt, A, B, C = (x.to(state_dtype) for x in (u, dt, A, B, C))
        y = scan(u, dt, A, B, C, sizes.tolist(), list(reverse))
        D, u, y = (x.to(state_dtype) for x in (D, u, y))
        return y.addcmul_(D.unsqueeze(1), u).to(given)


@cache
def find_backend(name: str, device: str) -> Scan:
    """The function of a backend; says once which one runs. Backends load when asked for: numba takes a second."""
    if known("scan backend", name, BACKENDS) == "auto":
        name = "triton" if device == "cuda" else "numba"
    logger.info("selective scan: %s on %s", name, device)
    if name == "numba":
        from gmmamba.models.scan_numba import numba_scan

        return numba_scan
    if name == "triton":
        from gmmamba.models.scan_triton import triton_scan

        return triton_scan
    if name == "mamba_ssm":
        from gmmamba.models.scan_mamba_ssm import mamba_ssm_scan

        return mamba_ssm_scan
    return torch_scan


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
