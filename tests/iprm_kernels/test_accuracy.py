"""Every backend, dtype and kind of shape within the error budget of the reference, forward and all gradients."""

from __future__ import annotations

import accuracy
import cases
import pytest
import torch
from places import INTERPRETED, Place
from truths import kl_with_gradients, mixup_with_gradients

WIDEST = 20_000

# (B, D), with the reason for each
FEATURE_SHAPES = [
    (5, 1),  # one column: x̂ = ±1
    (129, 2),  # narrower than a vector register; more rows than a block, not a multiple
    (1000, 3),
    (64, 7),
    (129, 16),  # one AVX-512 register of float32, no tail
    (1, 31),  # one row; register and tail
    (2, 64),
    (5, 100),  # padded to a power of two in a Triton block
    (64, 512),  # the size of IPRM's features
    (2, 1000),
    (5, 1024),
    (1000, 100),  # enough rows for every thread
    (2, WIDEST),  # rows longer than a Triton block, so the kernel loops; long sums
]
LOGIT_SHAPES = [
    (1, 2),  # two classes, one row
    (1000, 2),
    (5, 6),  # the classes of CREMA-D
    (129, 31),
    (64, 31),
    (5, 1000),  # looped in registers by cpp, one block in Triton
    (1, 1),  # KL is zero
    (2, WIDEST),  # longer than a Triton block
]
if INTERPRETED:  # each kind of shape with few rows
    FEATURE_SHAPES = [(5, 1), (9, 2), (33, 7), (1, 31), (5, 100), (3, 1024), (2, WIDEST)]
    LOGIT_SHAPES = [(1, 2), (33, 6), (5, 31), (3, 1000), (1, 1), (2, WIDEST)]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), FEATURE_SHAPES)
def test_geodesic_mixup(fused: Place, batch: int, width: int, dtype: torch.dtype) -> None:
    accuracy.assert_mixup_within_budget(batch, width, dtype, fused.device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), FEATURE_SHAPES)
def test_normalize(fused: Place, batch: int, width: int, dtype: torch.dtype) -> None:
    accuracy.assert_normalize_within_budget(batch, width, dtype, fused.device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "classes"), LOGIT_SHAPES)
def test_batch_kl(fused: Place, batch: int, classes: int, dtype: torch.dtype) -> None:
    accuracy.assert_kl_within_budget(batch, classes, dtype, fused.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [7, 100, 1024])
def test_half_precision_rounds_once(fused: Place, dtype: torch.dtype, width: int) -> None:
    """A 16-bit result is the float32 result rounded once: no intermediate value was stored in 16 bits."""
    x, y = cases.feature_pairs(5, width, dtype, fused.device)
    g, w = cases.randn(5, width, seed=6, dtype=dtype, device=fused.device), torch.full((), 0.3, device=fused.device)
    half = mixup_with_gradients(x, y, w, g)
    single = mixup_with_gradients(x.float(), y.float(), w, g.float())
    kl_half = kl_with_gradients(x, y, w.expand(5))
    kl_single = kl_with_gradients(x.float(), y.float(), w.expand(5))
    for name, value in {**half, **kl_half}.items():
        wanted = {**single, **kl_single}[name]
        # half an ulp of the stored type (below the normal range, half its smallest step), plus the summation order of float32
        step = torch.finfo(dtype).eps * wanted.abs().clamp(min=torch.finfo(dtype).tiny) if value.dtype == dtype else 0.0
        order = 4 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert ((value.float() - wanted).abs() <= step / 2 + order).all(), name
