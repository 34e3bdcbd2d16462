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
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[int],
    target: Tensor,
    probing: Tensor,
    label_smoothing: float,
    ignore_index: int,
    parts: int,
    state: Tensor,
    logits: Tensor,
    kl: Tensor,
    strength: Tensor,
    loss: Tensor,
    losses: Tensor,
) -> None:
    labels(target, logits.shape[2], ignore_index)
    count = len(pairs) // 2
    of = head.State.views(state, logits, count)
    with below(AUTOCAST):
        if parts & PROBE:
            found = head.head_probe(features, weights, biases, pairs, probing.view(-1))
            fill((*of[:3], kl), found)
            logits[count:].copy_(of.unimodal)
        if parts & REBALANCE:
            results = head.head_rebalance(of, biases, kl, target, label_smoothing, ignore_index)
            fill((strength, logits[:count], loss, losses, of.counted), results)


def head_backward(
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
    grad_features: list[Tensor | None],
    grad_weights: list[Tensor | None],
    grad_biases: list[Tensor | None],
) -> None:
    of = head.State.views(state, logits, len(pairs) // 2)
    grads = (grad_loss, grad_losses, grad_logits)
    with below(AUTOCAST):
        found = head.head_backward(
            *grads, features, weights, biases, pairs, target, of, strength, label_smoothing, ignore_index
        )
        for outputs, values in zip((grad_features, grad_weights, grad_biases), found, strict=True):
            fill(tuple(outputs), tuple(values))
