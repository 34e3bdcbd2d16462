"""Probe, measure, rebalance with linear heads, in one operator: see head_pairs.py for more than two modalities, any_head.py for
any other head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _checks
from ._head_step import LinearHead, cast, check_step, new_gradients, new_outputs, run_forward, wanted
from ._library import register
from .backends import kernels
from .collectives import group_name


class StepResult(NamedTuple):
    """What `linear_probe_rebalance` returns."""

    loss: Tensor  #: () the sum of `losses`
    losses: Tensor  #: (3,) mean cross entropies of the mixture, of x, of y
    logits_mix: Tensor  #: (B, C)
    logits_x: Tensor  #: (B, C)
    logits_y: Tensor  #: (B, C)
    strength: Tensor  #: (2,) ω of x and y, without gradient
    kl: Tensor  #: (2,) batch KL of x and y from the probed mixture, without gradient


def linear_probe_rebalance(
    x: Tensor,
    y: Tensor,
    head_x: LinearHead,
    head_y: LinearHead,
    head_mix: LinearHead,
    target: Tensor,
    weight: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> StepResult:
    r"""One training step of the three linear heads: unimodal predictions, probe, rebalance and losses::

        logits_x, logits_y = linear(x, *head_x), linear(y, *head_y)
        logits_mix, ω, KL = probe_rebalance(x, y, logits_x, logits_y, head_mix, weight)
        losses = cross_entropy(logits_mix), cross_entropy(logits_x), cross_entropy(logits_y);   loss = Σ losses

    Mixing commutes with a linear head, so that each feature matrix is multiplied once, by the two heads it meets stacked,
    and probe and rebalance are arithmetic on (B, C) matrices. Gradients follow the closed form, from all outputs but strength
    and kl, to the features and every head.

    Args:
        x: (B, D) features of the first modality.
        y: (B, D) features of the second, same dtype and device. Under autocast features and heads are cast to its dtype.
        head_x: (weight (C, D), bias (C,) or None) of the head on x.
        head_y: likewise on y.
        head_mix: likewise on the mixture.
        target: (B,) int64 class indices.
        weight: the probing weight λ of x: a float or a 0-d tensor on the device; receives no gradient.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        ignore_index: rows with this target count in the KL, which needs no labels, and not in the losses.
        group: processes whose KL sums and counts of rows are added, in one call, before ω is taken; None takes the local batch
            alone. ω is that of the joint batch; loss and losses are this process's share: their mean over the processes, and
            that of the gradients, are those of the joint batch, however many rows each process has.

    Returns:
        StepResult: logits in the dtype of the features, the rest float32 (float64 for float64 features).

    Raises:
        TypeError: an argument that is no floating tensor, a `target` not int64, or dtypes that differ.
        ValueError: shapes or devices that differ, a label outside [0, C) on the CPU. On a GPU, where looking would
            synchronise, the losses such a row enters and its gradients are NaN.

    Source: Yang, Wu, Jiang, IJCAI 2025; the closed form is this project's.
    """
    heads = {"head_x": head_x, "head_y": head_y, "head_mix": head_mix}
    dtype = check_step({"x": x, "y": y}, heads, target, label_smoothing, ignore_index, group)
    weight = _checks.mixing_weight(weight, x, torch.Size(()))
    tensors = (x, y, head_mix[0], head_x[0], head_y[0], head_mix[1], head_x[1], head_y[1])
    outputs = _linear_probe_rebalance(
        *cast(tensors, dtype), target, weight, float(label_smoothing), int(ignore_index), group_name(group)
    )
    return StepResult(*outputs[:7])


# linear_probe_rebalance: the seven fields of StepResult, then the state that the backward pass wants, see
# `reference.head.State`. Of weights, biases and their gradients those of the mixture come first, as in the kernels.


def _kernel(
    x: Tensor,
    y: Tensor,
    weight_mix: Tensor,
    weight_x: Tensor,
    weight_y: Tensor,
    bias_mix: Tensor | None,
    bias_x: Tensor | None,
    bias_y: Tensor | None,
    target: Tensor,
    probing: Tensor,
    label_smoothing: float,
    ignore_index: int,
    group: str,
) -> tuple[Tensor, ...]:
    classes = len(weight_mix)
    state, kl, strength, loss, losses = new_outputs(x, classes, 2, 1)
    shape = (len(x), classes)
    logits_mix, logits_x, logits_y = x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)
    tensors = (x, y, weight_mix, weight_x, weight_y, bias_mix, bias_x, bias_y)
    inputs = (*tensors, target, probing.to(kl.dtype), label_smoothing, ignore_index)
    outputs = (state, logits_mix, logits_x, logits_y, kl, strength, loss, losses)
    run_forward(kernels(x.device).head_forward, inputs, outputs, kl, classes, group)
    return loss, losses, logits_mix, logits_x, logits_y, strength, kl, state


def _fake(x: Tensor, y: Tensor, weight_mix: Tensor, *_: Any) -> tuple[Tensor, ...]:
    classes = weight_mix.shape[0]
    state, kl, strength, loss, losses = new_outputs(x, classes, 2, 1)
    logits = (x.new_empty((x.shape[0], classes)) for _ in range(3))
    return loss, losses, *logits, strength, kl, state


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[5:])
    *tensors, _, _, target, _, ctx.label_smoothing, ctx.ignore_index, _ = inputs
    _, _, _, logits_x, logits_y, strength, _, state = output
    ctx.save_for_backward(*tensors, target, state, logits_x, logits_y, strength)


def _autograd(ctx: Any, saved: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[:8]
    if all(grad is None for grad in upstream[:5]) or not any(needed):
        return (None,) * 13
    found = _linear_probe_rebalance_backward(*upstream[:5], *saved, ctx.label_smoothing, ctx.ignore_index, needed)
    return (*wanted(found, needed), None, None, None, None, None)


def _backward_kernel(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logits_mix: Tensor | None,
    grad_logits_x: Tensor | None,
    grad_logits_y: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight_mix: Tensor,
    weight_x: Tensor,
    weight_y: Tensor,
    bias_mix: Tensor | None,
    target: Tensor,
    state: Tensor,
    logits_x: Tensor,
    logits_y: Tensor,
    strength: Tensor,
    label_smoothing: float,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    found = new_gradients((x, y, weight_mix, weight_x, weight_y), len(weight_mix), needed)
    kernels(x.device).head_backward(
        *(grad_loss, grad_losses, grad_logits_mix, grad_logits_x, grad_logits_y, x, y, weight_mix, weight_x, weight_y),
        *(bias_mix, target, state, logits_x, logits_y, strength, label_smoothing, ignore_index, *wanted(found, needed)),
    )
    return tuple(found)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, needed = arguments[5:10], arguments[-1]
    return tuple(new_gradients(tensors, tensors[2].shape[0], needed))


_linear_probe_rebalance = register(
    "linear_probe_rebalance(Tensor x, Tensor y, Tensor weight_mix, Tensor weight_x, Tensor weight_y, Tensor? bias_mix, "
    "Tensor? bias_x, Tensor? bias_y, Tensor target, Tensor probing, float label_smoothing, int ignore_index, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_autograd,
)
_linear_probe_rebalance_backward = register(
    "linear_probe_rebalance_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_logits_mix, Tensor? grad_logits_x, "
    "Tensor? grad_logits_y, Tensor x, Tensor y, Tensor weight_mix, Tensor weight_x, Tensor weight_y, Tensor? bias_mix, "
    "Tensor target, Tensor state, Tensor logits_x, Tensor logits_y, Tensor strength, float label_smoothing, int ignore_index, "
    "bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
