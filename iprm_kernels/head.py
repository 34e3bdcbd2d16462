"""Probe, measure, rebalance with linear heads, in one operator: see any_head.py for any other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _checks, autocast
from ._library import register
from .backends import PROBE, REBALANCE, kernels
from .collectives import all_reduce_named, group_name
from .dtypes import arithmetic_dtype
from .reference.head import State

LinearHead = tuple[Tensor, Tensor | None]


class StepResult(NamedTuple):
    """What `linear_probe_rebalance` returns."""

    loss: Tensor  #: () the sum of `losses`
    losses: Tensor  #: (3,) mean cross entropies of the mixture, of x, of y
    logits_mix: Tensor  #: (B, C)
    logits_x: Tensor  #: (B, C)
    logits_y: Tensor  #: (B, C)
    strength: Tensor  #: (2,) ω of x and y, without gradient
    kl: Tensor  #: (2,) batch KL of x and y from the probed mixture, without gradient


class PairsResult(NamedTuple):
    """What `linear_probe_rebalance_pairs` returns, for M modalities and P pairs of them."""

    loss: Tensor  #: () mean of `mix_losses` and sum of `losses`
    losses: Tensor  #: (M,) mean cross entropies of the modalities
    mix_losses: Tensor  #: (P,) of the mixtures
    logits: Tensor  #: (M, B, C) of the modalities
    mix_logits: Tensor  #: (P, B, C) of the mixtures
    strength: Tensor  #: (P, 2) ω of both modalities of a pair, without gradient
    kl: Tensor  #: (P, 2) batch KL of both from the probed mixture, without gradient


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
    features = {"x": x, "y": y}
    heads = {"head_x": head_x, "head_y": head_y, "head_mix": head_mix}
    loss, losses, logits, strength, kl = _step(
        features, heads, [0, 1], target, weight, torch.Size(()), label_smoothing, ignore_index, group
    )
    logits_mix, logits_x, logits_y = logits.unbind(0)
    return StepResult(loss, losses, logits_mix, logits_x, logits_y, strength, kl)


def linear_probe_rebalance_pairs(
    features: Sequence[Tensor],
    heads: Sequence[LinearHead],
    mix_heads: Sequence[LinearHead],
    target: Tensor,
    weight: float | Tensor,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
) -> PairsResult:
    r"""The step of `linear_probe_rebalance` for M modalities at once, probed and rebalanced in P pairs::

        logits_m = linear(features_m, *heads_m)                                                for each modality m
        mix_logits_p, ω_p, KL_p = probe_rebalance(x_i, x_j, logits_i, logits_j, mix_heads_p, λ_p)      for each pair p = (i, j)
        loss = 1/P Σ_p cross_entropy(mix_logits_p) + Σ_m cross_entropy(logits_m)

    Each feature matrix is read once for all the heads it meets; the KL sums of all pairs are added over `group` in one call.

    Args:
        features: M matrices (B, D) of one dtype and device, M at least 2.
        heads: M times (weight (C, D), bias (C,) or None), one a modality.
        mix_heads: likewise P, one a pair; the same head may serve several.
        target: (B,) int64 class indices.
        weight: the probing weights λ of the first modality of each pair: a float or a 0-d tensor for all, or (P,).
        pairs: P pairs of modalities by their place in `features`; None is all of them, (0, 1), (0, 2), ... (M-2, M-1).
        label_smoothing, ignore_index, group: as in `linear_probe_rebalance`.

    Returns:
        PairsResult: logits in the dtype of the features, the rest float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: as `linear_probe_rebalance`; a number of heads that fits neither features nor pairs, a pair that
            names no two modalities.

    Source: Yang, Wu, Jiang, IJCAI 2025 (Tri-CLS); the closed form is this project's.
    """
    _checks.sequence("features", features, "2 or more matrices (B, D)")
    if len(features) < 2:
        raise ValueError(f"features: expected 2 or more matrices (B, D), got {len(features)}")
    if pairs is None:
        pairs = tuple(itertools.combinations(range(len(features)), 2))
    flat = _checks.pairs(pairs, len(features))
    for name, own, wanted in (("mix_heads", mix_heads, len(pairs)), ("heads", heads, len(features))):
        _checks.sequence(name, own, f"{wanted} heads (weight (C, D), bias (C,) or None)")
        if len(own) != wanted:
            raise ValueError(f"{name}: expected {wanted} heads (weight (C, D), bias (C,) or None), got {len(own)}")
    loss, losses, logits, strength, kl = _step(
        {f"features[{k}]": x for k, x in enumerate(features)},
        {f"{name}[{k}]": head for name, own in (("heads", heads), ("mix_heads", mix_heads)) for k, head in enumerate(own)},
        *(flat, target, weight, torch.Size((len(pairs),)), label_smoothing, ignore_index, group),
    )
    count = len(pairs)
    return PairsResult(
        loss, losses[count:], losses[:count], logits[count:], logits[:count], strength.view(-1, 2), kl.view(-1, 2)
    )


def _step(
    features: dict[str, Tensor],
    heads: dict[str, LinearHead],
    pairs: list[int],
    target: Tensor,
    weight: float | Tensor,
    weight_shape: torch.Size,
    label_smoothing: float,
    ignore_index: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, ...]:
    """Arguments by name checked, of heads those of the modalities first, and cast under autocast; then the operator.

    -> loss, losses, logits, strength, kl
    """
    (first, x), *others = features.items()
    matrices = list(features.values())
    casting = isinstance(x, Tensor) and autocast.enabled(x)
    _checks.matrix(first, x)
    for name, matrix in others:
        _checks.matrix(name, matrix)
        _checks.alike(name, matrix, first, x, autocast=casting and torch.float64 not in (x.dtype, matrix.dtype))
    casting = casting and x.dtype != torch.float64
    _checks.linear_heads(heads, x, casting)
    _checks.target(target, x)
    weight = _checks.mixing_weight(weight, x, weight_shape)
    _checks.cross_entropy_options(label_smoothing, ignore_index)
    _checks.process_group(group)
    own, mixing = list(heads.values())[: len(matrices)], list(heads.values())[len(matrices) :]
    weights, biases = [head[0] for head in mixing + own], [head[1] for head in mixing + own]
    if casting:
        dtype = torch.get_autocast_dtype(x.device.type)
        matrices, weights = [matrix.to(dtype) for matrix in matrices], [matrix.to(dtype) for matrix in weights]
        biases = [bias if bias is None else bias.to(dtype) for bias in biases]
    return _linear_probe_rebalance(
        *(matrices, weights, biases, pairs, target, weight),
        *(float(label_smoothing), int(ignore_index), group_name(group)),
    )[:5]


# linear_probe_rebalance: of all heads, mixtures first, losses and logits; strength and kl of the pairs; and the state that the
# backward pass wants, see `reference.head.State`


def _count(pairs: list[int]) -> int:
    return len(pairs) // 2


def _state_size(features: list[Tensor], weights: list[Tensor], pairs: list[int]) -> int:
    x = features[0]
    narrow = x.dtype != arithmetic_dtype(x.dtype)
    return State.size(x.shape[0], weights[0].shape[0], len(features), _count(pairs), narrow)


def _kernel(
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[int],
    target: Tensor,
    probing: Tensor,
    label_smoothing: float,
    ignore_index: int,
    group: str,
) -> tuple[Tensor, ...]:
    x, classes = features[0], weights[0].shape[0]
    dtype, device = arithmetic_dtype(x.dtype), x.device
    state = torch.empty((_state_size(features, weights, pairs),), dtype=dtype, device=device)
    loss = torch.empty((), dtype=dtype, device=device)
    losses = torch.empty((len(weights),), dtype=dtype, device=device)
    strength = torch.empty((len(pairs),), dtype=dtype, device=device)
    kl = torch.empty_like(strength)
    logits = torch.empty((len(weights), x.shape[0], classes), dtype=x.dtype, device=device)
    probing = probing.to(dtype)
    if len(pairs) > 2:
        probing = probing.expand(_count(pairs)).contiguous()

    inputs = (features, weights, biases, pairs, target, probing, label_smoothing, ignore_index)
    outputs = (state, logits, kl, strength, loss, losses)
    forward = kernels(device).head_forward
    try:
        if group:
            forward(*inputs, PROBE, *outputs)
            all_reduce_named(kl, group)
            forward(*inputs, REBALANCE, *outputs)
        else:
            forward(*inputs, PROBE | REBALANCE, *outputs)
    except RuntimeError:
        _checks.labels(target, classes, ignore_index)  # a kernel on the CPU refuses them as it can; this says it as it should
        raise
    return loss, losses, logits, strength, kl, state


def _fake(
    features: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], pairs: list[int], *_: Any
) -> tuple[Tensor, ...]:
    x, dtype = features[0], arithmetic_dtype(features[0].dtype)
    shapes: list[tuple[Any, ...]] = [(), (len(weights),), (len(weights), x.shape[0], weights[0].shape[0])]
    shapes += [(len(pairs),), (len(pairs),), (_state_size(features, weights, pairs),)]
    types = [dtype, dtype, x.dtype, dtype, dtype, dtype]
    return tuple(x.new_empty(shape, dtype=of) for shape, of in zip(shapes, types, strict=True))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    features, weights, biases, ctx.pairs, target, _, ctx.label_smoothing, ctx.ignore_index, _ = inputs
    _, _, logits, strength, _, state = output
    ctx.save_for_backward(*features, *weights, *biases[: _count(ctx.pairs)], target, state, logits, strength)


def _autograd(ctx: Any, saved: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    *tensors, target, state, logits, strength = saved
    pairs, heads = _count(ctx.pairs), logits.shape[0]
    modalities = heads - pairs
    needed = ctx.needs_input_grad[: modalities + 2 * heads]
    rest = (None,) * (len(ctx.pairs) + 5)
    if all(grad is None for grad in upstream[:3]) or not any(needed):
        return (None,) * len(needed) + rest
    of = (tensors[:modalities], tensors[modalities : modalities + heads], tensors[modalities + heads :], ctx.pairs)
    found = _linear_probe_rebalance_backward(
        *upstream[:3], *of, target, state, logits, strength, ctx.label_smoothing, ctx.ignore_index, list(needed)
    )
    return tuple(grad if need else None for grad, need in zip(found, needed, strict=True)) + rest


def _backward_kernel(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logits: Tensor | None,
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[int],
    target: Tensor,
    state: Tensor,
    logits: Tensor,
    strength: Tensor,
    label_smoothing: float,
    ignore_index: int,
    needed: list[bool],
) -> list[Tensor]:
    # a gradient nobody asked for is neither computed nor written; an operator must still return a tensor for it
    x, shapes = features[0], _gradient_shapes(features, weights)
    found = [
        torch.empty(shape if need else (0,), dtype=x.dtype, device=x.device) for shape, need in zip(shapes, needed, strict=True)
    ]
    wanted = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    modalities, heads = len(features), len(weights)
    kernels(x.device).head_backward(
        *(grad_loss, grad_losses, grad_logits, features, weights, biases, pairs, target, state, logits, strength),
        *(label_smoothing, ignore_index),
        *(wanted[:modalities], wanted[modalities : modalities + heads], wanted[modalities + heads :]),
    )
    return found


def _gradient_shapes(features: list[Tensor], weights: list[Tensor]) -> list[Any]:
    """Of the tensors a step is differentiated by, in the order of the operator's arguments."""
    return [*(x.shape for x in features), *(w.shape for w in weights), *(w.shape[:1] for w in weights)]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    features, weights, needed = arguments[3], arguments[4], arguments[-1]
    shapes = _gradient_shapes(features, weights)
    return [features[0].new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)]


_linear_probe_rebalance = register(
    "linear_probe_rebalance(Tensor[] features, Tensor[] weights, Tensor?[] biases, int[] pairs, Tensor target, Tensor probing, "
    "float label_smoothing, int ignore_index, str group) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_autograd,
)
_linear_probe_rebalance_backward = register(
    "linear_probe_rebalance_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_logits, Tensor[] features, "
    "Tensor[] weights, Tensor?[] biases, int[] pairs, Tensor target, Tensor state, Tensor logits, Tensor strength, "
    "float label_smoothing, int ignore_index, bool[] needed) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
