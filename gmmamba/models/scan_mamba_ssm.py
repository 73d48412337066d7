"""The selective scan by the official kernels of the package mamba-ssm, for comparison on an NVIDIA GPU.

Those kernels know neither groups nor reversed directions, so both are laid out for them: one sequence per direction,
one call for all. Their backward pass adds gradients of B and C with atomics: unlike the other scans, two runs may
differ in the last bits.

Shapes: K directions, N instances in packed order, G groups, L = N + G - 1 steps, E inner width, S state size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

RESET = 1e20
"""dt of a separator: exp(RESET A) is exactly 0 in float32 for every A < -1e-17, while the gradients of dt and A there,
products of RESET, zeros and the gradient of the state, stay 0 up to a gradient of 1e18 (beyond: inf * 0)."""


def mamba_ssm_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: list[int], reverse: list[bool]
) -> Tensor:
    """C_t . s_t, (K, N, E) in the precision of u.

    u, dt: (K, N, E); A: (K, E, S), negative; B, C: (K, N, S). RuntimeError without the package or off the GPU,
    TypeError for float64, ValueError for S > 256.

    Between two groups lies one separator step with u = B = C = 0 and dt = RESET, so that
    s = exp(RESET A) * s_before + 0 = 0: the next group starts from zero, and no gradient crosses it either. A
    reversed direction is the whole sequence flipped: the groups in reverse order, each reversed.
    """
    kernel = official_kernel(u, S=A.shape[2])
    dtype = kernel_dtype(u, dt, B, C)
    N, G, (K, E, _) = sum(sizes), len(sizes), A.shape
    L = N + G - 1
    row = torch.arange(N) + torch.repeat_interleave(torch.tensor(sizes))  # each group behind as many separators
    rows = [(L - 1 - row if backwards else row).to(u.device) for backwards in reverse]

    def lay_out(x: Tensor, separator: float = 0.0) -> Tensor:
        """(K, N, ·) packed to (K, ·, L)."""
        empty = x.new_full((L, x.shape[2]), separator, dtype=dtype)
        sequences = [empty.index_copy(0, place, x_k) for place, x_k in zip(rows, x.to(dtype), strict=True)]
        return torch.stack(sequences).transpose(1, 2).contiguous()

    u_l, dt_l = lay_out(u).view(1, K * E, L), lay_out(dt, RESET).view(1, K * E, L)
    # Channels k E … k E + E - 1 take B and C of direction k.
    y = kernel(u_l, dt_l, A.flatten(0, 1).float(), lay_out(B)[None], lay_out(C)[None])
    packed = [y_k.index_select(1, place).T for place, y_k in zip(rows, y.view(K, E, L), strict=True)]
    return torch.stack(packed).to(u.dtype)


def official_kernel(u: Tensor, S: int) -> Callable[..., Tensor]:
    """mamba_ssm's selective_scan_fn, if it is installed and takes these inputs."""
    if u.device.type != "cuda":
        remedy = "move model and data to a GPU, or choose another scan"
        raise RuntimeError(f"scan 'mamba_ssm' runs on an NVIDIA GPU, and its inputs are on {str(u.device)!r}: {remedy}")
    if S > 256:
        raise ValueError(f"scan 'mamba_ssm' takes at most 256 states per channel, got d_state {S}")
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        remedy = "pip install 'gmmamba[cuda]', or choose another scan"
        raise RuntimeError(f"scan 'mamba_ssm' needs the package mamba-ssm: {remedy}") from error
    kernel: Callable[..., Tensor] = selective_scan_fn
    return kernel


def kernel_dtype(*inputs: Tensor) -> torch.dtype:
    """The one precision that the kernels want for u, dt, B and C: the highest given; RESET does not fit float16."""
    dtype = reduce(torch.promote_types, (x.dtype for x in inputs))
    if dtype == torch.float64:
        raise TypeError("scan 'mamba_ssm' has no float64: use float32 inputs, or choose another scan")
    return torch.float32 if dtype == torch.float16 else dtype
