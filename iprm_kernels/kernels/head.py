"""The linear head step: launchers, forward and backward.

Heads of up to FEW_CLASSES classes: the kernels of `_head_products` multiply, and a step is three or four launches forward and
two or three backward, for two modalities or for three. More classes, float64, or what would spill: the products are torch's,
and the rows are worked on in between.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .._checks import labels
from ..backends import PROBE, REBALANCE
from ..reference.head import EPS, State, pairs_of
from ._head_library import library_gradients, project
from ._head_products import head_gradients_kernel, head_project_kernel, head_reduce_kernel
from ._head_rows import head_coefficients_kernel, head_losses_kernel, head_probe_kernel, head_rebalance_kernel
from ._head_tiles import ProductTile, differentiates_itself, logit_tile, projects_itself
from ._tiles import TILE, dense, on_device_of, part_programs, scratch, strides
from .divergence import kl_sums_kernel

#: The most classes of which a program holds a row, by the size of the arithmetic type.
MOST_CLASSES = {4: 4096, 8: 1024}
#: Programs that gradients are spread over, and the elements that the parts of head gradients may take, 4 MiB in float32.
GRADIENT_PROGRAMS = 1024
PART_ELEMENTS = 1 << 20
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
    rows, block_c, num_warps = logit_tile(of.stats, shape["MODALITIES"], classes, wide_warps=8)
    programs = part_programs(batch, rows)
    loss_parts = scratch(of.stats, programs, len(losses) + 1) if programs > 1 else None
    head_rebalance_kernel[(programs,)](
        of.projected, of.unimodal, of.stats, tuple(map(dense, biases)), target, kl_parts,
        kl, strength, tuple(logits), loss_parts, loss, losses, of.counted,
        *target.stride(), batch, classes, len(kl_parts), ignore_index, **shape, SMOOTHING=label_smoothing, EPS=EPS,
        BLOCK_B=rows, BLOCK_C=block_c, num_warps=num_warps,
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
    heads, (batch, classes) = len(weights), unimodal[0].shape
    itself = differentiates_itself(features, classes)
    # gradients are factors of products in bfloat16 anyway; in float16 those below 6e-8 would vanish
    narrow = features[0].dtype == torch.bfloat16 or not itself
    of_logits = scratch(features[0] if narrow else of.stats, heads, batch, classes)
    factors = scratch(of.stats, mixtures, 8, batch)
    rows, block_c, num_warps = logit_tile(of.stats, len(features), classes, wide_warps=8)
    with on_device_of(features[0]):
        if batch:
            head_coefficients_kernel[(triton.cdiv(batch, rows),)](
                dense(grad_loss), dense(grad_losses), tuple(map(dense, grad_logits)), of.projected, of.unimodal, of.stats,
                tuple(map(dense, biases[:mixtures])), target, strength, of.counted, of_logits, factors, *target.stride(), batch,
                classes, ignore_index, **shape, SMOOTHING=label_smoothing, EPS=EPS, BLOCK_B=rows, BLOCK_C=block_c,
                num_warps=num_warps,
            )  # fmt: skip
        gradients = _gradients if itself else library_gradients
        gradients(features, weights, shape, factors, of_logits, grad_features, grad_weights, grad_biases)


def _gradients(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    shape: dict[str, Any],
    factors: Tensor,
    of_logits: Tensor,
    grad_features: Sequence[Tensor | None],
    grad_weights: Sequence[Tensor | None],
    grad_biases: Sequence[Tensor | None],
) -> None:
    """Gradients of features and heads from those of the logits: one launch, or two where rows are taken in chunks."""
    (heads, batch, classes), x, width = of_logits.shape, features[0], features[0].shape[1]
    tile = ProductTile.of_gradients(features, classes)
    panels = triton.cdiv(width, tile.columns)
    # 16-bit features leave of 8BC floats, the memory of a step, as many to the parts as float32 would have taken for gradients
    elements = PART_ELEMENTS + (batch * classes if x.dtype != torch.float32 else 0)
    chunks = max(1, min(triton.cdiv(batch, tile.rows), GRADIENT_PROGRAMS // panels, elements // (heads * classes * width)))
    parts: Any = (tuple(grad_weights), tuple(grad_biases))
    if chunks > 1:
        parts = [tuple(t if t is None else scratch(factors, chunks, *t.shape) for t in grads) for grads in parts]
    head_gradients_kernel[(panels * chunks,)](
        tuple(features), tuple(map(dense, weights)), factors, of_logits, tuple(grad_features), *parts,
        *strides(features), batch, width, classes, chunks, **shape, **tile.constants(x),
    )  # fmt: skip
    if chunks > 1 and any(t is not None for t in (*grad_weights, *grad_biases)):
        programs = heads * triton.cdiv(classes * width, REDUCE_BLOCK)
        head_reduce_kernel[(programs,)](
            *parts, tuple(grad_weights), tuple(grad_biases), classes * width, classes, chunks, BLOCK=REDUCE_BLOCK, num_warps=4
        )
