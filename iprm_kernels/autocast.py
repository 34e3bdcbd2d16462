"""What the operators ask of autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

#: The device types that have autocast; asking PyTorch for others is an error, or in older versions not to be compiled.
DEVICES = frozenset(("cpu", "cuda", "hpu", "mps", "xpu"))


def enabled(tensor: Tensor) -> bool:
    device = tensor.device.type
    return device in DEVICES and torch.is_autocast_enabled(device)


def uncached(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it is, but what is cast here without a gradient is not kept for a pass with one, as torch 2.10 does."""
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
