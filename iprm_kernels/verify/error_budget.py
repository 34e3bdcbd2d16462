"""The error budget: the error allowed to a backend, measured instead of chosen.

The truth is the reference in float64 on the same rounded inputs. The baseline is the reference in plain torch at the dtype
under test. A backend's error may be at most FACTOR times the baseline's, plus a floor for baselines that happen to be exact:
FLOOR_ULPS of the arithmetic and, where results are stored in a narrower type, the one rounding to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import arithmetic_dtype

FACTOR = 3.0
FLOOR_ULPS = 2.0


def floor(dtype: torch.dtype) -> float:
    """The relative error allowed for any baseline error."""
    stored = torch.finfo(dtype).eps / 2 if dtype in (torch.float16, torch.bfloat16) else 0.0
    return FLOOR_ULPS * torch.finfo(arithmetic_dtype(dtype)).eps + stored


def excess(name: str, dtype: torch.dtype, error: Tensor, baseline: Tensor, magnitude: Tensor) -> str:
    """A sentence if errors exceed the budget in one of two norms, empty if they do not.

    The largest error, relative to the largest magnitude; and the largest error of any row relative to that row's magnitude:
    the size of the terms of the row, to which its rounding errors are proportional.

    Args:
        dtype: the type of the result.
        error, baseline: (B, ...) errors of the backend and of plain torch.
        magnitude: (B,), positive.
    """
    rows = [errors.abs().reshape(len(magnitude), -1).amax(1) for errors in (error, baseline)]
    largest = [row.max().item() / magnitude.max().item() for row in rows]
    by_row = [(row / magnitude).max().item() for row in rows]
    for norm, (of_backend, of_baseline) in (("largest", largest), ("by row", by_row)):
        allowed = FACTOR * of_baseline + floor(dtype)
        if not of_backend <= allowed:
            return f"{name}, {norm}: error {of_backend:.3g}, of plain torch {of_baseline:.3g}, allowed {allowed:.3g}"
    return ""
