"""The published procedure, rebuilt from its description: `make bench`'s baseline.

Each step fits k-means, then takes one group after the other through both mixers, where the backward direction works on
a reversed copy, and a selective scan that steps through the instances.

Shapes: N instances, n instances of one group, G groups, D width, E inner width, S state size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from gmmamba.models.bag import Bag, MILOutput
from gmmamba.models.bimamba import BiMamba
from gmmamba.models.gmmamba import GMMamba

SCANS = ("reference", "unbound")


class PublishedLoop(nn.Module):
    """A GMMamba, whose parameters it shares, computed as published.

    scan "reference" indexes the whole tensors at each step, so that each step's backward allocates a gradient of full
    size; "unbound" takes them apart once, the fastest such loop in pure PyTorch.
    """

    def __init__(self, model: GMMamba, n_groups: int, scan: str):
        super().__init__()
        assert model.css is not None
        self.imm, self.css, self.cls = model.imm, model.css, model.cls
        self.n_groups, self.unbound = n_groups, scan == "unbound"

    def forward(self, bag: Bag) -> MILOutput:
        """Every group must have two instances at least: of a single one the mask would leave nothing."""
        labels = self.groups_of(bag)
        X = torch.cat([self.group_feature(bag.features[labels == g]) for g in range(self.n_groups)])
        return MILOutput(self.cls(self.css(X)[0], X.max(0, keepdim=True).values)[0])

    def groups_of(self, bag: Bag) -> Tensor:
        """(N,) labels, fitted anew."""
        kmeans = KMeans(n_clusters=self.n_groups, random_state=0, n_init="auto")
        return torch.from_numpy(kmeans.fit_predict(bag.coords.cpu().numpy())).to(bag.features.device)

    def group_feature(self, x: Tensor) -> Tensor:
        """Instances (n, D) of one group to its feature (1, D)."""
        imm = self.imm
        assert imm.mask_attention is not None
        assert imm.BiMamba2 is not None
        assert imm.group_ins_attention is not None
        h1 = self.residual(imm.BiMamba1, imm._fc1(x) if imm.project else x)
        p = imm.mask_attention(imm.norm(h1)).softmax(0)[:, 0]
        keep = p.argsort()[max(1, int(imm.mask_ratio * len(p))) :].sort().values
        h2 = imm.norm(self.residual(imm.BiMamba2, h1[keep]))
        return imm.group_ins_attention(h2).softmax(0).T @ h2

    def residual(self, norm_and_mixer: nn.ModuleList, x: Tensor) -> Tensor:
        """x + BiMamba(LN x), channels first inside."""
        norm, mixer = norm_and_mixer
        assert isinstance(mixer, BiMamba)
        u, z = (mixer.in_proj.weight @ norm(x).T).chunk(2)  # (E, n)
        forward = self.direction(mixer, "", u, z)
        backward = self.direction(mixer, "_b", u.flip(1), z.flip(1)).flip(1)
        out: Tensor = mixer.out_proj((forward + backward).T)
        return x + out

    def direction(self, mixer: BiMamba, suffix: str, u: Tensor, z: Tensor) -> Tensor:
        """y silu(z) of one direction, from and to (E, n)."""
        conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A_log, D = (mixer.A_b_log, mixer.D_b) if suffix else (mixer.A_log, mixer.D)
        u = F.conv1d(u, conv.weight, conv.bias, padding=conv.weight.shape[2] - 1, groups=len(u))[:, : u.shape[1]]
        u = F.silu(u)
        dt, B, C = (x_proj.weight @ u).split(mixer.split)
        dt = F.softplus(dt_proj.weight @ dt + dt_proj.bias[:, None])
        y = sequential_scan(u, dt, -A_log.exp(), B, C, self.unbound)
        return (y + D[:, None] * u) * F.silu(z)


def sequential_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, unbound: bool) -> Tensor:
    """C_t . s_t of  s_t = exp(dt_t A) * s_{t-1} + dt_t B_t u_t.  u, dt: (E, n); A: (E, S); B, C: (S, n)."""
    decay = torch.exp(dt[:, :, None] * A[:, None])  # (E, n, S), and so is the inflow
    inflow = (dt * u)[:, :, None] * B.T
    parts = (decay, inflow, C)
    steps: Iterable[tuple[Tensor, ...]] = (tuple(x[:, t] for x in parts) for t in range(u.shape[1]))
    if unbound:
        steps = zip(*(x.unbind(1) for x in parts), strict=True)
    state, outputs = torch.zeros_like(A), []
    for decay_t, inflow_t, C_t in steps:
        state = decay_t * state + inflow_t
        outputs.append(state @ C_t)
    return torch.stack(outputs, dim=1)
