"""Memory from `torch.empty`, `empty_like` and `Tensor.new_empty`, filled with values that no kernel computes: an unwritten
element then fails the test."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_empty, _empty_like, _new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty


def poisoned_empty(*size: Any, **options: Any) -> Tensor:
    """`torch.empty`, full of NaN, or of the largest value of an integer type."""
    return _poisoned(_empty(*size, **options))


def poisoned_empty_like(*like: Any, **options: Any) -> Tensor:
    return _poisoned(_empty_like(*like, **options))


def poisoned_new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
    """`Tensor.new_empty`; fake tensors, which a compiler traces with, have no memory to fill."""
    tensor = _new_empty(self, *size, **options)
    plain = type(tensor) is Tensor and not tensor.is_meta and not torch.compiler.is_compiling()
    return _poisoned(tensor) if plain else tensor


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Context in which new memory is poisoned."""
    with (
        mock.patch.object(torch, "empty", poisoned_empty),
        mock.patch.object(torch, "empty_like", poisoned_empty_like),
        mock.patch.object(Tensor, "new_empty", poisoned_new_empty),
    ):
        yield


def _poisoned(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.detach().fill_(math.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor
