"""The error budget holds with the approximate arithmetic of compiled kernels: see `gpu_arithmetic`.

Types are float32 and one of 16 bits; float64 has no approximate instructions.
"""

from __future__ import annotations

import accuracy
import gpu_arithmetic
import head_accuracy
import numpy as np
import pytest
import torch
from places import INTERPRETED, Place

if not INTERPRETED:
    pytest.skip("changes the arithmetic of the interpreter, which needs TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_arithmetic.approximate(monkeypatch)


def ulps(value: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(value - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def test_errors_are_as_large_as_documented() -> None:
    """Within the bounds, and near to them for some arguments."""
    x = np.linspace(-20, 0, 100_001, dtype=np.float32)
    y = np.geomspace(1, 1000, 100_001, dtype=np.float32)
    wide, divisor = x.astype(np.float64), y.astype(np.float64)
    for value, exact, bound in (
        (gpu_arithmetic.exp2(x), np.exp2(wide), 2),
        (gpu_arithmetic.divide(x, y), wide / divisor, 2),
        (gpu_arithmetic.log(y), np.log(divisor), 1),
    ):
        error = ulps(value, exact)[:-1] if bound == 2 else ulps(value, exact)[1:]  # without 2⁰, 0 / y and log 1
        assert bound - 0.2 < error.max() <= bound
        assert error.mean() < bound / 2
    assert ulps(gpu_arithmetic.exp(x), np.exp(wide)).max() > 8  # |x| log2(e) / 2 ulp more, from the rounded product


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), [(9, 2), (33, 7), (129, 16), (5, 100), (3, 1024)])
def test_geodesic_mixup(fused: Place, batch: int, width: int, dtype: torch.dtype) -> None:
    accuracy.assert_mixup_within_budget(batch, width, dtype, fused.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), [(33, 7), (5, 100)])
def test_normalize(fused: Place, batch: int, width: int, dtype: torch.dtype) -> None:
    accuracy.assert_normalize_within_budget(batch, width, dtype, fused.device)


@pytest.mark.parametrize("draw", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (33, 6), (129, 31), (64, 31), (5, 1000)])
def test_batch_kl(
    fused: Place, batch: int, classes: int, dtype: torch.dtype, draw: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sensitive to errors: a row's tolerance is relative to its KL. So several draws of errors."""
    gpu_arithmetic.approximate(monkeypatch, draw)
    accuracy.assert_kl_within_budget(batch, classes, dtype, fused.device)


def test_batch_kl_of_looped_rows(fused: Place) -> None:
    accuracy.assert_kl_within_budget(2, 20_000, torch.float32, fused.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width", "classes"), [(5, 7, 6), (33, 64, 31), (3, 100, 130)])
def test_linear_probe_rebalance(fused: Place, batch: int, width: int, classes: int, dtype: torch.dtype) -> None:
    head_accuracy.assert_within_budget(batch, width, classes, dtype, fused.device)


@pytest.mark.parametrize(("batch", "width", "classes"), [(33, 64, 31)])
def test_linear_probe_rebalance_pairs(fused: Place, batch: int, width: int, classes: int) -> None:
    head_accuracy.assert_pairs_within_budget(batch, width, classes, torch.float32, fused.device)
