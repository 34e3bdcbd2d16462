"""The linear head step: launchers, forward and backward.

For heads of up to FEW_CLASSES classes and two or three modalities, the kernels of `head_matmul` compute the products, and a
step is three or four launches forward and two or three backward. For more classes, float64, or sizes that would spill
registers, torch computes the products (`head_torch_mm`), and the row kernels run in between.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..arguments import labels
from ..convention import (
    EPS,
    PROBE,
    REBALANCE,
    HeadBackwardInputs,
    HeadGradients,
    HeadInputs,
    HeadOutputs,
    HeadState,
    pairs_of,
)
from .divergence import kl_sums_kernel
from .head_backward_rows import head_coefficients_kernel
from .head_forward_rows import head_losses_kernel, head_probe_kernel, head_rebalance_kernel
from .head_matmul import head_gradients_kernel, head_project_kernel, head_reduce_kernel
from .head_tiling import ProductTile, RowChunks, differentiates_itself, logit_tile, projects_itself
from .head_torch_mm import library_gradients, project
from .tiling import TILE, dense, on_device_of, part_programs, scratch, strides

#: The most classes per row that a program can hold, by the size in bytes of the arithmetic type.
MOST_CLASSES = {4: 4096, 8: 1024}
LIMITS = "up to 4096 classes, in float64 1024"
REDUCE_BLOCK = 1024


def refuses(step: HeadInputs | HeadBackwardInputs, *_: Any) -> str:
    """Why these kernels do not support a step; empty if they do."""
    classes, dtype = len(step.weights[0]), step.features[0].dtype
    most = MOST_CLASSES[8 if dtype == torch.float64 else 4]
    return "" if classes <= most else f"its kernels take at most {most} classes of {dtype}, got {classes}"


def head_forward(inputs: HeadInputs, parts: int, outputs: HeadOutputs) -> None:
    features, logits, kl = inputs.features, outputs.logits, outputs.kl
    labels(inputs.target, logits[0].shape[1], inputs.ignore_index)
    shape: dict[str, Any] = {"MODALITIES": len(features), "PAIRS": tuple(pairs_of(inputs.pairs))}
    mixtures = len(shape["PAIRS"])
    state = HeadState.views(outputs.state, logits[mixtures:], mixtures)
    kl_parts, kl_out = kl[None], None  # the all-reduced sums, if only REBALANCE runs
    with on_device_of(features[0]):
        if parts & PROBE:
            for gap in HeadState.gaps(outputs.state, logits[mixtures:], mixtures):
                gap.zero_()  # for a batch that is no multiple of 4; in either row kernel, these stores spilled registers
            kl_parts, kl_out = _probe(inputs, shape, state, logits[mixtures:]), kl
        if parts & REBALANCE:
            _rebalance(inputs, shape, state, kl_parts, kl_out, outputs)
        else:
            kl_sums_kernel[(1,)](kl_parts, kl, len(kl_parts), COLUMNS=2 * mixtures, num_warps=4)


def _probe(inputs: HeadInputs, shape: dict[str, Any], state: HeadState, logits: Sequence[Tensor]) -> Tensor:
    """Fills the state except its field `counted`, and the unimodal logits.  -> (programs, 2P) parts of the KL sums"""
    features, weights, biases, _, _, probe_weight, *_ = inputs
    (batch, classes), width, itemsize = logits[0].shape, features[0].shape[1], state.stats.element_size()
    heads, offsets = tuple(map(dense, weights)), tuple(map(dense, biases))
    pairs, widened = shape["PAIRS"], logits[0].dtype != state.stats.dtype
    rows, block_c, num_warps = logit_tile(state.stats, len(features), classes)
    block_d = max(16, TILE[itemsize] // rows // (1 if len(features) == 2 else 4))
    programs = part_programs(batch, rows)
    sizes = (batch, width, classes)
    projected = projects_itself(features, classes)
    if projected:
        if batch:
            tile = ProductTile.of_projection(features, classes)
            head_project_kernel[(triton.cdiv(batch, tile.rows),)](
                tuple(features), heads, offsets, state.stats, state.projected, state.unimodal if widened else (), tuple(logits),
                *strides(features), *sizes, **shape, EPS=EPS, **tile.constants(features[0]),
            )  # fmt: skip
    else:
        project(features, heads, pairs, state)
    kl_parts = scratch(state.stats, programs, 2 * len(pairs))
    head_probe_kernel[(programs,)](
        tuple(features), offsets, probe_weight, state.stats, state.projected, state.unimodal, tuple(logits) if widened else (),
        kl_parts,
        *strides(features), *sizes, **shape, EPS=EPS, PROJECTED=projected,
        BLOCK_B=rows, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    return kl_parts


def _rebalance(
    inputs: HeadInputs, shape: dict[str, Any], state: HeadState, kl_parts: Tensor, kl: Tensor | None, outputs: HeadOutputs
) -> None:
    """Fills all outputs except the unimodal logits, and `kl` (if not None) from its parts."""
    _, _, biases, _, target, _, label_smoothing, ignore_index = inputs
    _, logits, _, strength, loss, losses = outputs
    mixtures, (batch, classes) = len(shape["PAIRS"]), logits[0].shape
    rows, block_c, num_warps = logit_tile(state.stats, shape["MODALITIES"], classes)
    programs = part_programs(batch, rows)
    loss_parts = scratch(state.stats, programs, len(losses) + 1) if programs > 1 else None
    head_rebalance_kernel[(programs,)](
        state.projected, state.unimodal, state.stats, tuple(map(dense, biases[:mixtures])), target, kl_parts,
        kl, strength, tuple(logits[:mixtures]), loss_parts, loss, losses, state.counted,
        *target.stride(), batch, classes, len(kl_parts), ignore_index, **shape, SMOOTHING=label_smoothing, EPS=EPS,
        BLOCK_B=rows, BLOCK_C=block_c, num_warps=max(num_warps, 8) if rows == 1 and shape["MODALITIES"] > 2 else num_warps,
    )  # fmt: skip
    if loss_parts is not None:
        head_losses_kernel[(1,)](loss_parts, loss, losses, state.counted, programs, **shape, num_warps=4)


def head_backward(inputs: HeadBackwardInputs, gradients: HeadGradients) -> None:
    grad_loss, grad_losses, grad_logits, features, weights, biases, pairs, target = inputs[:8]
    packed, unimodal, strength, label_smoothing, ignore_index = inputs[8:]
    grad_features, grad_weights, grad_biases = gradients
    shape: dict[str, Any] = {"MODALITIES": len(features), "PAIRS": tuple(pairs_of(pairs))}
    mixtures = len(shape["PAIRS"])
    state = HeadState.views(packed, unimodal, mixtures)
    heads, (batch, classes), width = len(weights), unimodal[0].shape, features[0].shape[1]
    itself = differentiates_itself(features, classes)
    # bfloat16 logit gradients lose nothing, as the products round them anyway; float16 would lose values below 6e-8
    like = features[0] if features[0].dtype == torch.bfloat16 or not itself else state.stats
    chunks = RowChunks.of(features, heads, classes, like.dtype)
    of_logits = scratch(like, heads, min(batch, chunks.rows), classes)
    factors = scratch(state.stats, mixtures, 8, min(batch, chunks.rows))
    upstream = (dense(grad_loss), dense(grad_losses))
    grad_logits, mix_biases = tuple(map(dense, grad_logits)), tuple(map(dense, biases[:mixtures]))
    block_b, block_c, num_warps = logit_tile(state.stats, len(features), classes)

    def coefficients(rows: slice) -> None:
        count = rows.stop - rows.start
        if count:
            head_coefficients_kernel[(triton.cdiv(count, block_b),)](
                *upstream, _sliced(grad_logits, rows), state.projected[0, 0, rows.start :], _sliced(state.unimodal, rows),
                state.stats[0, 0, rows.start :], mix_biases, target[rows], strength, state.counted, of_logits, factors,
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
    """The (smaller) tensor that a chunk of fewer rows stored at the start of `memory`."""
    return memory.view(-1)[: math.prod(shape)].view(shape)


def _sliced(tensors: Sequence[Tensor | None], places: slice) -> tuple[Any, ...]:
    return tuple(t if t is None else t[places] for t in tensors)
