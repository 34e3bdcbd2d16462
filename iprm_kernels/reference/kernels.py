"""The reference in the calling convention of the kernels: see `iprm_kernels.backends`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._checks import labels
from .._library import AUTOCAST, below
from ..backends import PROBE, REBALANCE
from . import average, divergence, geodesic, head


def into(function: Callable[..., tuple[Any, ...]]) -> Callable[..., None]:
    """A function that returns its results, as one that fills the outputs it is given after its inputs."""
    inputs = function.__code__.co_argcount

    def kernel(*arguments: Any) -> None:
        with below(AUTOCAST):
            fill(arguments[inputs:], function(*arguments[:inputs]))

    return kernel


def fill(outputs: Sequence[Tensor | None], values: Sequence[Any]) -> None:
    for out, value in zip(outputs, values, strict=True):
        if out is not None:
            out.copy_(value)


normalize = into(geodesic.normalize)
normalize_backward = into(geodesic.normalize_backward)
geodesic_mixup = into(geodesic.geodesic_mixup)
geodesic_mixup_backward = into(geodesic.geodesic_mixup_backward)
geodesic_remix = into(geodesic.geodesic_remix)
batch_kl = into(divergence.batch_kl)
batch_kl_backward = into(divergence.batch_kl_backward)
batch_kl_pair = into(divergence.batch_kl_pair)
strength_weights = into(divergence.strength_weights)
strength_weights_backward = into(divergence.strength_weights_backward)


def average_strength(strength: Tensor, alpha: float, released: bool, *state: Tensor) -> None:
    weight, eval_weight, last, steps = (tensor.view(strength.numel() // 2, -1).squeeze(1) for tensor in state)
    found = average.average_strength(strength.view(-1, 2), alpha, released, weight, eval_weight, last, steps)
    fill((weight, eval_weight, last, steps), found)


def head_pairs_forward(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    pairs: Sequence[int],
    target: Tensor,
    probing: Tensor,
    label_smoothing: float,
    ignore_index: int,
    parts: int,
    state: Tensor,
    logits: Sequence[Tensor],
    kl: Tensor,
    strength: Tensor,
    loss: Tensor,
    losses: Tensor,
) -> None:
    labels(target, logits[0].shape[1], ignore_index)
    count = len(pairs) // 2
    of = head.State.views(state, logits[count:], count)
    with below(AUTOCAST):
        if parts & PROBE:
            stats, projected, unimodal, sums = head.head_probe(features, weights, biases, pairs, probing.view(-1))
            fill((of.stats, of.projected, *of.unimodal, kl), (stats, projected, *unimodal, sums))
            fill(logits[count:], of.unimodal)
        if parts & REBALANCE:
            results = head.head_rebalance(of, biases, kl, target, label_smoothing, ignore_index)
            strength_found, mixed, *rest = results
            fill((strength, *logits[:count], loss, losses, of.counted), (strength_found, *mixed, *rest))


def head_pairs_backward(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logits: Sequence[Tensor | None],
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    pairs: Sequence[int],
    target: Tensor,
    state: Tensor,
    unimodal: Sequence[Tensor],
    strength: Tensor,
    label_smoothing: float,
    ignore_index: int,
    grad_features: Sequence[Tensor | None],
    grad_weights: Sequence[Tensor | None],
    grad_biases: Sequence[Tensor | None],
) -> None:
    of = head.State.views(state, unimodal, len(pairs) // 2)
    grads = (grad_loss, grad_losses, grad_logits)
    with below(AUTOCAST):
        found = head.head_backward(
            *grads, features, weights, biases, pairs, target, of, strength, label_smoothing, ignore_index
        )
        for outputs, values in zip((grad_features, grad_weights, grad_biases), found, strict=True):
            fill(outputs, values)
