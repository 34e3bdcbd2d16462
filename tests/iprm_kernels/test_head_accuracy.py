"""The linear head step within the error budget: every backend, dtype and kind of shape, all outputs and all gradients."""

from __future__ import annotations

import cases
import head_accuracy
import pytest
import torch
from places import INTERPRETED, Place

# (B, D, C), with the reason for each
SHAPES = [
    (1, 1, 2),  # the smallest step
    (5, 7, 6),  # nothing fills a vector register
    (64, 512, 6),  # the sizes of CREMA-D
    (64, 512, 31),
    (129, 100, 31),  # not a multiple of any tile size
    (200, 512, 7),  # rows for every thread
    (9, 1000, 65),
    (33, 256, 1000),  # more classes than rows
    (3, 16384, 6),  # long sums
]
if INTERPRETED:
    SHAPES = [(1, 1, 2), (5, 7, 6), (33, 64, 31), (3, 100, 130), (2, 2100, 3)]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width", "classes"), SHAPES)
def test_linear_probe_rebalance(fused: Place, batch: int, width: int, classes: int, dtype: torch.dtype) -> None:
    head_accuracy.assert_within_budget(batch, width, classes, dtype, fused.device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width", "classes"), SHAPES)
def test_linear_probe_rebalance_pairs(fused: Place, batch: int, width: int, classes: int, dtype: torch.dtype) -> None:
    if fused.backend == "cuda":
        pytest.skip("the cuda backend has kernels only for one pair of modalities")
    head_accuracy.assert_pairs_within_budget(batch, width, classes, dtype, fused.device)
