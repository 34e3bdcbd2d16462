"""The reference in the calling convention of the kernels: see `iprm_kernels.backends`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._checks import labels
from .._library import AUTOCAST, below
from ..backends import PROBE, REBALANCE
from . import divergence, geodesic, head


def into(function: Callable[..., tuple[Any, ...]]) -> Callable[..., None]:
    """A function that returns its results, as one that fills the outputs it is given after its inputs."""
    inputs = function.__code__.co_argcount

    def kernel(*arguments: Any) -> None:
        with below(AUTOCAST):
            fill(arguments[inputs:], function(*arguments[:inputs]))

    return kernel


def fill(outputs: tuple[Tensor | None, ...], values: tuple[Any, ...]) -> None:
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


def head_forward(
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
    parts: int,
    state: Tensor,
    logits_mix: Tensor,
    logits_x: Tensor,
    logits_y: Tensor,
    kl: Tensor,
    strength: Tensor,
    loss: Tensor,
    losses: Tensor,
) -> None:
    labels(target, logits_mix.shape[1], ignore_index)
    of = head.State.views(state, logits_x, logits_y)
    with below(AUTOCAST):
        if parts & PROBE:
            a, v, u_x, u_y, stats, sums = head.head_probe(
                x, y, weight_x, bias_x, weight_y, bias_y, weight_mix, bias_mix, weight
            )
            fill((*of[:5], kl, logits_x, logits_y), (stats, a, v, u_x, u_y, sums, u_x, u_y))
        if parts & REBALANCE:
            results = head.head_rebalance(of, bias_mix, kl, target, label_smoothing, ignore_index)
            fill((strength, logits_mix, loss, losses, of.counted), results)


def head_backward(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_mix: Tensor | None,
    grad_logits_x: Tensor | None,
    grad_logits_y: Tensor | None,
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
    *outputs: Tensor | None,
) -> None:
    of = head.State.views(state, logits_x, logits_y)
    grads = (grad_loss, grad_losses, grad_mix, grad_logits_x, grad_logits_y)
    weights = (weight_x, weight_y, weight_mix)
    with below(AUTOCAST):
        found = head.head_backward(*grads, x, y, *weights, bias_mix, target, of, strength, label_smoothing, ignore_index)
        fill(outputs, found)
