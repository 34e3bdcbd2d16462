"""What the operators of the linear head step share, for one pair of modalities or for many: checks, outputs, and the two parts
of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _checks, autocast
from .backends import PROBE, REBALANCE
from .collectives import joint_sums, weighted
from .dtypes import arithmetic_dtype
from .reference.head import State

LinearHead = tuple[Tensor, Tensor | None]


def check_step(
    features: Mapping[str, Tensor],
    heads: Mapping[str, LinearHead],
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    group: ProcessGroup | None,
) -> torch.dtype | None:
    """Checks arguments by name.  -> the dtype that autocast wants features and heads in, None to leave them"""
    (first, x), *others = features.items()
    casting = isinstance(x, Tensor) and autocast.enabled(x)
    _checks.matrix(first, x)
    for name, matrix in others:
        _checks.matrix(name, matrix)
        _checks.alike(name, matrix, first, x, autocast=casting and torch.float64 not in (x.dtype, matrix.dtype))
    casting = casting and x.dtype != torch.float64
    _checks.linear_heads(heads, x, casting)
    _checks.target(target, x)
    _checks.cross_entropy_options(label_smoothing, ignore_index)
    _checks.process_group(group)
    return torch.get_autocast_dtype(x.device.type) if casting else None


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype | None) -> Sequence[Any]:
    return tensors if dtype is None else [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def new_outputs(x: Tensor, classes: int, modalities: int, pairs: int) -> tuple[Tensor, ...]:
    """What a forward pass fills besides logits: state, kl (2P,), strength (2P,), loss (), losses (P + M,)."""
    dtype = arithmetic_dtype(x.dtype)
    state = x.new_empty(State.size(x.shape[0], classes, modalities, pairs, x.dtype != dtype), dtype=dtype)
    new = state.new_empty
    return state, new(2 * pairs), new(2 * pairs), new(()), new(pairs + modalities)


def run_forward(
    kernel: Callable[..., None], inputs: Sequence[Any], outputs: Sequence[Any], kl: Tensor, classes: int, group: str
) -> None:
    """The step by a backend's kernel, in one go, or with `kl` added up over the group between its two parts.

    inputs: up to target, probing, label_smoothing and ignore_index; outputs: from the state to loss and losses.
    """
    try:
        if group:
            *_, target, _, _, ignore_index = inputs
            kernel(*inputs, PROBE, *outputs)
            joint, share = joint_sums(kl, target, ignore_index, group)
            kl.copy_(joint)
            kernel(*inputs, REBALANCE, *outputs)
            _take_share(share, outputs[0], *outputs[-2:])
        else:
            kernel(*inputs, PROBE | REBALANCE, *outputs)
    except RuntimeError:
        *_, target, _, _, ignore_index = inputs
        _checks.labels(target, classes, ignore_index)  # a kernel on the CPU refuses them as it can; this says it as it should
        raise


def _take_share(share: Tensor, state: Tensor, loss: Tensor, losses: Tensor) -> None:
    """Makes of means over the local rows this process's share of those over the rows of all, and so of their gradients."""
    own = State.counted_of(state)
    for mean in (loss, losses):
        mean.copy_(weighted(mean, share))
    own.copy_(torch.where(share == 0, 1, own / share))  # what the backward pass divides by


def new_gradients(tensors: Sequence[Tensor], classes: int, needed: Sequence[bool]) -> list[Tensor]:
    """Gradients of features and weights, then of the biases, one a weight. Of one nobody asked for, which is neither computed
    nor written, an operator must still return a tensor."""
    new = tensors[0].new_empty
    shapes: list[Any] = [tensor.shape for tensor in tensors]
    shapes += [classes] * (len(needed) - len(shapes))
    return [new(shape if need else 0) for shape, need in zip(shapes, needed, strict=True)]


def wanted(gradients: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
    """None in the place of a gradient that nobody asked for."""
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
