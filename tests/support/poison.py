"""Memory from `torch.empty` and `empty_like` filled with values that no kernel computes, so that an unwritten element fails the
test."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_empty, _empty_like = torch.empty, torch.empty_like


def poisoned_empty(*size: Any, **options: Any) -> Tensor:
    """`torch.empty`, full of NaN, or of the largest value of an integer type."""
    return _poisoned(_empty(*size, **options))


def poisoned_empty_like(*like: Any, **options: Any) -> Tensor:
    return _poisoned(_empty_like(*like, **options))


def _poisoned(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.detach().fill_(math.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor
