"""The error budget of `iprm_kernels.verify.error_budget` as an assertion, with truths of twice the digits of float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iprm_kernels.verify.error_budget import FACTOR, FLOOR_ULPS, excess, floor

__all__ = ["FACTOR", "FLOOR_ULPS", "Truth", "assert_within_budget", "floor"]


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


def assert_within_budget(name: str, value: Tensor, baseline: Tensor, truth: Truth, magnitude: Tensor) -> None:
    """`value` is as close to `truth` as `baseline` is; see `excess`.

    Args:
        value, baseline: (B, ...) results of the backend and of plain torch, same dtype.
        magnitude: (B,), positive.
    """
    assert value.dtype == baseline.dtype
    assert value.shape == baseline.shape == truth.high.shape
    assert value.isfinite().all(), f"{name}: not finite"
    message = excess(name, value.dtype, truth.error(value), truth.error(baseline), magnitude)
    assert not message, message
