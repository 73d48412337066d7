"""S4MIL: a diagonal state space layer over the slide's patches (Fillioux et al., MICCAI 2023; S4D of Gu et al.,
NeurIPS 2022).

Shapes: N instances, D feature width, M embedding width, n complex modes a channel, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmmamba.models.bag import Bag, MILModel, MILOutput


class S4MIL(MILModel):
    """h = ReLU(Lin x); z = maximum of S4D(LN h) over the instances, channel by channel; logits = Lin(z).

    Causal, in the order of the bag, without residual. Trained by the cross-entropy of the logits: the published code
    takes it of the softmax of them, a loss that cannot fall below 0.31 for two classes.

    Args:
        in_dim: D.
        width: M.
        d_state: 2 n.
    """

    def __init__(self, in_dim: int, n_classes: int, width: int = 512, d_state: int = 32):
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(in_dim, width), nn.ReLU())
        self.norm = nn.LayerNorm(width)
        self.s4d = S4D(width, d_state)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, bag: Bag) -> MILOutput:
        """The attention is the share of channels that an instance decides, as in max-pooling."""
        feature, attention = self.encode(bag)
        return MILOutput(self.classifier(feature), attention)

    def encode(self, bag: Bag) -> tuple[Tensor, Tensor]:
        y = self.s4d(self.norm(self.embed(bag.features)))
        highest, winner = y.max(0)
        return highest[None], winner.bincount(minlength=len(y)) / self.width


class S4D(nn.Module):
    """y = K * u + D u, then GLU(Lin(GELU(y))); K is the impulse response of n complex modes a channel, initialised as
    S4D-Lin. Parameter names are the published ones."""

    def __init__(self, width: int, d_state: int = 32):
        super().__init__()
        modes = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(width, modes, dtype=torch.cfloat)).clone())
        self.log_A_real = nn.Parameter(torch.full((width, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).repeat(width, 1))
        self.D = nn.Parameter(torch.randn(width))
        self.output_linear = nn.Linear(width, 2 * width)

    def forward(self, u: Tensor) -> Tensor:
        """(N, M) to (N, M)."""
        with torch.autocast(u.device.type, enabled=False):  # FFTs have no low precision
            u = u.to(self.D.dtype)
            y = causal_convolution(u.T, self.kernel(len(u))).T + u * self.D
        return F.glu(self.output_linear(F.gelu(y)), dim=1)

    def kernel(self, length: int) -> Tensor:
        """K (M, L): K_l = 2 Re sum_j C'_j exp(dt A_j l), C' = C (exp(dt A) - 1) / A.

        With l = a B + b and B about sqrt(L), exp(dt A l) is a product of a factor of a and one of b, so that K is a
        matrix product and (M, n, L) is never held: at L = 50,000 that would be 3 GB, several times over.
        """
        A = torch.complex(-self.log_A_real.exp(), self.A_imag)
        dtA = self.log_dt.exp()[:, None] * A
        C = torch.view_as_complex(self.C) * dtA.exp().sub(1) / A
        block = math.isqrt(length - 1) + 1
        l = torch.arange(block, dtype=self.D.dtype, device=self.D.device)  # noqa: E741
        coarse = 2 * C[..., None] * (dtA[..., None] * (block * l)).exp()  # (M, n, B)
        fine = (dtA[..., None] * l).exp()
        K = coarse.real.mT @ fine.real - coarse.imag.mT @ fine.imag  # (M, B, B)
        return K.flatten(1)[:, :length]


def causal_convolution(u: Tensor, K: Tensor) -> Tensor:
    """sum over i <= t of K_i u_{t - i} of each channel, (M, N) both."""
    N = u.shape[1]
    n = smooth_length(2 * N)
    return torch.fft.irfft(torch.fft.rfft(K, n) * torch.fft.rfft(u, n), n)[:, :N]


def smooth_length(n: int) -> int:
    """The next length >= n with no prime factor above 13, at most an eighth more: FFTs of prime lengths are slow."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step
