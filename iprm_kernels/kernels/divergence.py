"""`batch_kl` and `strength_weights`: kernels and launchers, forward and backward."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_math import excess, exponential, probabilities, softmax_parts
from .tiling import (
    TILE,
    TILE_ROWS,
    block_rows,
    load_block,
    on_device_of,
    part_programs,
    row_tile,
    store_block,
    sum_of_parts,
    tiling,
)

#: The longest rows of logits held in registers: half as long as rows of features, because their terms need more registers.
WHOLE_LOGITS = {4: 4096, 8: 1024}
#: Modalities that a program of strength_weights handles at once; for its gradient, the side of a tile of the M x M terms.
STRENGTH_BLOCK = 16


@triton.jit
def kl_terms(b_p, b_q, r_p_top, r_p_sum, r_q_top, r_q_sum):
    """P φ(d), whose sum over a row is the KL of the row; Q where P is zero, infinite where only Q is zero."""
    p_prob, q_prob, d, close = probabilities(b_p, b_q, r_p_top, r_p_sum, r_q_top, r_q_sum)
    terms = tl.where(p_prob == 0, q_prob, tl.where(close, p_prob * excess(d), p_prob * d + (q_prob - p_prob)))
    return tl.where((b_q == -float("inf")) & (b_p != -float("inf")), float("inf"), terms)


@triton.jit
def row_kl(b_own, b_z, m_cols, r_z_top, r_z_sum):
    """KL, per row, of a modality's prediction from the mixture's."""
    b_own = tl.where(m_cols[None, :], b_own, -float("inf"))
    r_top, r_sum = softmax_parts(b_own)
    return tl.sum(kl_terms(b_own, b_z, r_top, r_sum, r_z_top, r_z_sum), axis=1)


@triton.jit(do_not_specialize=["n_rows"])
def batch_kl_forward_kernel(
    p_p,  # (B, C)
    p_q,  # (B, C)
    p_stats,  # (5, B) holding max p, Σ exp(p - max p), the same two for q, and KL
    p_row,
    p_col,
    q_row,
    q_col,
    n_rows,
    n_cols,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    o_cols = tl.arange(0, BLOCK_D)
    if WHOLE:
        b_p = load_block(p_p, p_row, p_col, o_rows, m_rows, o_cols, n_cols, DTYPE, -float("inf"))
        b_q = load_block(p_q, q_row, q_col, o_rows, m_rows, o_cols, n_cols, DTYPE, -float("inf"))
        r_p_max, r_p_sum = softmax_parts(b_p)
        r_q_max, r_q_sum = softmax_parts(b_q)
        r_kl = tl.sum(kl_terms(b_p, b_q, r_p_max, r_p_sum, r_q_max, r_q_sum), axis=1)
    else:
        # rows that do not fit in registers are read three times: an online softmax would save one read but lose three ulps of
        # log ΣP - log ΣQ, which is as much as close rows differ by
        b_p_max = tl.full((BLOCK_B, BLOCK_D), -float("inf"), DTYPE)
        b_q_max = tl.full((BLOCK_B, BLOCK_D), -float("inf"), DTYPE)
        for i_col in range(0, n_cols, BLOCK_D):
            b_p = load_block(p_p, p_row, p_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE, -float("inf"))
            b_q = load_block(p_q, q_row, q_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE, -float("inf"))
            b_p_max, b_q_max = tl.maximum(b_p_max, b_p), tl.maximum(b_q_max, b_q)
        r_p_max, r_q_max = tl.max(b_p_max, axis=1), tl.max(b_q_max, axis=1)
        b_p_sum = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
        b_q_sum = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
        for i_col in range(0, n_cols, BLOCK_D):
            b_p = load_block(p_p, p_row, p_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE, -float("inf"))
            b_q = load_block(p_q, q_row, q_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE, -float("inf"))
            b_p_sum += exponential(b_p - r_p_max[:, None])
            b_q_sum += exponential(b_q - r_q_max[:, None])
        r_p_sum, r_q_sum = tl.sum(b_p_sum, axis=1), tl.sum(b_q_sum, axis=1)
        b_kl = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
        for i_col in range(0, n_cols, BLOCK_D):
            b_p = load_block(p_p, p_row, p_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE, -float("inf"))
            b_q = load_block(p_q, q_row, q_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE, -float("inf"))
            b_kl += kl_terms(b_p, b_q, r_p_max, r_p_sum, r_q_max, r_q_sum)
        r_kl = tl.sum(b_kl, axis=1)
    o_stats = n_rows.to(tl.int64)
    tl.store(p_stats + o_rows, r_p_max, mask=m_rows)
    tl.store(p_stats + o_stats + o_rows, r_p_sum, mask=m_rows)
    tl.store(p_stats + 2 * o_stats + o_rows, r_q_max, mask=m_rows)
    tl.store(p_stats + 3 * o_stats + o_rows, r_q_sum, mask=m_rows)
    tl.store(p_stats + 4 * o_stats + o_rows, r_kl, mask=m_rows)


@triton.jit(do_not_specialize=["n_rows"])
def batch_kl_backward_kernel(
    p_grad,  # (B,)
    p_p,  # (B, C)
    p_q,  # (B, C)
    p_stats,  # (5, B)
    p_grad_p,  # (B, C) or None
    p_grad_q,  # (B, C) or None
    grad_row,
    p_row,
    p_col,
    q_row,
    q_col,
    n_rows,
    n_cols,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # elementwise once the row values are known, so a program handles a tile instead of whole rows
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    n_col_blocks = tl.cdiv(n_cols, BLOCK_D)
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0) // n_col_blocks, BLOCK_B)
    o_cols = (tl.program_id(0) % n_col_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    r_g = tl.load(p_grad + o_rows * grad_row, mask=m_rows, other=0.0).to(DTYPE)
    o_stats = n_rows.to(tl.int64)
    r_p_max = tl.load(p_stats + o_rows, mask=m_rows, other=0.0)
    r_p_sum = tl.load(p_stats + o_stats + o_rows, mask=m_rows, other=1.0)
    r_q_max = tl.load(p_stats + 2 * o_stats + o_rows, mask=m_rows, other=0.0)
    r_q_sum = tl.load(p_stats + 3 * o_stats + o_rows, mask=m_rows, other=1.0)
    b_p = load_block(p_p, p_row, p_col, o_rows, m_rows, o_cols, n_cols, DTYPE, -float("inf"))
    b_q = load_block(p_q, q_row, q_col, o_rows, m_rows, o_cols, n_cols, DTYPE, -float("inf"))
    p_prob, q_prob, d, close = probabilities(b_p, b_q, r_p_max, r_p_sum, r_q_max, r_q_sum)
    if p_grad_p is not None:
        r_kl = tl.load(p_stats + 4 * o_stats + o_rows, mask=m_rows, other=0.0)
        absent = (p_prob == 0) & (r_kl == r_kl)[:, None]  # not in a row whose KL is not finite
        b = tl.where(absent, 0.0, p_prob * (d - r_kl[:, None]))
        b = tl.where(r_g[:, None] == 0, 0.0, r_g[:, None] * b)  # zero also where the KL is not finite
        store_block(p_grad_p, b, o_rows, m_rows, o_cols, n_cols)
    if p_grad_q is not None:
        b = tl.where(close & (p_prob > 0), p_prob * (excess(d) - d), q_prob - p_prob)
        b = tl.where(r_g[:, None] == 0, 0.0, r_g[:, None] * b)
        store_block(p_grad_q, b, o_rows, m_rows, o_cols, n_cols)


@triton.jit(do_not_specialize=["n_rows"])
def batch_kl_pair_kernel(
    p_p,  # (B, C), like the two below
    p_other,
    p_q,
    p_parts,  # (programs, 2)
    p_row,
    p_col,
    other_row,
    other_col,
    q_row,
    q_col,
    n_rows,
    n_cols,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """KL of two predictions from a third. Each matrix is read once."""
    DTYPE: tl.constexpr = p_parts.dtype.element_ty
    o_cols = tl.arange(0, BLOCK_D)
    m_cols = o_cols < n_cols
    r_p_kl = tl.zeros((BLOCK_B,), DTYPE)
    r_other_kl = tl.zeros((BLOCK_B,), DTYPE)
    for i_rows in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_B), tl.num_programs(0)):
        o_rows, m_rows = block_rows(n_rows, i_rows, BLOCK_B)
        b_q = load_block(p_q, q_row, q_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        b_q = tl.where(m_cols[None, :], b_q, -float("inf"))
        r_q_top, r_q_sum = softmax_parts(b_q)
        b_p = load_block(p_p, p_row, p_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        r_p_kl += tl.where(m_rows, row_kl(b_p, b_q, m_cols, r_q_top, r_q_sum), 0.0)
        b_p = load_block(p_other, other_row, other_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        r_other_kl += tl.where(m_rows, row_kl(b_p, b_q, m_cols, r_q_top, r_q_sum), 0.0)
    tl.store(p_parts + 2 * tl.program_id(0), tl.sum(r_p_kl, axis=0))
    tl.store(p_parts + 2 * tl.program_id(0) + 1, tl.sum(r_other_kl, axis=0))


@triton.jit(do_not_specialize=["n_parts"])
def kl_sums_kernel(
    p_kl_parts,  # (n_parts, COLUMNS)
    p_kl,  # (COLUMNS,)
    n_parts,
    COLUMNS: tl.constexpr,
):
    """KL sums from the parts that the programs stored."""
    for column in tl.static_range(COLUMNS):
        tl.store(p_kl + column, sum_of_parts(p_kl_parts, n_parts, COLUMNS, column))


@triton.jit
def strength_ratio(p_kl, kl_stride, o, n, smallest, DTYPE: tl.constexpr):
    """min KL / KL, one where they are equal, including zero to zero and infinity to infinity."""
    kl = tl.load(p_kl + o * kl_stride, mask=o < n, other=float("inf")).to(DTYPE)
    return tl.where(o < n, tl.where(kl == smallest, 1.0, smallest / kl), 0.0)


@triton.jit
def strength_weights_forward_kernel(
    p_kl,  # (M,)
    p_strength,  # (M,)
    kl_stride,
    n,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK).to(tl.int64)
    b_smallest = tl.full((BLOCK,), float("inf"), DTYPE)
    for i in range(0, n, BLOCK):
        kl = tl.load(p_kl + (i + o) * kl_stride, mask=i + o < n, other=float("inf")).to(DTYPE)
        b_smallest = tl.minimum(b_smallest, kl)
    smallest = tl.min(b_smallest, axis=0)
    b_sum = tl.zeros((BLOCK,), DTYPE)
    for i in range(0, n, BLOCK):
        b_sum += strength_ratio(p_kl, kl_stride, i + o, n, smallest, DTYPE)
    total = tl.sum(b_sum, axis=0)
    for i in range(0, n, BLOCK):
        ratio = strength_ratio(p_kl, kl_stride, i + o, n, smallest, DTYPE)
        tl.store(p_strength + i + o, (ratio / total).to(p_strength.dtype.element_ty), mask=i + o < n)


@triton.jit
def strength_weights_backward_kernel(
    p_grad,  # (M,)
    p_kl,  # (M,)
    p_grad_kl,  # (M,)
    grad_stride,
    kl_stride,
    n,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Σ_m (g_m - g_j) J_mj with J_mj = 1 / (KL_m (Σ_i KL_j/KL_i)²), for the BLOCK columns j of this program
    o = tl.arange(0, BLOCK).to(tl.int64)
    o_j = tl.program_id(0).to(tl.int64) * BLOCK + o
    kl_j = tl.load(p_kl + o_j * kl_stride, mask=o_j < n, other=1.0).to(DTYPE)
    g_j = tl.load(p_grad + o_j * grad_stride, mask=o_j < n, other=0.0).to(DTYPE)
    column = tl.zeros((BLOCK,), DTYPE)
    nans = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, n, BLOCK):
        o_i = i + o
        kl_i = tl.load(p_kl + o_i * kl_stride, mask=o_i < n, other=1.0).to(DTYPE)
        nans += (kl_i != kl_i).to(tl.int32)
        ratio = tl.where(o_i[:, None] == o_j[None, :], 1.0, kl_j[None, :] / kl_i[:, None])
        column += tl.sum(tl.where((o_i < n)[:, None], ratio, 0.0), axis=0)
    any_nan = tl.sum(nans, axis=0) > 0
    column_undefined = ((column != column) & (any_nan == 0)) | (tl.abs(kl_j) == float("inf"))
    b_grad = tl.zeros((BLOCK,), DTYPE)
    for i in range(0, n, BLOCK):
        o_m = i + o
        kl_m = tl.load(p_kl + o_m * kl_stride, mask=o_m < n, other=0.0).to(DTYPE)
        g_m = tl.load(p_grad + o_m * grad_stride, mask=o_m < n, other=0.0).to(DTYPE)
        undefined = ((kl_m == 0) | (tl.abs(kl_m) == float("inf")))[:, None] | column_undefined[None, :]
        terms = (g_m[:, None] - g_j[None, :]) / (kl_m[:, None] * (column * column)[None, :])
        # a row beyond the last has KL 0 here and adds nothing to the sum
        b_grad += tl.sum(tl.where(undefined | (o_m[:, None] == o_j[None, :]), 0.0, terms), axis=0)
    tl.store(p_grad_kl + o_j, b_grad.to(p_grad_kl.dtype.element_ty), mask=o_j < n)


def batch_kl(p_logits: Tensor, q_logits: Tensor, reduction: str, value: Tensor, stats: Tensor) -> None:
    n_rows, n_cols = p_logits.shape
    if n_rows > 0:
        tile = tiling(n_cols, stats.dtype, WHOLE_LOGITS)
        with on_device_of(p_logits):
            batch_kl_forward_kernel[(triton.cdiv(n_rows, tile["BLOCK_B"]),)](
                p_logits, q_logits, stats, *p_logits.stride(), *q_logits.stride(), n_rows, n_cols, **tile
            )
    kl = stats[4]
    value.copy_(kl if reduction == "none" else kl.sum() if reduction == "sum" else kl.mean())


def batch_kl_backward(
    grad: Tensor,
    p_logits: Tensor,
    q_logits: Tensor,
    stats: Tensor,
    reduction: str,
    grad_p: Tensor | None,
    grad_q: Tensor | None,
) -> None:
    n_rows, n_cols = p_logits.shape
    if n_rows == 0:
        return
    tile = TILE[stats.dtype.itemsize]
    block_d = min(triton.next_power_of_2(n_cols), tile)
    block_b = min(tile // block_d, TILE_ROWS)
    row_grad = (grad / n_rows if reduction == "mean" else grad).expand(n_rows)
    strides = (*row_grad.stride(), *p_logits.stride(), *q_logits.stride())
    with on_device_of(p_logits):
        batch_kl_backward_kernel[(triton.cdiv(n_rows, block_b) * triton.cdiv(n_cols, block_d),)](
            row_grad,
            p_logits,
            q_logits,
            stats.contiguous(),
            grad_p,
            grad_q,
            *strides,
            n_rows,
            n_cols,
            BLOCK_B=block_b,
            BLOCK_D=block_d,
            num_warps=4,
        )


def batch_kl_pair(p_logits: Tensor, other_logits: Tensor, q_logits: Tensor, kl: Tensor) -> None:
    n_rows, n_cols = q_logits.shape
    if n_cols > WHOLE_LOGITS[kl.dtype.itemsize]:
        for logits, value in zip((p_logits, other_logits), kl.unbind(), strict=True):
            batch_kl(logits, q_logits, "sum", value, torch.empty((5, n_rows), dtype=kl.dtype, device=kl.device))
        return
    rows, block, num_warps = row_tile(n_cols, kl.dtype.itemsize)
    programs = part_programs(n_rows, rows)
    parts = torch.empty((programs, 2), dtype=kl.dtype, device=kl.device) if programs > 1 else kl
    strides = (*p_logits.stride(), *other_logits.stride(), *q_logits.stride())
    with on_device_of(kl):
        batch_kl_pair_kernel[(programs,)](
            p_logits, other_logits, q_logits, parts, *strides, n_rows, n_cols, BLOCK_B=rows, BLOCK_D=block, num_warps=num_warps
        )
        if programs > 1:
            kl_sums_kernel[(1,)](parts, kl, programs, COLUMNS=2, num_warps=4)


def strength_weights(kl: Tensor, strength: Tensor) -> None:
    dtype = tl.float64 if kl.dtype.itemsize == 8 else tl.float32
    with on_device_of(kl):
        strength_weights_forward_kernel[(1,)](
            kl, strength, *kl.stride(), kl.shape[0], DTYPE=dtype, BLOCK=STRENGTH_BLOCK, num_warps=1
        )


def strength_weights_backward(grad: Tensor, kl: Tensor, grad_kl: Tensor) -> None:
    dtype = tl.float64 if kl.dtype.itemsize == 8 else tl.float32
    programs = triton.cdiv(kl.shape[0], STRENGTH_BLOCK)
    with on_device_of(kl):
        strength_weights_backward_kernel[(programs,)](
            grad, kl, grad_kl, *grad.stride(), *kl.stride(), kl.shape[0], DTYPE=dtype, BLOCK=STRENGTH_BLOCK, num_warps=1
        )
