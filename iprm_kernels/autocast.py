"""How the operators follow autocast, for heads and modules built on them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

#: The device types that have autocast; asking PyTorch about others is an error, and does not compile in older versions.
DEVICES = frozenset(("cpu", "cuda", "hpu", "mps", "xpu"))


def enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of `tensor`."""
    device = tensor.device.type
    return device in DEVICES and torch.is_autocast_enabled(device)


def uncached(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context that keeps the autocast state of the device of `tensor` but disables its weight cache.

    Autocast caches the cast of a parameter until its outermost context ends. torch 2.10 also caches casts made under
    ``torch.no_grad``; a later pass with gradients would reuse such a cast and leave the parameter without a gradient.
    """
    device = tensor.device.type
    if not enabled(tensor):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)


def widest(*tensors: Tensor) -> list[Tensor]:
    """The tensors cast to the widest of their dtypes, as autocast does for operators of several inputs such as `cat`."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
