"""Argument checks, shared by the public functions and by modules built on them.

Each function takes the name of the argument first, and raises TypeError or ValueError with the name, the expected value and the
value that was passed.
"""

from __future__ import annotations

import decimal
import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .dtypes import FLOATING, arithmetic_dtype

#: The smallest and the largest eps: 1 / eps² enters gradients, and must be representable.
EPS_RANGE = {torch.float32: (1e-18, 1e18), torch.float64: (1e-150, 1e150)}
#: The largest finite weight.
LARGEST_WEIGHT = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def real_number(value: Any) -> float | None:
    """`value` as a float: a real number of Python (also `Fraction` and `Decimal`) or of numpy, or a 0-d array or tensor of one.

    None for anything else, and for a bool. An int stays an int. A number too large for a float is infinite.
    """
    if not isinstance(value, (int, float)) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (int, float)):  # first, because torch.compile traces it
        return None if isinstance(value, bool) else value
    if not isinstance(value, (numbers.Real, decimal.Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def rows(name: str, value: Any, shape: str = "(..., D)") -> None:
    """`value` is a floating tensor with at least one dimension; the last dimension is not empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    dense(name, value)
    if value.dim() < 1 or value.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape {shape} with a last dimension of at least 1, got {tuple(value.shape)}")


def dense(name: str, value: Tensor) -> None:
    """`value` has elements at strides: it is neither sparse, nor nested, nor in a library-specific layout (such as mkldnn)."""
    if value.layout is not torch.strided or value.is_nested:
        came = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: expected a dense tensor (layout torch.strided), got {came}")


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


def epsilon(eps: Any, like: Tensor) -> float:
    """`eps` is a positive finite number whose 1 / eps² is representable in the arithmetic type of `like`."""
    number = real_number(eps)
    if number is None:
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    eps = number
    if not (0 < eps < math.inf):
        raise ValueError(f"eps: expected a positive finite number, got {eps}")
    smallest, largest = EPS_RANGE[arithmetic_dtype(like.dtype)]
    if eps < smallest:
        raise ValueError(f"eps: expected at least {smallest} for {like.dtype}, got {eps}")
    if eps > largest:
        raise ValueError(f"eps: expected at most {largest} for {like.dtype}, got {eps}")
    return float(eps)


def mixing_weight(weight: Any, like: Tensor, lead: torch.Size) -> Tensor:
    """The weight as a tensor: 0-d, or 1-d with one value per row. A float becomes a 0-d tensor on the device.

    Filling a 0-d tensor costs a launch but no synchronisation; copying a host tensor would synchronise.
    """
    if isinstance(weight, Tensor):
        if not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating tensor, got {weight.dtype}")
        dense("weight", weight)
        if weight.device != like.device:
            raise ValueError(f"weight: expected the device of x, {like.device}, got {weight.device}")
        if weight.dim() != 0 and weight.shape != lead:
            shapes = f"a float, shape () or {tuple(lead)}" if lead else "a float or shape ()"
            raise ValueError(f"weight: expected {shapes}, got {tuple(weight.shape)}")
        return weight.reshape(-1) if weight.dim() > 1 else weight
    number = real_number(weight)
    if number is None:
        raise TypeError(f"weight: expected a float or a tensor, got {type(weight).__name__}")
    weight = number
    if not -math.inf < weight < math.inf:  # instead of math.isfinite, which torch.compile cannot trace
        raise ValueError(f"weight: expected a finite number, got {weight}")
    dtype = arithmetic_dtype(like.dtype)
    if not -LARGEST_WEIGHT[dtype] <= weight <= LARGEST_WEIGHT[dtype]:
        raise ValueError(f"weight: expected a number that is finite in {dtype}, got {weight}")
    return torch.full((), weight, dtype=dtype, device=like.device)


# the head step


def sequence(name: str, value: Any, wanted: str) -> None:
    """`value` is a list or tuple; `wanted` names its elements in the error."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list or tuple of {wanted}, got {type(value).__name__}")


def pairs(value: Any, modalities: int) -> list[int]:
    """`value` is a non-empty list of pairs of different modalities.  -> the pairs as one flat list"""
    sequence("pairs", value, "pairs of modalities")
    if not value:
        raise ValueError("pairs: expected at least one pair of modalities, got none")
    for k, pair in enumerate(value):
        sequence(f"pairs[{k}]", pair, "two indices into features")
        whole = all(isinstance(place, numbers.Integral) and not isinstance(place, bool) for place in pair)
        if len(pair) != 2 or not whole or pair[0] == pair[1] or not all(0 <= place < modalities for place in pair):
            raise ValueError(f"pairs[{k}]: expected two different modalities, 0 to {modalities - 1}, got {tuple(pair)}")
    return [int(place) for pair in value for place in pair]


def linear_heads(heads: Mapping[str, Any], x: Tensor, autocast: bool) -> None:
    """Each head is (weight (C, D), bias (C,) or None) for features `x` (B, D); all heads have the same C."""
    classes = None
    for name, head in heads.items():
        if classes is not None and _fits(head, classes, x):
            continue  # the usual case, in few comparisons: the separate checks below cost 10 µs per step
        if not isinstance(head, (tuple, list)) or len(head) != 2:
            came = f"a {type(head).__name__} of {len(head)}" if isinstance(head, (tuple, list)) else type(head).__name__
            raise TypeError(f"{name}: expected (weight (C, D), bias (C,) or None), got {came}")
        weight, bias = head
        matrix(f"{name} weight", weight, "(C, D)")
        if weight.shape[0] < 1:
            raise ValueError(f"{name} weight: expected shape (C, D) with C at least 1, got {tuple(weight.shape)}")
        classes = weight.shape[0] if classes is None else classes
        if weight.shape != (classes, x.shape[1]):
            raise ValueError(f"{name} weight: expected shape {(classes, x.shape[1])}, got {tuple(weight.shape)}")
        same_place(f"{name} weight", weight, "x", x, autocast=autocast)
        if bias is not None:
            rows(f"{name} bias", bias, "(C,)")
            if bias.shape != (classes,):
                raise ValueError(f"{name} bias: expected shape {(classes,)}, got {tuple(bias.shape)}")
            same_place(f"{name} bias", bias, "x", x, autocast=autocast)


def _fits(head: Any, classes: int, x: Tensor) -> bool:
    if type(head) is not tuple or len(head) != 2:
        return False
    weight, bias = head
    return (
        isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.dtype == bias.dtype == x.dtype
        and weight.layout == bias.layout == x.layout
        and not (weight.is_nested or bias.is_nested)
        and weight.device == bias.device == x.device
        and weight.shape == (classes, x.shape[1])
        and bias.shape == (classes,)
    )


def target(value: Any, x: Tensor) -> None:
    """`value` is (B,) class indices on the device of `x`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"target: expected an int64 tensor (B,), got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"target: expected int64 class indices, got {value.dtype}")
    dense("target", value)
    if value.shape != x.shape[:1]:
        raise ValueError(f"target: expected shape {tuple(x.shape[:1])}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"target: expected the device of x, {x.device}, got {value.device}")


def labels(value: Tensor, classes: int, ignore_index: int) -> None:
    """Labels on the CPU are in [0, C) or `ignore_index`; on a GPU the check would synchronise, so it is left out."""
    if value.device.type != "cpu" or len(value) == 0:
        return
    lowest, highest = (end.item() for end in value.aminmax())
    if lowest >= 0 and highest < classes:
        return
    wrong = (value != ignore_index) & ((value < 0) | (value >= classes))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"target: expected labels in [0, {classes}), got {int(value[row])} in row {row}")


def cross_entropy_options(label_smoothing: Any, ignore_index: Any) -> None:
    """`label_smoothing` is a number in [0, 1], `ignore_index` an integer of 64 bits."""
    number = real_number(label_smoothing)
    if number is None:
        raise TypeError(f"label_smoothing: expected a number in [0, 1], got {type(label_smoothing).__name__}")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not -(2**63) <= int(ignore_index) < 2**63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {ignore_index}")


def process_group(group: Any) -> None:
    """`group` is a process group or None."""
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup or None, got {type(group).__name__}")
