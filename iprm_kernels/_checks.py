"""Argument checks shared by the public functions. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rows(name: str, value: Any, shape: str = "(..., D)") -> None:
    """`value` is a floating tensor with at least one dimension, the last of them not empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape {shape} with a last dimension of at least 1, got {tuple(value.shape)}")


def matrix(name: str, value: Any, shape: str = "(B, D)") -> None:
    """`value` is a floating tensor of two dimensions."""
    rows(name, value, shape)
    if value.dim() != 2:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")


def alike(name: str, value: Tensor, other_name: str, other: Tensor, *, autocast: bool = False) -> None:
    """`value` has the shape, device and (unless autocast will unify them) dtype of `other`."""
    if value.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")
    same_place(name, value, other_name, other, autocast=autocast)


def same_place(name: str, value: Tensor, other_name: str, other: Tensor, *, autocast: bool = False) -> None:
    """`value` has the device and (unless autocast will unify them) dtype of `other`."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")
    if value.dtype != other.dtype and not autocast:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}")


def epsilon(eps: Any) -> float:
    """`eps` is a positive finite number."""
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    if not (0 < eps < math.inf):
        raise ValueError(f"eps: expected a positive finite number, got {eps}")
    return float(eps)


def mixing_weight(weight: Any, like: Tensor, lead: torch.Size) -> Tensor:
    """The weight as a tensor: 0-d, or one dimension with a value a row. A float becomes a 0-d tensor on the device.

    Filling a 0-d tensor is a launch and no synchronisation, where copying a host tensor would be one.
    """
    if isinstance(weight, Tensor):
        if not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating tensor, got {weight.dtype}")
        if weight.device != like.device:
            raise ValueError(f"weight: expected the device of x, {like.device}, got {weight.device}")
        if weight.dim() != 0 and weight.shape != lead:
            shapes = f"a float, shape () or {tuple(lead)}" if lead else "a float or shape ()"
            raise ValueError(f"weight: expected {shapes}, got {tuple(weight.shape)}")
        return weight.reshape(-1) if weight.dim() > 1 else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight: expected a float or a tensor, got {type(weight).__name__}")
    if not math.isfinite(weight):
        raise ValueError(f"weight: expected a finite number, got {weight}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), weight, dtype=dtype, device=like.device)


def autocast_enabled(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def widest(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest of their dtypes: what autocast does for operators of several inputs, such as `cat`."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
