"""The linear head step for several modalities, probed and rebalanced in pairs; head.py has the usual case of two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import _checks
from ._head_step import LinearHead, cast, check_step, new_gradients, new_outputs, run_forward, wanted
from ._library import register
from .backends import kernels
from .collectives import group_name


class PairsResult(NamedTuple):
    """What `linear_probe_rebalance_pairs` returns, for M modalities and P pairs of them."""

    loss: Tensor  #: () mean of `mix_losses` and sum of `losses`
    losses: Tensor  #: (M,) mean cross entropies of the modalities
    mix_losses: Tensor  #: (P,) of the mixtures
    logits: Tensor  #: (M, B, C) of the modalities
    mix_logits: Tensor  #: (P, B, C) of the mixtures
    strength: Tensor  #: (P, 2) ω of both modalities of a pair, without gradient
    kl: Tensor  #: (P, 2) batch KL of both from the probed mixture, without gradient


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
    for name, own, size in (("mix_heads", mix_heads, len(pairs)), ("heads", heads, len(features))):
        _checks.sequence(name, own, f"{size} heads (weight (C, D), bias (C,) or None)")
        if len(own) != size:
            raise ValueError(f"{name}: expected {size} heads (weight (C, D), bias (C,) or None), got {len(own)}")
    count = len(pairs)
    dtype = check_step(
        {f"features[{k}]": x for k, x in enumerate(features)},
        {f"{name}[{k}]": head for name, own in (("heads", heads), ("mix_heads", mix_heads)) for k, head in enumerate(own)},
        *(target, label_smoothing, ignore_index, group),
    )
    weight = _checks.mixing_weight(weight, features[0], torch.Size((count,)))
    weights, biases = zip(*mix_heads, *heads, strict=True)
    loss, losses, logits, strength, kl, _ = _linear_probe_rebalance_pairs(
        *(list(cast(tensors, dtype)) for tensors in (features, weights, biases)),
        *(flat, target, weight, float(label_smoothing), int(ignore_index), group_name(group)),
    )
    return PairsResult(
        loss, losses[count:], losses[:count], logits[count:], logits[:count], strength.view(-1, 2), kl.view(-1, 2)
    )


# linear_probe_rebalance_pairs: of all heads, mixtures first, losses and logits; strength and kl of the pairs; and the state
# that the backward pass wants, see `reference.head.State`


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
    x, classes, count = features[0], len(weights[0]), len(pairs) // 2
    state, kl, strength, loss, losses = new_outputs(x, classes, len(features), count)
    logits = x.new_empty((len(weights), len(x), classes))
    probing = probing.to(kl.dtype).expand(count).contiguous()
    inputs = (features, weights, biases, pairs, target, probing, label_smoothing, ignore_index)
    outputs = (state, list(logits), kl, strength, loss, losses)
    run_forward(kernels(x.device).head_pairs_forward, inputs, outputs, kl, classes, group)
    return loss, losses, logits, strength, kl, state


def _fake(
    features: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], pairs: list[int], *_: Any
) -> tuple[Tensor, ...]:
    x, classes = features[0], weights[0].shape[0]
    state, kl, strength, loss, losses = new_outputs(x, classes, len(features), len(pairs) // 2)
    return loss, losses, x.new_empty((len(weights), x.shape[0], classes)), strength, kl, state


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    features, weights, biases, ctx.pairs, target, _, ctx.label_smoothing, ctx.ignore_index, _ = inputs
    _, _, logits, strength, _, state = output
    ctx.save_for_backward(*features, *weights, *biases[: len(ctx.pairs) // 2], target, state, logits, strength)


def _autograd(ctx: Any, saved: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    *tensors, target, state, logits, strength = saved
    pairs, heads = len(ctx.pairs) // 2, logits.shape[0]
    modalities = heads - pairs
    needed = ctx.needs_input_grad[: modalities + 2 * heads]
    rest = (None,) * (len(ctx.pairs) + 5)
    if all(grad is None for grad in upstream[:3]) or not any(needed):
        return (None,) * len(needed) + rest
    of = (tensors[:modalities], tensors[modalities : modalities + heads], tensors[modalities + heads :], ctx.pairs)
    found = _linear_probe_rebalance_pairs_backward(
        *upstream[:3], *of, target, state, logits, strength, ctx.label_smoothing, ctx.ignore_index, list(needed)
    )
    return (*wanted(found, needed), *rest)


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
    modalities, heads, count = len(features), len(weights), len(pairs) // 2
    found = new_gradients([*features, *weights], len(weights[0]), needed)
    outputs = wanted(found, needed)
    upstream = [None] * heads if grad_logits is None else list(grad_logits)
    kernels(features[0].device).head_pairs_backward(
        *(grad_loss, grad_losses, upstream, features, weights, biases, pairs),
        *(target, state, list(logits[count:]), strength, label_smoothing, ignore_index),
        *(outputs[:modalities], outputs[modalities : modalities + heads], outputs[modalities + heads :]),
    )
    return found


def _backward_fake(*arguments: Any) -> list[Tensor]:
    features, weights, needed = arguments[3], arguments[4], arguments[-1]
    return new_gradients([*features, *weights], weights[0].shape[0], needed)


_linear_probe_rebalance_pairs = register(
    "linear_probe_rebalance_pairs(Tensor[] features, Tensor[] weights, Tensor?[] biases, int[] pairs, Tensor target, "
    "Tensor probing, float label_smoothing, int ignore_index, str group) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_autograd,
)
_linear_probe_rebalance_pairs_backward = register(
    "linear_probe_rebalance_pairs_backward(Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_logits, Tensor[] features, "
    "Tensor[] weights, Tensor?[] biases, int[] pairs, Tensor target, Tensor state, Tensor logits, Tensor strength, "
    "float label_smoothing, int ignore_index, bool[] needed) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)
