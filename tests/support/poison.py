"""Memory from `torch.empty` filled with values no kernel computes, so that an element left unwritten fails the test."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_empty = torch.empty


def poisoned_empty(*size: Any, **options: Any) -> Tensor:
    """`torch.empty`, full of NaN, or of the largest value of an integer type."""
    tensor = _empty(*size, **options)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.detach().fill_(math.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor
