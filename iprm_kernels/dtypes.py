"""Which floating types there are, and which each is computed in."""

from __future__ import annotations

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type rows are computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
