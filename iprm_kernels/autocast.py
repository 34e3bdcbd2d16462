"""Autocast, as the operators follow it: for heads and modules built on them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

#: The device types that have autocast; asking PyTorch for others is an error, or in older versions not to be compiled.
DEVICES = frozenset(("cpu", "cuda", "hpu", "mps", "xpu"))


def enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of `tensor`."""
    device = tensor.device.type
    return device in DEVICES and torch.is_autocast_enabled(device)


def uncached(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context with autocast as it is on the device of `tensor`, but without its cache of casts.

    Autocast keeps the cast of a parameter until its outermost context ends; torch 2.10 keeps one made under ``torch.no_grad``
    too, and a later pass with gradient through it then leaves the parameter without one.
    """
    device = tensor.device.type
    if not enabled(tensor):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)


def widest(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest of their dtypes: what autocast does for operators of several inputs, such as `cat`."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
