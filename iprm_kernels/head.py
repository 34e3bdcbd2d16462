"""Probe, measure, rebalance: `probe_rebalance` for any head, `linear_probe_rebalance` for linear ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _checks
from ._library import register
from .backends import requested
from .collectives import all_reduce_sum, group_name
from .divergence import batch_kl, strength_weights
from .geodesic import geodesic_mixup
from .linear_head import linear_head_backward, linear_head_forward
from .reference import arithmetic_dtype

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
    _check_group(group)
    with torch.no_grad():
        probe = head(geodesic_mixup(x.detach(), y.detach(), weight))
        _check_output(probe, logits_x)
        kl = all_reduce_sum(torch.stack([batch_kl(logits_x, probe), batch_kl(logits_y, probe)]), group)
        strength = strength_weights(kl)
    return ProbeResult(head(geodesic_mixup(x, y, strength[0])), strength, kl)


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
    autocast = isinstance(x, Tensor) and _checks.autocast_enabled(x)
    _checks.matrix("x", x)
    _checks.matrix("y", y)
    _checks.alike("y", y, "x", x, autocast=autocast)
    heads = {"head_x": head_x, "head_y": head_y, "head_mix": head_mix}
    _check_heads(heads, x, autocast)
    _check_target(target, x)
    weight = _checks.mixing_weight(weight, x, torch.Size(()))
    _check_options(label_smoothing, ignore_index)
    _check_group(group)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(dtype), y.to(dtype)
        heads = {name: (w.to(dtype), b if b is None else b.to(dtype)) for name, (w, b) in heads.items()}
    if requested() == "reference":
        return _two_pass(x, y, heads, target, weight, label_smoothing, ignore_index, group)
    parameters = (*heads["head_x"], *heads["head_y"], *heads["head_mix"])
    outputs = _linear_probe_rebalance(
        x, y, *parameters, target, weight, float(label_smoothing), int(ignore_index), group_name(group)
    )
    return StepResult(*outputs[:7])


def _two_pass(
    x: Tensor,
    y: Tensor,
    heads: dict[str, LinearHead],
    target: Tensor,
    weight: Tensor,
    label_smoothing: float,
    ignore_index: int,
    group: ProcessGroup | None,
) -> StepResult:
    """The step as it reads, through `probe_rebalance` and autograd: what `use_backend("reference")` runs."""
    if not torch.compiler.is_compiling():  # compiled, cross_entropy itself refuses such a label
        _check_labels(target, heads["head_x"][0].shape[0], ignore_index)
    logits_x, logits_y = F.linear(x, *heads["head_x"]), F.linear(y, *heads["head_y"])
    mixed = probe_rebalance(x, y, logits_x, logits_y, lambda z: F.linear(z, *heads["head_mix"]), weight, group=group)
    dtype = arithmetic_dtype(x.dtype)
    losses = torch.stack(
        [
            F.cross_entropy(logits.to(dtype), target, ignore_index=ignore_index, label_smoothing=label_smoothing)
            for logits in (mixed.logits, logits_x, logits_y)
        ]
    )
    return StepResult(losses.sum(), losses, mixed.logits, logits_x, logits_y, mixed.strength, mixed.kl)


def _check_probe(x: Tensor, y: Tensor, logits_x: Tensor, logits_y: Tensor, head: Any) -> None:
    autocast = isinstance(x, Tensor) and _checks.autocast_enabled(x)
    _checks.matrix("x", x)
    _checks.matrix("y", y)
    _checks.alike("y", y, "x", x, autocast=autocast)
    _checks.matrix("logits_x", logits_x, "(B, C)")
    if logits_x.shape[0] != x.shape[0]:
        raise ValueError(f"logits_x: expected {x.shape[0]} rows, as x has, got shape {tuple(logits_x.shape)}")
    _checks.matrix("logits_y", logits_y, "(B, C)")
    _checks.alike("logits_y", logits_y, "logits_x", logits_x, autocast=autocast)
    if not callable(head):
        raise TypeError(f"head: expected a callable (B, D) -> (B, C), got {type(head).__name__}")


def _check_output(probe: Any, logits_x: Tensor) -> None:
    if not isinstance(probe, Tensor):
        raise TypeError(f"head: expected an output tensor (B, C), got {type(probe).__name__}")
    if probe.shape != logits_x.shape:
        raise ValueError(
            f"head: expected an output of the shape of logits_x, {tuple(logits_x.shape)}, got {tuple(probe.shape)}"
        )
    _checks.same_place("head", probe, "logits_x", logits_x, autocast=_checks.autocast_enabled(probe))


def _check_group(group: Any) -> None:
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup or None, got {type(group).__name__}")


def _check_options(label_smoothing: Any, ignore_index: Any) -> None:
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: expected a number in [0, 1], got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")


def _check_heads(heads: dict[str, LinearHead], x: Tensor, autocast: bool) -> None:
    """Each head is (weight (C, D), bias (C,) or None), all of the same C, for the features."""
    classes = None
    for name, head in heads.items():
        if not isinstance(head, (tuple, list)) or len(head) != 2:
            came = f"a {type(head).__name__} of {len(head)}" if isinstance(head, (tuple, list)) else type(head).__name__
            raise TypeError(f"{name}: expected (weight (C, D), bias (C,) or None), got {came}")
        weight, bias = head
        _checks.matrix(f"{name} weight", weight, "(C, D)")
        classes = weight.shape[0] if classes is None else classes
        if weight.shape != (classes, x.shape[1]):
            raise ValueError(f"{name} weight: expected shape {(classes, x.shape[1])}, got {tuple(weight.shape)}")
        _checks.same_place(f"{name} weight", weight, "x", x, autocast=autocast)
        if bias is not None:
            _checks.rows(f"{name} bias", bias, "(C,)")
            if bias.shape != (classes,):
                raise ValueError(f"{name} bias: expected shape {(classes,)}, got {tuple(bias.shape)}")
            _checks.same_place(f"{name} bias", bias, "x", x, autocast=autocast)


def _check_target(target: Tensor, x: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected an int64 tensor (B,), got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 class indices, got {target.dtype}")
    if target.shape != x.shape[:1]:
        raise ValueError(f"target: expected shape {tuple(x.shape[:1])}, got {tuple(target.shape)}")
    if target.device != x.device:
        raise ValueError(f"target: expected the device of x, {x.device}, got {target.device}")


def _check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError for a label outside [0, C) on the CPU; on a GPU looking would synchronise."""
    if target.device.type != "cpu":
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"target: expected labels in [0, {classes}), got {int(target[row])} in row {row}")


# linear_probe_rebalance: the seven fields of StepResult, then what the backward pass wants


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
    _check_labels(target, weight_x.shape[0], ignore_index)
    heads = (weight_x, bias_x, weight_y, bias_y, weight_mix, bias_mix)
    return linear_head_forward(x, y, heads, target, weight, label_smoothing, ignore_index, group)


def _fake(
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
    batch, classes, dtype = x.shape[0], weight_x.shape[0], arithmetic_dtype(x.dtype)
    loss, losses = x.new_empty((), dtype=dtype), x.new_empty((3,), dtype=dtype)
    logits = tuple(x.new_empty((batch, classes)) for _ in range(3))
    strength, kl = x.new_empty((2,), dtype=dtype), x.new_empty((2,), dtype=dtype)
    projected = tuple(x.new_empty((batch, classes), dtype=dtype) for _ in range(2))
    return loss, losses, *logits, strength, kl, *projected, x.new_empty((3, batch), dtype=dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[5:])
    x, y, weight_x, bias_x, weight_y, bias_y, weight_mix, bias_mix, target, _, *settings, _ = inputs
    ctx.label_smoothing, ctx.ignore_index = settings
    ctx.biases = [bias is not None for bias in (bias_x, bias_y, bias_mix)]
    ctx.save_for_backward(x, y, weight_x, weight_y, weight_mix, target, *output[2:6], *output[7:])


def _autograd(ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_logits = grads[:3]
    if grad_loss is None and grad_losses is None and not any(g is not None for g in grad_logits):
        return (None,) * 13
    gradients = list(
        _linear_probe_rebalance_backward(
            grad_loss, grad_losses, *grad_logits, *ctx.saved_tensors, ctx.label_smoothing, ctx.ignore_index
        )
    )
    for index, present in zip((3, 5, 7), ctx.biases, strict=True):
        if not present:
            gradients[index] = None
    return *gradients, None, None, None, None, None


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
    target: Tensor,
    logits_mix: Tensor,
    logits_x: Tensor,
    logits_y: Tensor,
    strength: Tensor,
    projected_x: Tensor,
    projected_y: Tensor,
    stats: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    grads = (grad_loss, grad_losses, grad_mix, grad_x, grad_y)
    logits = (logits_mix, logits_x, logits_y)
    saved = (strength, projected_x, projected_y, stats)
    return linear_head_backward(
        grads, x, y, (weight_x, weight_y, weight_mix), target, logits, saved, label_smoothing, ignore_index
    )


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, y, weight_x, weight_y, weight_mix = arguments[5:10]
    return tuple(
        tensor.new_empty(shape)
        for tensor, shape in (
            (x, x.shape),
            (y, y.shape),
            *((w, shape) for w in (weight_x, weight_y, weight_mix) for shape in (w.shape, w.shape[:1])),
        )
    )


_linear_probe_rebalance = register(
    "linear_probe_rebalance(Tensor x, Tensor y, Tensor weight_x, Tensor? bias_x, Tensor weight_y, Tensor? bias_y, "
    "Tensor weight_mix, Tensor? bias_mix, Tensor target, Tensor weight, float label_smoothing, int ignore_index, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_autograd,
)
_linear_probe_rebalance_backward = register(
    "linear_probe_rebalance_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_mix, Tensor? grad_x, Tensor? grad_y, "
    "Tensor x, Tensor y, Tensor weight_x, Tensor weight_y, Tensor weight_mix, Tensor target, Tensor logits_mix, "
    "Tensor logits_x, Tensor logits_y, Tensor strength, Tensor projected_x, Tensor projected_y, Tensor stats, "
    "float label_smoothing, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
