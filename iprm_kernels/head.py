"""Probe, measure, rebalance: `probe_rebalance` for any head, `linear_probe_rebalance` for linear ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _checks, autocast
from ._library import register
from .backends import PROBE, REBALANCE, kernels
from .collectives import all_reduce_named, all_reduce_sum, group_name
from .divergence import batch_kl_pair, strength_weights
from .dtypes import arithmetic_dtype
from .geodesic import mixed_twice

LinearHead = tuple[Tensor, Tensor | None]


class ProbeResult(NamedTuple):
    """What `probe_rebalance` returns."""

    logits: Tensor  #: (B, C) of the mixture with the weights just measured
    strength: Tensor  #: (2,) ω of x and y, without gradient
    kl: Tensor  #: (2,) batch KL of x and y from the probed mixture, without gradient


class StepResult(NamedTuple):
    """What `linear_probe_rebalance` returns."""

    loss: Tensor  #: () the sum of `losses`
    losses: Tensor  #: (3,) mean cross entropies of the mixture, of x, of y
    logits_mix: Tensor  #: (B, C)
    logits_x: Tensor  #: (B, C)
    logits_y: Tensor  #: (B, C)
    strength: Tensor  #: (2,) ω of x and y, without gradient
    kl: Tensor  #: (2,) batch KL of x and y from the probed mixture, without gradient


def probe_rebalance(
    x: Tensor,
    y: Tensor,
    logits_x: Tensor,
    logits_y: Tensor,
    head: Callable[[Tensor], Tensor],
    weight: float | Tensor,
    *,
    group: ProcessGroup | None = None,
) -> ProbeResult:
    r"""One probe-and-rebalance step through any head::

        P̄  = head(geodesic_mixup(x, y, weight))               # the probe, without gradient
        KL  = batch_kl(logits_x, P̄), batch_kl(logits_y, P̄)
        ω   = strength_weights(KL)
        out = head(geodesic_mixup(x, y, ω_x))                 # with gradient to x, y and the head

    Args:
        x: (B, D) features of the first modality.
        y: (B, D) features of the second, same dtype and device.
        logits_x: (B, C) unimodal prediction from x; only measured, receives no gradient here.
        logits_y: (B, C) unimodal prediction from y, likewise.
        head: (B, D) -> (B, C), called twice in the mode it is in, the first time under ``torch.no_grad``. A head with batch
            normalisation updates its running statistics twice, one with dropout draws twice.
        weight: the probing weight λ of x: a float or a 0-d tensor on the device.
        group: processes whose KL sums are added before ω is taken; None measures the local batch alone.

    Returns:
        ProbeResult: logits (B, C), strength (2,), kl (2,).

    Raises:
        TypeError, ValueError: as `geodesic_mixup` and `batch_kl`; a head whose output is not shaped as the unimodal logits.

    Source: Yang, Wu, Jiang, "Instantaneous Probe-and-Rebalance Multimodal Learning", IJCAI 2025.
    """
    _check_probe(x, y, logits_x, logits_y, head)
    weight = _checks.mixing_weight(weight, x, torch.Size(()))
    _checks.process_group(group)
    if autocast.enabled(x):
        x, y = autocast.widest(x, y)  # with gradient, and so before the probe
    with torch.no_grad(), autocast.uncached(x):
        mixture, remix = mixed_twice(x, y, weight)
        probe = head(mixture)
        _check_output(probe, logits_x)
        if autocast.enabled(probe):
            logits_x, logits_y, probe = autocast.widest(logits_x, logits_y, probe)
        kl = all_reduce_sum(batch_kl_pair(logits_x, logits_y, probe), group)
        strength = strength_weights(kl)
    return ProbeResult(head(remix(strength[0])), strength, kl)


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
        group: processes whose KL sums are added before ω is taken; None measures the local batch alone.

    Returns:
        StepResult: logits in the dtype of the features, the rest float32 (float64 for float64 features).

    Raises:
        TypeError: an argument that is no floating tensor, a `target` not int64, or dtypes that differ.
        ValueError: shapes or devices that differ, a label outside [0, C) on the CPU. On a GPU, where looking would
            synchronise, the losses such a row enters and its gradients are NaN.

    Source: Yang, Wu, Jiang, IJCAI 2025; the closed form is this project's.
    """
    casting = isinstance(x, Tensor) and autocast.enabled(x)
    _checks.matrix("x", x)
    _checks.matrix("y", y)
    _checks.alike("y", y, "x", x, autocast=casting and torch.float64 not in (x.dtype, y.dtype))
    heads = {"head_x": head_x, "head_y": head_y, "head_mix": head_mix}
    _checks.linear_heads(heads, x, casting and x.dtype != torch.float64)
    _checks.target(target, x)
    weight = _checks.mixing_weight(weight, x, torch.Size(()))
    _checks.cross_entropy_options(label_smoothing, ignore_index)
    _checks.process_group(group)
    if casting and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(dtype), y.to(dtype)
        heads = {name: (w.to(dtype), b if b is None else b.to(dtype)) for name, (w, b) in heads.items()}
    parameters = (*heads["head_x"], *heads["head_y"], *heads["head_mix"])
    outputs = _linear_probe_rebalance(
        x, y, *parameters, target, weight, float(label_smoothing), int(ignore_index), group_name(group)
    )
    return StepResult(*outputs[:7])


def _check_probe(x: Tensor, y: Tensor, logits_x: Tensor, logits_y: Tensor, head: Any) -> None:
    casting = isinstance(x, Tensor) and autocast.enabled(x)
    _checks.matrix("x", x)
    _checks.matrix("y", y)
    _checks.alike("y", y, "x", x, autocast=casting)
    _checks.matrix("logits_x", logits_x, "(B, C)")
    if logits_x.shape[0] != x.shape[0]:
        raise ValueError(f"logits_x: expected {x.shape[0]} rows, as x has, got shape {tuple(logits_x.shape)}")
    _checks.matrix("logits_y", logits_y, "(B, C)")
    _checks.alike("logits_y", logits_y, "logits_x", logits_x, autocast=casting)
    if not callable(head):
        raise TypeError(f"head: expected a callable (B, D) -> (B, C), got {type(head).__name__}")


def _check_output(probe: Any, logits_x: Tensor) -> None:
    if not isinstance(probe, Tensor):
        raise TypeError(f"head: expected an output tensor (B, C), got {type(probe).__name__}")
    if probe.shape != logits_x.shape:
        raise ValueError(
            f"head: expected an output of the shape of logits_x, {tuple(logits_x.shape)}, got {tuple(probe.shape)}"
        )
    _checks.same_place("head", probe, "logits_x", logits_x, autocast=autocast.enabled(probe))


# linear_probe_rebalance: the seven fields of StepResult, then the state that the backward pass wants: stats (3, B), A and V
# (B, C), the unimodal logits in the arithmetic type where those returned are narrower, and the number of rows that count in the
# losses, in one tensor


def _state_size(x: Tensor, classes: int) -> int:
    return x.shape[0] * (3 + (2 if x.dtype == arithmetic_dtype(x.dtype) else 4) * classes) + 1


def _kernel(
    x: Tensor,
    y: Tensor,
    weight_x: Tensor,
    bias_x: Tensor | None,
    weight_y: Tensor,
    bias_y: Tensor | None,
    weight_mix: Tensor,
    bias_mix: Tensor | None,
    target: Tensor,
    weight: Tensor,
    label_smoothing: float,
    ignore_index: int,
    group: str,
) -> tuple[Tensor, ...]:
    batch, classes, dtype, device = x.shape[0], weight_x.shape[0], arithmetic_dtype(x.dtype), x.device
    state = torch.empty((_state_size(x, classes),), dtype=dtype, device=device)
    loss = torch.empty((), dtype=dtype, device=device)
    losses = torch.empty((3,), dtype=dtype, device=device)
    strength = torch.empty((2,), dtype=dtype, device=device)
    kl = torch.empty_like(strength)
    logits_mix = torch.empty((batch, classes), dtype=x.dtype, device=device)
    logits_x, logits_y = torch.empty_like(logits_mix), torch.empty_like(logits_mix)

    inputs = (x, y, weight_x, bias_x, weight_y, bias_y, weight_mix, bias_mix, target, weight.to(dtype))
    outputs = (state, logits_mix, logits_x, logits_y, kl, strength, loss, losses)
    forward = kernels(device).head_forward
    try:
        if group:
            forward(*inputs, label_smoothing, ignore_index, PROBE, *outputs)
            all_reduce_named(kl, group)
            forward(*inputs, label_smoothing, ignore_index, REBALANCE, *outputs)
        else:
            forward(*inputs, label_smoothing, ignore_index, PROBE | REBALANCE, *outputs)
    except RuntimeError:
        _checks.labels(target, classes, ignore_index)  # a kernel on the CPU refuses them as it can; this says it as it should
        raise
    return loss, losses, logits_mix, logits_x, logits_y, strength, kl, state


def _fake(x: Tensor, y: Tensor, weight_x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch, classes, dtype = x.shape[0], weight_x.shape[0], arithmetic_dtype(x.dtype)
    loss, losses = x.new_empty((), dtype=dtype), x.new_empty((3,), dtype=dtype)
    logits = tuple(x.new_empty((batch, classes)) for _ in range(3))
    strength, kl = x.new_empty((2,), dtype=dtype), x.new_empty((2,), dtype=dtype)
    return loss, losses, *logits, strength, kl, x.new_empty((_state_size(x, classes),), dtype=dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[5:])
    x, y, weight_x, _, weight_y, _, weight_mix, bias_mix, target, _, ctx.label_smoothing, ctx.ignore_index, _ = inputs
    _, _, _, logits_x, logits_y, strength, _, state = output
    ctx.save_for_backward(x, y, weight_x, weight_y, weight_mix, bias_mix, target, state, logits_x, logits_y, strength)


def _autograd(
    ctx: Any, saved: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *grads: Tensor | None
) -> tuple[Any, ...]:
    upstream = (grad_loss, grad_losses, *grads[:3])
    needed = ctx.needs_input_grad[:8]
    if all(grad is None for grad in upstream) or not any(needed):
        return (None,) * 13
    found = _linear_probe_rebalance_backward(*upstream, *saved, ctx.label_smoothing, ctx.ignore_index, needed)
    return *(grad if need else None for grad, need in zip(found, needed, strict=True)), None, None, None, None, None


def _backward_kernel(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_mix: Tensor | None,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight_x: Tensor,
    weight_y: Tensor,
    weight_mix: Tensor,
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
    # a gradient nobody asked for is neither computed nor written; an operator must still return a tensor for it
    shapes = _gradient_shapes(x, y, weight_x, weight_y, weight_mix)
    found = [
        torch.empty(shape if need else (0,), dtype=x.dtype, device=x.device) for shape, need in zip(shapes, needed, strict=True)
    ]
    kernels(x.device).head_backward(
        *(grad_loss, grad_losses, grad_mix, grad_x, grad_y),
        *(x, y, weight_x, weight_y, weight_mix, bias_mix, target),
        *(state, logits_x, logits_y, strength, label_smoothing, ignore_index),
        *(grad if need else None for grad, need in zip(found, needed, strict=True)),
    )
    return tuple(found)


def _gradient_shapes(x: Tensor, y: Tensor, *weights: Tensor) -> list[Any]:
    """Of the eight tensors a step is differentiated by, in the order of the operator's arguments."""
    return [x.shape, y.shape, *(shape for w in weights for shape in (w.shape, w.shape[:1]))]


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, needed = arguments[5:10], arguments[-1]
    shapes = _gradient_shapes(*tensors)
    return tuple(tensors[0].new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True))


_linear_probe_rebalance = register(
    "linear_probe_rebalance(Tensor x, Tensor y, Tensor weight_x, Tensor? bias_x, Tensor weight_y, Tensor? bias_y, "
    "Tensor weight_mix, Tensor? bias_mix, Tensor target, Tensor weight, float label_smoothing, int ignore_index, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_autograd,
)
_linear_probe_rebalance_backward = register(
    "linear_probe_rebalance_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_mix, Tensor? grad_x, Tensor? grad_y, "
    "Tensor x, Tensor y, Tensor weight_x, Tensor weight_y, Tensor weight_mix, Tensor? bias_mix, Tensor target, "
    "Tensor state, Tensor logits_x, Tensor logits_y, Tensor strength, float label_smoothing, int ignore_index, bool[] needed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
