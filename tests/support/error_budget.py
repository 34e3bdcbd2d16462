"""The error budget: the error allowed to a backend, measured instead of chosen.

The truth is the reference in float64 on the same rounded inputs (50 digits where the test itself is in float64). The
baseline is the reference in plain torch at the dtype under test. A backend's error may be at most FACTOR times the
baseline's, plus a floor for baselines that happen to be exact: FLOOR_ULPS of the arithmetic and, where results are stored in
a narrower type, the one rounding to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iprm_kernels.dtypes import arithmetic_dtype

FACTOR = 3.0
FLOOR_ULPS = 2.0


class Truth(NamedTuple):
    """A result with twice the digits of float64, as high + low."""

    high: Tensor
    low: Tensor

    @staticmethod
    def of(value: Tensor) -> Truth:
        return Truth(value.double(), torch.zeros_like(value, dtype=torch.float64))

    @staticmethod
    def of_digits(values: np.ndarray) -> Truth:
        """From an array of mpmath numbers."""
        high = values.astype(np.float64)
        return Truth(torch.from_numpy(high), torch.from_numpy((values - high).astype(np.float64)))

    def __add__(self, other: Truth) -> Truth:  # type: ignore[override]
        return Truth.of_digits(self._wide() + other._wide())

    def _wide(self) -> np.ndarray:
        return self.high.numpy().astype(np.longdouble) + self.low.numpy()

    def error(self, value: Tensor) -> Tensor:
        return (value.double().cpu() - self.high) - self.low


def floor(dtype: torch.dtype) -> float:
    """The relative error allowed for any baseline error."""
    stored = torch.finfo(dtype).eps / 2 if dtype in (torch.float16, torch.bfloat16) else 0.0
    return FLOOR_ULPS * torch.finfo(arithmetic_dtype(dtype)).eps + stored


def assert_within_budget(name: str, value: Tensor, baseline: Tensor, truth: Truth, magnitude: Tensor) -> None:
    """`value` is as close to `truth` as `baseline` is, in two norms.

    The largest error, relative to the largest magnitude; and the largest error of any row relative to that row's magnitude:
    the size of the terms of the row, to which its rounding errors are proportional.

    Args:
        value, baseline: (B, ...) results of the backend and of plain torch, same dtype.
        magnitude: (B,), positive.
    """
    assert value.dtype == baseline.dtype
    assert value.shape == baseline.shape == truth.high.shape
    assert value.isfinite().all(), f"{name}: not finite"
    rows = [truth.error(tensor).abs().reshape(len(magnitude), -1).amax(1) for tensor in (value, baseline)]
    largest = [row.max().item() / magnitude.max().item() for row in rows]
    by_row = [(row / magnitude).max().item() for row in rows]
    for norm, (error, error_baseline) in (("largest", largest), ("by row", by_row)):
        allowed = FACTOR * error_baseline + floor(value.dtype)
        assert error <= allowed, (
            f"{name}, {norm}: error {error:.3g}, of plain torch {error_baseline:.3g}, allowed {allowed:.3g}"
        )
