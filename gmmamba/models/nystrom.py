"""Nyström attention: softmax attention through landmarks, linear in the number of tokens (Xiong et al., AAAI 2021;
the sizes and the residual convolution of the package nystrom-attention, 0.0.14).

Shapes: n tokens, p of padding before them, M width, H heads, d = M / H, m landmarks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # tokens that `token_conv` takes at once; at least the kernel's length


class NystromAttention(nn.Module):
    """softmax(q k^T) v as A1 pinv(A2) A3 v + conv(v), where A1 = softmax(q k~^T), A2 = softmax(q~ k~^T),
    A3 = softmax(q~ k^T); q~ and k~ are means over ceil(n / m) neighbouring tokens.

    So that the means come out even, zeros are put in front of the queries, keys and values; they are keys like the
    others. Landmarks of nothing but padding are all alike: one that counts as often stands for them, which changes no
    result and makes small bags cheap (of 25 tokens in 256 landmarks, the inverse is of 26 x 26).

    The published fault that is avoided: nystrom-attention 0.0.9, which TransMIL pins, hands back the first n tokens
    instead of the last n, so that each gets the result of the one p places before it.

    Args:
        width: M, a multiple of `heads`; m is its half.
        kernel: tokens under the convolution, odd.
        dropout: of the output.
    """

    front_slip = False
    """True: the fault of 0.0.9, for its reference cases."""

    def __init__(self, width: int, heads: int = 8, kernel: int = 33, dropout: float = 0.1):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}: give a multiple of {heads}, the number of attention heads")
        self.heads, self.landmarks = heads, width // 2
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.res_conv = nn.Parameter(nn.init.uniform_(torch.empty(heads, kernel), -(kernel**-0.5), kernel**-0.5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, M) to (n, M), and the first token's row of A1 pinv(A2) A3, (H, n), without gradient.

        The row may go below 0, since pinv(A2) does.
        """
        n, width = x.shape
        pad = -n % self.landmarks
        q, k, v = F.pad(self.to_qkv(x).view(n, 3, self.heads, -1).permute(1, 2, 0, 3), (0, 0, pad, 0))  # (H, p + n, d)
        q = q * q.shape[2] ** -0.5
        q_mean, k_mean = (t.unflatten(1, (self.landmarks, -1)).mean(2) for t in (q, k))
        empty = max(pad * self.landmarks // (n + pad), 1)  # landmarks that the first of those kept stands for
        q_mean, k_mean = q_mean[:, empty - 1 :], k_mean[:, empty - 1 :]
        count = torch.ones(k_mean.shape[1], dtype=torch.promote_types(q.dtype, torch.float32), device=x.device)
        count[0] = empty
        often = count.log().to(q.dtype)
        Z = pseudo_inverse((q_mean @ k_mean.mT + often).softmax(2), count).to(v.dtype)
        first = 0 if self.front_slip else pad  # what padding itself attends to, nobody asks
        # Fused attention never holds A1 and A3, (H, n, m) each
        out = attend(q[:, first:], k_mean, Z @ attend(q_mean, k, v), often if empty > 1 else None)
        out = out + token_conv(v[:, first:], self.res_conv)
        with torch.no_grad():
            weights = (q[:, pad : pad + 1] @ k_mean.mT + often).softmax(2) @ Z  # (H, 1, m)
            row = torch.cat([w @ (a @ b.mT).softmax(1) for w, a, b in zip(weights, q_mean, k, strict=True)])
        out = self.dropout(self.to_out(out.transpose(0, 1).reshape(-1, width)))
        return out[:n], row[:, pad:]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T + bias) v of each head, (H, ·, d); a bias a key."""
    if bias is not None:
        bias = bias.expand(q.shape[1], -1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], bias, scale=1.0)[0]


def pseudo_inverse(A: Tensor, count: Tensor, iterations: int = 6) -> Tensor:
    """Approximate pinv of (H, m, m), non-negative, in float32 or better whatever autocast says: the iteration squares
    every error. One scalar scales the start of all heads, as published.

    Row and column i stand for `count[i]` equal ones, a column for the sum of its own. With the roots of the counts as
    weights these matrices are the whole ones in an orthonormal basis, so that the iteration is the same.
    """
    with torch.autocast(A.device.type, enabled=False):
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        root = count.to(A.dtype).sqrt()
        rows, columns = A.sum(2), (A / count * count[:, None]).sum(1)  # sums of the whole matrix
        A = root[:, None] * A / root
        eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        Z = A.mT / (columns.max() * rows.max())
        for _ in range(iterations):
            AZ = A @ Z
            Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
        return Z / root[:, None] * root


def token_conv(v: Tensor, weight: Tensor) -> Tensor:
    """Each head's own convolution over its tokens, zeros beyond the ends: (H, n, d) and (H, W), W odd, to (H, n, d).

    As products with the banded matrix of the weights, a block of tokens at a time. torch's own convolution is not used:
    through oneDNN its float32 weight gradient is wrong on the CPU, by 5 % for 256 tokens of 8 heads.
    """
    H, n, d = v.shape
    W = weight.shape[1]
    blocks = -(-n // BLOCK)
    padded = F.pad(v, (0, 0, W // 2, (blocks + 1) * BLOCK - n - W // 2)).unflatten(1, (blocks + 1, BLOCK))
    place = torch.arange(2 * BLOCK, device=v.device) - torch.arange(BLOCK, device=v.device)[:, None]
    band = weight[:, place.clamp(0, W - 1)] * ((place >= 0) & (place < W))  # (H, BLOCK, 2 BLOCK)
    here, there = band.to(v.dtype).split(BLOCK, dim=2)
    out = torch.einsum("hij,hbjd->hbid", here, padded[:, :-1]) + torch.einsum("hij,hbjd->hbid", there, padded[:, 1:])
    return out.reshape(H, blocks * BLOCK, d)[:, :n]
