"""The linear head step: launchers, forward and backward.

Heads of up to FEW_CLASSES classes: the kernels of `_head_products` multiply, and a step is three or four launches forward and
two or three backward, for two modalities or for three. More classes, float64, or what would spill: the products are torch's,
and the rows are worked on in between.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .._checks import labels
from ..backends import PROBE, REBALANCE
from ..reference.head import EPS, State, pairs_of
from ._head_coefficients import head_coefficients_kernel
from ._head_library import library_gradients, project
from ._head_products import head_gradients_kernel, head_project_kernel, head_reduce_kernel
from ._head_rows import head_losses_kernel, head_probe_kernel, head_rebalance_kernel
from ._head_tiles import ProductTile, RowChunks, differentiates_itself, logit_tile, projects_itself
from ._tiles import TILE, dense, on_device_of, part_programs, scratch, strides
from .divergence import kl_sums_kernel

#: The most classes of which a program holds a row, by the size of the arithmetic type.
MOST_CLASSES = {4: 4096, 8: 1024}
REDUCE_BLOCK = 1024


def serves(features: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether rows of so many classes are short enough for these kernels."""
    return len(weights[0]) <= MOST_CLASSES[8 if features[0].dtype == torch.float64 else 4]


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
    shape: dict[str, Any] = {"MODALITIES": len(features), "PAIRS": tuple(pairs_of(pairs))}
    mixtures = len(shape["PAIRS"])
    of = State.views(state, logits[mixtures:], mixtures)
    kl_parts, kl_out = kl[None], None  # what processes have added up, if this is their rebalance
    with on_device_of(features[0]):
        if parts & PROBE:
            kl_parts, kl_out = _probe(features, weights, biases, shape, probing, of, logits[mixtures:]), kl
        if parts & REBALANCE:
            inputs = (of, biases[:mixtures], shape, target, label_smoothing, ignore_index, kl_parts)
            _rebalance(*inputs, kl_out, strength, logits[:mixtures], loss, losses)
        else:
            kl_sums_kernel[(1,)](kl_parts, kl, len(kl_parts), COLUMNS=2 * mixtures, num_warps=4)


def _probe(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    shape: dict[str, Any],
    probing: Tensor,
    of: State,
    logits: Sequence[Tensor],
) -> Tensor:
    """Fills the state but its last number, and the unimodal logits.  -> (programs, 2P) parts of the KL sums"""
    (batch, classes), width, itemsize = logits[0].shape, features[0].shape[1], of.stats.element_size()
    heads, offsets = tuple(map(dense, weights)), tuple(map(dense, biases))
    pairs, widened = shape["PAIRS"], logits[0].dtype != of.stats.dtype
    rows, block_c, num_warps = logit_tile(of.stats, len(features), classes)
    block_d = max(16, TILE[itemsize] // rows // (1 if len(features) == 2 else 4))
    programs = part_programs(batch, rows)
    sizes = (batch, width, classes)
    multiplied: tuple[Tensor, ...] = ()
    if projects_itself(features, classes):
        if batch:
            tile = ProductTile.of_projection(features, classes)
            head_project_kernel[(triton.cdiv(batch, tile.rows),)](
                tuple(features), heads, offsets, of.stats, of.projected, of.unimodal if widened else (), tuple(logits),
                *strides(features), *sizes, **shape, EPS=EPS, **tile.constants(features[0]),
            )  # fmt: skip
    else:
        multiplied = tuple(features)
        project(features, heads, pairs, of)
    kl_parts = scratch(of.stats, programs, 2 * len(pairs))
    head_probe_kernel[(programs,)](
        multiplied, offsets, probing, of.stats, of.projected, of.unimodal, tuple(logits) if widened else (), kl_parts,
        *strides(features), *sizes, **shape, EPS=EPS, BLOCK_B=rows, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    return kl_parts


def _rebalance(
    of: State,
    biases: Sequence[Tensor | None],
    shape: dict[str, Any],
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    kl_parts: Tensor,
    kl: Tensor | None,
    strength: Tensor,
    logits: Sequence[Tensor],
    loss: Tensor,
    losses: Tensor,
) -> None:
    batch, classes = logits[0].shape
    rows, block_c, num_warps = logit_tile(of.stats, shape["MODALITIES"], classes)
    programs = part_programs(batch, rows)
    loss_parts = scratch(of.stats, programs, len(losses) + 1) if programs > 1 else None
    head_rebalance_kernel[(programs,)](
        of.projected, of.unimodal, of.stats, tuple(map(dense, biases)), target, kl_parts,
        kl, strength, tuple(logits), loss_parts, loss, losses, of.counted,
        *target.stride(), batch, classes, len(kl_parts), ignore_index, **shape, SMOOTHING=label_smoothing, EPS=EPS,
        BLOCK_B=rows, BLOCK_C=block_c, num_warps=max(num_warps, 8) if rows == 1 and shape["MODALITIES"] > 2 else num_warps,
    )  # fmt: skip
    if loss_parts is not None:
        head_losses_kernel[(1,)](loss_parts, loss, losses, of.counted, programs, **shape, num_warps=4)


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
    shape: dict[str, Any] = {"MODALITIES": len(features), "PAIRS": tuple(pairs_of(pairs))}
    mixtures = len(shape["PAIRS"])
    of = State.views(state, unimodal, mixtures)
    heads, (batch, classes), width = len(weights), unimodal[0].shape, features[0].shape[1]
    itself = differentiates_itself(features, classes)
    # gradients are factors of products in bfloat16 anyway; in float16 those below 6e-8 would vanish
    like = features[0] if features[0].dtype == torch.bfloat16 or not itself else of.stats
    chunks = RowChunks.of(features, heads, classes, like.dtype)
    of_logits = scratch(like, heads, min(batch, chunks.rows), classes)
    factors = scratch(of.stats, mixtures, 8, min(batch, chunks.rows))
    upstream = (dense(grad_loss), dense(grad_losses))
    grad_logits, mix_biases = tuple(map(dense, grad_logits)), tuple(map(dense, biases[:mixtures]))
    block_b, block_c, num_warps = logit_tile(of.stats, len(features), classes)

    def coefficients(rows: slice) -> None:
        count = rows.stop - rows.start
        if count:
            head_coefficients_kernel[(triton.cdiv(count, block_b),)](
                *upstream, _sliced(grad_logits, rows), of.projected[0, 0, rows.start :], _sliced(of.unimodal, rows),
                of.stats[0, 0, rows.start :], mix_biases, target[rows], strength, of.counted, of_logits, factors,
                *target.stride(), count, batch, classes, ignore_index, **shape, SMOOTHING=label_smoothing, EPS=EPS,
                BLOCK_B=block_b, BLOCK_C=block_c, num_warps=num_warps,
            )  # fmt: skip

    with on_device_of(features[0]):
        firsts = range(0, max(1, batch), chunks.rows)
        if not itself:
            for first in firsts:
                rows = slice(first, min(first + chunks.rows, batch))
                coefficients(rows)
                count = rows.stop - first
                made = (_packed(factors, mixtures, 8, count), _packed(of_logits, heads, count, classes))
                library_gradients(
                    *(_sliced(features, rows), weights, shape, *made, _sliced(grad_features, rows), grad_weights, grad_biases),
                    add=first > 0,
                )
            return
        dense_weights = tuple(map(dense, weights))
        tile, count = ProductTile.of_gradients(features, classes), len(firsts) * chunks.parts
        parts = [tuple(grad_weights), tuple(grad_biases)]
        if count > 1:
            parts = [tuple(t if t is None else scratch(factors, count, *t.shape) for t in grads) for grads in parts]
        for k, first in enumerate(firsts):
            rows = slice(first, min(first + chunks.rows, batch))
            coefficients(rows)
            left = [_sliced(own, slice(k * chunks.parts, (k + 1) * chunks.parts)) if count > 1 else own for own in parts]
            head_gradients_kernel[(triton.cdiv(width, tile.columns) * chunks.parts,)](
                _sliced(features, rows), dense_weights, factors, of_logits, _sliced(grad_features, rows), *left,
                *strides(features), rows.stop - first, width, classes, chunks.parts, **shape, **tile.constants(features[0]),
            )  # fmt: skip
        if count > 1 and any(t is not None for t in (*grad_weights, *grad_biases)):
            head_reduce_kernel[(heads * triton.cdiv(classes * width, REDUCE_BLOCK),)](
                *parts,
                tuple(grad_weights),
                tuple(grad_biases),
                classes * width,
                classes,
                count,
                BLOCK=REDUCE_BLOCK,
                num_warps=4,
            )


def _packed(memory: Tensor, *shape: int) -> Tensor:
    """What a chunk of fewer rows left at the beginning of memory for more."""
    return memory.view(-1)[: math.prod(shape)].view(shape)


def _sliced(tensors: Sequence[Tensor | None], places: slice) -> tuple[Any, ...]:
    return tuple(t if t is None else t[places] for t in tensors)
