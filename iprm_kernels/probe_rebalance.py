"""Probe, measure, rebalance with any head: `probe_rebalance`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import arguments, autocast
from .collectives import all_reduce_sum
from .divergence import batch_kl_pair, strength_weights
from .geodesic import mixed_twice


class ProbeResult(NamedTuple):
    """What `probe_rebalance` returns."""

    logits: Tensor  #: (B, C) logits of the mixture with the measured weights
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
    r"""One probe-and-rebalance step with any head::

        P̄  = head(geodesic_mixup(x, y, weight))               # the probe, without gradient
        KL  = batch_kl(logits_x, P̄), batch_kl(logits_y, P̄)
        ω   = strength_weights(KL)
        out = head(geodesic_mixup(x, y, ω_x))                 # with gradient to x, y and the head

    Args:
        x: (B, D) features of the first modality.
        y: (B, D) features of the second, same dtype and device.
        logits_x: (B, C) unimodal logits of x; used only to measure KL, so they receive no gradient here.
        logits_y: (B, C) unimodal logits of y, likewise.
        head: (B, D) -> (B, C), called twice in its current mode, the first time under ``torch.no_grad``. In training mode,
            batch normalisation updates its running statistics twice, and dropout draws two masks.
        weight: the probing weight λ of x: a float or a 0-d tensor on the device.
        group: processes whose KL sums are all-reduced before ω is computed; None uses only the local batch.

    Returns:
        ProbeResult: logits (B, C), strength (2,), kl (2,).

    Raises:
        TypeError, ValueError: as `geodesic_mixup` and `batch_kl`; also if the head's output and the unimodal logits differ in
            shape.

    Source: Yang, Wu, Jiang, "Instantaneous Probe-and-Rebalance Multimodal Learning", IJCAI 2025.
    """
    _check_probe(x, y, logits_x, logits_y, head)
    weight = arguments.mixing_weight(weight, x, torch.Size(()))
    arguments.process_group(group)
    if autocast.enabled(x):
        x, y = autocast.widest(x, y)  # outside no_grad, so that gradients flow through the casts
    with torch.no_grad(), autocast.uncached(x):
        mixture, remix = mixed_twice(x, y, weight)
        probe = head(mixture)
        _check_output(probe, logits_x)
        if autocast.enabled(probe):
            logits_x, logits_y, probe = autocast.widest(logits_x, logits_y, probe)
        kl = all_reduce_sum(batch_kl_pair(logits_x, logits_y, probe), group)
        strength = strength_weights(kl)
    logits = head(remix(strength[0]))
    _check_output(logits, logits_x)
    return ProbeResult(logits, strength, kl)


def _check_probe(x: Tensor, y: Tensor, logits_x: Tensor, logits_y: Tensor, head: Any) -> None:
    casting = isinstance(x, Tensor) and autocast.enabled(x)
    arguments.matrix("x", x)
    arguments.matrix("y", y)
    arguments.alike("y", y, "x", x, autocast=casting)
    arguments.matrix("logits_x", logits_x, "(B, C)")
    if logits_x.shape[0] != x.shape[0]:
        raise ValueError(f"logits_x: expected {x.shape[0]} rows, as x has, got shape {tuple(logits_x.shape)}")
    arguments.matrix("logits_y", logits_y, "(B, C)")
    arguments.alike("logits_y", logits_y, "logits_x", logits_x, autocast=casting)
    if not callable(head):
        raise TypeError(f"head: expected a callable (B, D) -> (B, C), got {type(head).__name__}")


def _check_output(probe: Any, logits_x: Tensor) -> None:
    if not isinstance(probe, Tensor):
        raise TypeError(f"head: expected an output tensor (B, C), got {type(probe).__name__}")
    arguments.dense("head", probe)
    if probe.shape != logits_x.shape:
        raise ValueError(
            f"head: expected an output of the shape of logits_x, {tuple(logits_x.shape)}, got {tuple(probe.shape)}"
        )
    arguments.same_place("head", probe, "logits_x", logits_x, autocast=autocast.enabled(probe))
