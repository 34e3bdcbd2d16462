"""Probe, measure, rebalance with linear heads, in one operator: `linear_probe_rebalance` for two modalities,
`linear_probe_rebalance_pairs` for more. probe_rebalance.py has the step for any other head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import arguments
from .collectives import group_name
from .head_step import LinearHead, cast, check_step, head_step


class StepResult(NamedTuple):
    """What `linear_probe_rebalance` returns."""

    loss: Tensor  #: () the sum of `losses`
    losses: Tensor  #: (3,) mean cross entropies of the mixture, x and y
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

    Mixing commutes with a linear head. Each feature matrix is therefore multiplied once, by its own head and the mixture head
    stacked, and probe and rebalance are arithmetic on (B, C) matrices. Gradients follow a closed form; they flow from all
    outputs except strength and kl to the features and all heads.

    Args:
        x: (B, D) features of the first modality.
        y: (B, D) features of the second, same dtype and device. Under autocast, features and heads are cast to the autocast
            dtype.
        head_x: (weight (C, D), bias (C,) or None), the head of x.
        head_y: likewise, the head of y.
        head_mix: likewise, the head of the mixture.
        target: (B,) int64 class indices.
        weight: the probing weight λ of x: a float or a 0-d tensor on the device; receives no gradient.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        ignore_index: rows with this target count in the KL, which needs no labels, but not in the losses.
        group: processes whose KL sums and row counts are all-reduced, in one call, before ω is computed; None uses only the
            local batch. ω is that of the joint batch. `loss` and `losses` are this process's share: the mean over the processes
            of losses and of gradients equals that of the joint batch, even if the processes have different numbers of rows.

    Returns:
        StepResult: logits in the dtype of the features, the rest float32 (float64 for float64 features).

    Raises:
        TypeError: an argument is not a floating tensor, `target` is not int64, or the dtypes differ.
        ValueError: shapes or devices differ, or on the CPU a label is outside [0, C). On a GPU, where the check would
            synchronise, such a row makes the losses that include it and its own gradients NaN.

    Source: Yang, Wu, Jiang, IJCAI 2025; the closed form is this project's.
    """
    heads = {"head_x": head_x, "head_y": head_y, "head_mix": head_mix}
    dtype = check_step({"x": x, "y": y}, heads, target, label_smoothing, ignore_index, group)
    weight = arguments.mixing_weight(weight, x, torch.Size(()))
    (weight_mix, bias_mix), (weight_x, bias_x), (weight_y, bias_y) = head_mix, head_x, head_y
    loss, losses, logits_mix, logits_x, logits_y, strength, kl, _ = head_step(
        cast([x, y], dtype),
        cast([weight_mix, weight_x, weight_y], dtype),
        cast([bias_mix, bias_x, bias_y], dtype),
        [0, 1],
        target,
        weight,
        float(label_smoothing),
        int(ignore_index),
        group_name(group),
    )
    return StepResult(loss, losses, logits_mix, logits_x, logits_y, strength, kl)


class PairsResult(NamedTuple):
    """What `linear_probe_rebalance_pairs` returns, for M modalities and P pairs of them."""

    loss: Tensor  #: () mean of `mix_losses` and sum of `losses`
    losses: Tensor  #: (M,) mean cross entropies of the modalities
    mix_losses: Tensor  #: (P,) mean cross entropies of the mixtures
    logits: tuple[Tensor, ...]  #: M of (B, C), one per modality
    mix_logits: tuple[Tensor, ...]  #: P of (B, C), one per mixture
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

    Each feature matrix is read once for all heads that are applied to it; the KL sums of all pairs are all-reduced in one call.

    Args:
        features: M matrices (B, D) of one dtype and device, M at least 2.
        heads: M times (weight (C, D), bias (C,) or None), one per modality.
        mix_heads: P times likewise, one per pair; several pairs may share a head.
        target: (B,) int64 class indices.
        weight: the probing weights λ of the first modality of each pair: (P,), or a float or 0-d tensor for all pairs.
        pairs: P pairs of indices into `features`; None means all pairs, (0, 1), (0, 2), ... (M-2, M-1).
        label_smoothing, ignore_index, group: as in `linear_probe_rebalance`.

    Returns:
        PairsResult: logits in the dtype of the features, the rest float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: as `linear_probe_rebalance`; also if the number of heads does not match the features or pairs, or
            a pair is not two different modalities.

    Source: Yang, Wu, Jiang, IJCAI 2025 (Tri-CLS); the closed form is this project's.
    """
    arguments.sequence("features", features, "2 or more matrices (B, D)")
    if len(features) < 2:
        raise ValueError(f"features: expected 2 or more matrices (B, D), got {len(features)}")
    if pairs is None:
        pairs = tuple(itertools.combinations(range(len(features)), 2))
    flat = arguments.pairs(pairs, len(features))
    for name, own, size in (("mix_heads", mix_heads, len(pairs)), ("heads", heads, len(features))):
        arguments.sequence(name, own, f"{size} heads (weight (C, D), bias (C,) or None)")
        if len(own) != size:
            raise ValueError(f"{name}: expected {size} heads (weight (C, D), bias (C,) or None), got {len(own)}")
    count = len(pairs)
    dtype = check_step(
        {f"features[{k}]": x for k, x in enumerate(features)},
        {f"{name}[{k}]": head for name, own in (("heads", heads), ("mix_heads", mix_heads)) for k, head in enumerate(own)},
        *(target, label_smoothing, ignore_index, group),
    )
    weight = arguments.mixing_weight(weight, features[0], torch.Size((count,)))
    weights, biases = zip(*mix_heads, *heads, strict=True)
    loss, losses, *logits, strength, kl, _ = head_step(
        cast(list(features), dtype),
        cast(list(weights), dtype),
        cast(list(biases), dtype),
        flat,
        target,
        weight,
        float(label_smoothing),
        int(ignore_index),
        group_name(group),
    )
    unimodal, mixed = tuple(logits[count:]), tuple(logits[:count])
    return PairsResult(loss, losses[count:], losses[:count], unimodal, mixed, strength.view(-1, 2), kl.view(-1, 2))
