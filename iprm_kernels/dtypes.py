"""The supported floating types, and the arithmetic type of each."""

from __future__ import annotations

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that rows are computed in: float64 for float64, float32 for all narrower types."""
    return torch.float64 if dtype == torch.float64 else torch.float32
