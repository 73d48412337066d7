"""What a replayed case is measured by: one `Check` a quantity, and the weight rule's part that all cases share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


@dataclass
class Check:
    """The error of one quantity of a case and what is allowed; infinite where the two cannot be compared."""

    quantity: str
    precision: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return ("0" if self.error == 0 else f"{self.error:.0e}") + ("" if self.passed else "!")


Checks = Iterator[Check]


def relative_error(value: Tensor | Array | None, reference: Array, scale: float = 0.0, offset: float = 0.0) -> float:
    """max |value - reference| / (max |reference| + offset); infinite for no value, another shape, or NaN.

    A reference that is zero but for rounding, below 1e-12 of `scale`, is measured against `scale` instead.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if value is None or value.shape != reference.shape:
        return math.inf
    difference = np.abs(value.astype(np.float64) - reference).max(initial=0.0)
    size = np.abs(reference).max(initial=0.0)
    size = scale if size < 1e-12 * scale else size + offset
    if difference == 0:
        return 0.0
    return float(difference / size) if np.isfinite(difference) and size else math.inf


def step_bias(rs: np.random.RandomState, shape: tuple[int, ...]) -> Array:
    """b_dt whose softplus is log-uniform in [1e-3, 1e-1]."""
    dt = np.exp(rs.uniform(0, 1, shape) * (np.log(0.1) - np.log(0.001)) + np.log(0.001))
    bias: Array = dt + np.log(-np.expm1(-dt))
    return bias
