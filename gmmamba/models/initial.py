"""Initial weights that several published models share."""

from __future__ import annotations

from torch import nn


def xavier_linears(module: nn.Module, spare: tuple[type[nn.Module], ...] = ()) -> None:
    """Xavier's normal weights and zero bias for every linear layer in `module`, but for those inside of `spare`."""
    if isinstance(module, spare):
        return
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for child in module.children():
        xavier_linears(child, spare)
