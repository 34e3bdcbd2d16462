"""The operator behind the functions of `head`: the linear head step of M modalities in P pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import arguments, autocast
from .backends import kernels
from .collectives import joint_sums, weighted
from .convention import PROBE, REBALANCE, HeadBackwardInputs, HeadGradients, HeadInputs, HeadOutputs, HeadState
from .dtypes import arithmetic_dtype
from .registration import register

LinearHead = tuple[Tensor, Tensor | None]


def check_step(
    features: Mapping[str, Tensor],
    heads: Mapping[str, LinearHead],
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    group: ProcessGroup | None,
) -> torch.dtype | None:
    """Checks arguments by name.  -> the dtype that autocast casts features and heads to; None if they are not cast"""
    (first, x), *others = features.items()
    casting = isinstance(x, Tensor) and autocast.enabled(x)
    arguments.matrix(first, x)
    for name, matrix in others:
        arguments.matrix(name, matrix)
        arguments.alike(name, matrix, first, x, autocast=casting and torch.float64 not in (x.dtype, matrix.dtype))
    casting = casting and x.dtype != torch.float64
    arguments.linear_heads(heads, x, casting)
    arguments.target(target, x)
    arguments.cross_entropy_options(label_smoothing, ignore_index)
    arguments.process_group(group)
    return torch.get_autocast_dtype(x.device.type) if casting else None


def cast(tensors: list[Any], dtype: torch.dtype | None) -> list[Any]:
    return tensors if dtype is None else [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def new_outputs(x: Tensor, classes: int, modalities: int, pairs: int) -> HeadOutputs:
    batch, heads, dtype = x.shape[0], pairs + modalities, arithmetic_dtype(x.dtype)
    state = x.new_empty(HeadState.size(batch, classes, modalities, pairs, x.dtype != dtype), dtype=dtype)
    new = state.new_empty
    logits = [x.new_empty((batch, classes)) for _ in range(heads)]
    return HeadOutputs(state, logits, new(2 * pairs), new(2 * pairs), new(()), new(heads))


def _returned(outputs: HeadOutputs) -> list[Tensor]:
    """The operator's results: loss, losses and P + M logits, which are differentiable; then strength, kl and state, which are
    not."""
    return [outputs.loss, outputs.losses, *outputs.logits, outputs.strength, outputs.kl, outputs.state]


def _forward(
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[int],
    target: Tensor,
    probe_weight: Tensor,
    label_smoothing: float,
    ignore_index: int,
    group: str,
) -> list[Tensor]:
    x, classes, count = features[0], len(weights[0]), len(pairs) // 2
    outputs = new_outputs(x, classes, len(features), count)
    probe_weight = probe_weight.to(outputs.kl.dtype).expand(count).contiguous()
    inputs = HeadInputs(features, weights, biases, pairs, target, probe_weight, label_smoothing, ignore_index)
    run = kernels(x.device).head_forward
    try:
        if group:
            run(inputs, PROBE, outputs)
            kl, share = joint_sums(outputs.kl, target, ignore_index, group)
            outputs.kl.copy_(kl)
            run(inputs, REBALANCE, outputs)
            _take_share(share, outputs)
        else:
            run(inputs, PROBE | REBALANCE, outputs)
    except RuntimeError:
        arguments.labels(target, classes, ignore_index)  # a ValueError for a bad label, where C++ raises RuntimeError
        raise
    return _returned(outputs)


def _take_share(share: Tensor, outputs: HeadOutputs) -> None:
    """Turns means over the local rows, and their gradients, into this process's share of the means over all rows."""
    for mean in (outputs.loss, outputs.losses):
        mean.copy_(weighted(mean, share))
    counted = HeadState.counted_of(outputs.state)
    counted.copy_(torch.where(share == 0, 1, counted / share))  # the backward pass divides by it


def _forward_fake(
    features: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], pairs: list[int], *_: Any
) -> list[Tensor]:
    return _returned(new_outputs(features[0], weights[0].shape[0], len(features), len(pairs) // 2))


def _setup(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[-3:])
    features, weights, biases, ctx.pairs, target, _, ctx.label_smoothing, ctx.ignore_index, _ = inputs
    ctx.modalities, count = len(features), len(ctx.pairs) // 2
    *_, strength, _, state = output
    ctx.save_for_backward(*features, *weights, *biases[:count], target, state, *output[2 + count : -3], strength)


def _autograd(ctx: Any, saved: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    count, modalities = len(ctx.pairs) // 2, ctx.modalities
    heads = count + modalities
    needed = list(ctx.needs_input_grad[: modalities + 2 * heads])
    rest = (None,) * (len(ctx.pairs) + 5)  # the pairs, and the five arguments after them
    grad_loss, grad_losses, *grad_logits = upstream[:-3]
    if not any(needed) or (grad_loss is None and grad_losses is None and all(grad is None for grad in grad_logits)):
        return (None,) * len(needed) + rest
    features, weights = list(saved[:modalities]), list(saved[modalities : modalities + heads])
    biases, (target, state, *unimodal, strength) = saved[modalities + heads :][:count], saved[modalities + heads + count :]
    found = _head_backward(
        *(grad_loss, grad_losses, grad_logits, features, weights, list(biases), ctx.pairs),
        *(target, state, unimodal, strength, ctx.label_smoothing, ctx.ignore_index, needed),
    )
    return (*_where(needed, found), *rest)


def _backward(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logits: list[Tensor | None],
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[int],
    target: Tensor,
    state: Tensor,
    unimodal: list[Tensor],
    strength: Tensor,
    label_smoothing: float,
    ignore_index: int,
    needed: list[bool],
) -> list[Tensor]:
    inputs = HeadBackwardInputs(
        *(grad_loss, grad_losses, grad_logits, features, weights, biases, pairs),
        *(target, state, unimodal, strength, label_smoothing, ignore_index),
    )
    found = _new_gradients(features, weights, needed)
    outputs, heads = _where(needed, found), len(weights)
    gradients = HeadGradients(outputs[: len(features)], outputs[len(features) : -heads], outputs[-heads:])
    kernels(features[0].device).head_backward(inputs, gradients)
    return found


def _backward_fake(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logits: list[Tensor | None],
    features: list[Tensor],
    weights: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    return _new_gradients(features, weights, rest[-1])


def _new_gradients(features: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """Gradients of features, weights and biases, allocated; empty where not needed, since an operator must return tensors."""
    new, classes = features[0].new_empty, weights[0].shape[0]
    shapes: list[Any] = [*(tensor.shape for tensor in (*features, *weights)), *([classes] * len(weights))]
    return [new(shape if need else 0) for shape, need in zip(shapes, needed, strict=True)]


def _where(needed: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, with None for each that is not needed."""
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


head_step = register(
    "linear_probe_rebalance(Tensor[] features, Tensor[] weights, Tensor?[] biases, int[] pairs, Tensor target, "
    "Tensor probe_weight, float label_smoothing, int ignore_index, str group) -> Tensor[]",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)
_head_backward = register(
    "linear_probe_rebalance_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor?[] grad_logits, Tensor[] features, "
    "Tensor[] weights, Tensor?[] biases, int[] pairs, Tensor target, Tensor state, Tensor[] unimodal, Tensor strength, "
    "float label_smoothing, int ignore_index, bool[] needed) -> Tensor[]",
    _backward,
    _backward_fake,
)
