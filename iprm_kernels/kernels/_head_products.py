"""Kernels of the head step that multiply features and heads, for heads of few classes: all of a row's logits fit in one tile.

Each tile of X and Y is read once in either direction. Forward it goes into its projections on two heads and the row statistics;
backward into the gradients of all heads, while those of the features leave from the same tile. Sums over the batch run along
chunks of rows, whose results head_reduce_kernel adds up in their order.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ._head_rows import load_bias, load_stats, row_stats
from ._tiles import INTERPRETED, block_rows, load_block, nearest_bfloat16, store_block


@triton.jit
def load_head(p_weight, o_classes, n_classes, o_cols, n_cols):
    """Columns of a contiguous (C, D) matrix, in its own type.  -> (BLOCK_C, BLOCK_D)"""
    pointers = p_weight + o_classes[:, None].to(tl.int64) * n_cols + o_cols[None, :]
    return tl.load(pointers, mask=(o_classes < n_classes)[:, None] & (o_cols < n_cols)[None, :], other=0.0)


@triton.jit
def factor(b):
    """A factor of a matrix product as it is; the interpreter multiplies no bfloat16."""
    return b.to(tl.float32) if INTERPRETED and b.dtype == tl.bfloat16 else b


@triton.jit
def narrowed(b, STORED: tl.constexpr):
    """A factor of a matrix product in float32, as narrow as features of type STORED allow.

    Gradients in float16 would vanish below 6e-8, so products with them are of float32 for such features: its TF32 keeps the 11
    bits of a float16 and the range of a float32.
    """
    if STORED == tl.bfloat16:  # noqa: SIM300 (a type knows nothing of constants on its right)
        b = nearest_bfloat16(b) if INTERPRETED else b.to(tl.bfloat16)
    return b


@triton.jit(do_not_specialize=["n_rows"])
def head_project_kernel(
    p_x,  # (B, D)
    p_y,  # (B, D)
    p_weight_x,  # (C, D)
    p_bias_x,  # (C,) or None
    p_weight_y,
    p_bias_y,
    p_weight_mix,
    p_stats,  # (3, B)
    p_a,  # (B, C) X W_mᵀ
    p_v,  # (B, C) Y W_mᵀ
    p_u_x,  # (B, C) X W_xᵀ + b_x, or None where the logits are that
    p_u_y,
    p_logits_x,  # (B, C)
    p_logits_y,
    x_row,
    x_col,
    y_row,
    y_col,
    n_rows,
    n_cols,
    n_classes,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Projections on both heads of a modality, row statistics and unimodal logits."""
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    STORED: tl.constexpr = p_x.dtype.element_ty
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    o_cols = tl.arange(0, BLOCK_D)
    o_classes = tl.arange(0, BLOCK_C)
    r_xx = tl.zeros((BLOCK_B,), DTYPE)
    r_yy = tl.zeros((BLOCK_B,), DTYPE)
    r_xy = tl.zeros((BLOCK_B,), DTYPE)
    b_a = tl.zeros((BLOCK_B, BLOCK_C), DTYPE)
    b_v = tl.zeros((BLOCK_B, BLOCK_C), DTYPE)
    b_u_x = tl.zeros((BLOCK_B, BLOCK_C), DTYPE)
    b_u_y = tl.zeros((BLOCK_B, BLOCK_C), DTYPE)
    for i_col in range(0, n_cols, BLOCK_D):
        b_x = factor(load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, STORED))
        b_y = factor(load_block(p_y, y_row, y_col, o_rows, m_rows, i_col + o_cols, n_cols, STORED))
        b_mix = tl.trans(factor(load_head(p_weight_mix, o_classes, n_classes, i_col + o_cols, n_cols)))
        b_a = tl.dot(b_x, b_mix, b_a, input_precision=PRECISION)
        b_v = tl.dot(b_y, b_mix, b_v, input_precision=PRECISION)
        b_own = tl.trans(factor(load_head(p_weight_x, o_classes, n_classes, i_col + o_cols, n_cols)))
        b_u_x = tl.dot(b_x, b_own, b_u_x, input_precision=PRECISION)
        b_own = tl.trans(factor(load_head(p_weight_y, o_classes, n_classes, i_col + o_cols, n_cols)))
        b_u_y = tl.dot(b_y, b_own, b_u_y, input_precision=PRECISION)
        b_x, b_y = b_x.to(DTYPE), b_y.to(DTYPE)
        r_xx += tl.sum(b_x * b_x, axis=1)
        r_yy += tl.sum(b_y * b_y, axis=1)
        r_xy += tl.sum(b_x * b_y, axis=1)
    row_stats(r_xx, r_yy, r_xy, p_stats, o_rows, m_rows, n_rows, EPS)
    store_block(p_a, b_a, o_rows, m_rows, o_classes, n_classes)
    store_block(p_v, b_v, o_rows, m_rows, o_classes, n_classes)
    b_u_x += load_bias(p_bias_x, o_classes, n_classes, DTYPE)[None, :]
    b_u_y += load_bias(p_bias_y, o_classes, n_classes, DTYPE)[None, :]
    store_block(p_logits_x, b_u_x, o_rows, m_rows, o_classes, n_classes)
    store_block(p_logits_y, b_u_y, o_rows, m_rows, o_classes, n_classes)
    if p_u_x is not None:
        store_block(p_u_x, b_u_x, o_rows, m_rows, o_classes, n_classes)
        store_block(p_u_y, b_u_y, o_rows, m_rows, o_classes, n_classes)


@triton.jit
def add_product(b_sum, b_g, b_features, STORED: tl.constexpr, PRECISION: tl.constexpr):
    """Σ + Gᵀ F"""
    return tl.dot(tl.trans(narrowed(b_g, STORED)), narrowed(b_features, STORED), b_sum, input_precision=PRECISION)


@triton.jit
def store_part(p, value, i_chunk, o_classes, n_classes, o_cols, n_cols):
    """A chunk's share of the gradient of a (C, D) matrix."""
    m_classes = o_classes < n_classes
    o_classes = o_classes.to(tl.int64)
    store_block(p + i_chunk.to(tl.int64) * n_classes * n_cols, value, o_classes, m_classes, o_cols, n_cols)


@triton.jit
def store_bias_part(p, value, i_chunk, o_classes, n_classes):
    if INTERPRETED and p.dtype.element_ty == tl.bfloat16:
        value = nearest_bfloat16(value)
    tl.store(p + i_chunk * n_classes + o_classes, value.to(p.dtype.element_ty), mask=o_classes < n_classes)


@triton.jit
def feature_gradient(b_g, b_x, b_y, p_rows, SIDE: tl.constexpr, r_norm, o_rows, m_rows, n_rows, EPS: tl.constexpr):
    """What comes to the features of a side through the mixture, g = dZ W_m and both features by a factor each; nothing to a
    dead row."""
    o_stats = n_rows.to(tl.int64)
    r_g = tl.load(p_rows + SIDE * o_stats + o_rows, mask=m_rows, other=0.0)
    r_x = tl.load(p_rows + (2 + 2 * SIDE) * o_stats + o_rows, mask=m_rows, other=0.0)
    r_y = tl.load(p_rows + (3 + 2 * SIDE) * o_stats + o_rows, mask=m_rows, other=0.0)
    dead = r_norm <= tl.full(r_norm.shape, EPS, r_norm.dtype)
    return tl.where(dead[:, None], 0.0, r_g[:, None] * b_g + r_x[:, None] * b_x + r_y[:, None] * b_y)


@triton.jit(do_not_specialize=["n_rows", "n_chunks"])
def head_gradients_kernel(
    p_x,  # (B, D)
    p_y,  # (B, D)
    p_weight_x,  # (C, D), as the two below
    p_weight_y,
    p_weight_mix,
    p_stats,  # (3, B)
    p_rows,  # (6, B), as head_coefficients_kernel left them
    p_dz,  # (B, C), as the two below
    p_du_x,
    p_du_y,
    p_grad_x,  # (B, D) or None
    p_grad_y,
    p_grad_weight_x,  # (n_chunks, C, D) or None, as all weights below
    p_grad_bias_x,  # (n_chunks, C) or None, as all biases below
    p_grad_weight_y,
    p_grad_bias_y,
    p_grad_weight_mix,
    p_grad_bias_mix,
    x_row,
    x_col,
    y_row,
    y_col,
    n_rows,
    n_cols,
    n_classes,
    n_chunks,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of features and heads for a panel of columns, along one chunk of the rows."""
    DTYPE: tl.constexpr = p_rows.dtype.element_ty
    STORED: tl.constexpr = p_x.dtype.element_ty
    n_panels = tl.cdiv(n_cols, BLOCK_D)
    i_panel = tl.program_id(0) % n_panels
    i_chunk = tl.program_id(0) // n_panels
    o_cols = i_panel * BLOCK_D + tl.arange(0, BLOCK_D)
    o_classes = tl.arange(0, BLOCK_C)
    b_mix = narrowed(load_head(p_weight_mix, o_classes, n_classes, o_cols, n_cols).to(DTYPE), STORED)
    b_own_x = narrowed(load_head(p_weight_x, o_classes, n_classes, o_cols, n_cols).to(DTYPE), STORED)
    b_own_y = narrowed(load_head(p_weight_y, o_classes, n_classes, o_cols, n_cols).to(DTYPE), STORED)
    b_grad_mix = tl.zeros((BLOCK_C, BLOCK_D), DTYPE)
    b_grad_x = tl.zeros((BLOCK_C, BLOCK_D), DTYPE)
    b_grad_y = tl.zeros((BLOCK_C, BLOCK_D), DTYPE)
    r_bias_mix = tl.zeros((BLOCK_C,), DTYPE)
    r_bias_x = tl.zeros((BLOCK_C,), DTYPE)
    r_bias_y = tl.zeros((BLOCK_C,), DTYPE)
    o_stats = n_rows.to(tl.int64)
    for i_rows in range(i_chunk, tl.cdiv(n_rows, BLOCK_B), n_chunks):
        o_rows, m_rows = block_rows(n_rows, i_rows, BLOCK_B)
        b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        b_dz = load_block(p_dz, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        b_du_x = load_block(p_du_x, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        b_du_y = load_block(p_du_y, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        r_z_x = tl.load(p_rows + o_rows, mask=m_rows, other=0.0)
        r_z_y = tl.load(p_rows + o_stats + o_rows, mask=m_rows, other=0.0)
        if p_grad_weight_mix is not None:
            b_z = r_z_x[:, None] * b_x + r_z_y[:, None] * b_y
            b_grad_mix = add_product(b_grad_mix, b_dz, b_z, STORED, PRECISION)
        if p_grad_weight_x is not None:
            b_grad_x = add_product(b_grad_x, b_du_x, b_x, STORED, PRECISION)
        if p_grad_weight_y is not None:
            b_grad_y = add_product(b_grad_y, b_du_y, b_y, STORED, PRECISION)
        r_bias_mix += tl.sum(b_dz, axis=0)
        r_bias_x += tl.sum(b_du_x, axis=0)
        r_bias_y += tl.sum(b_du_y, axis=0)
        if (p_grad_x is not None) or (p_grad_y is not None):
            b_g = tl.dot(narrowed(b_dz, STORED), b_mix, input_precision=PRECISION)
            r_x_norm, r_y_norm, _ = load_stats(p_stats, o_rows, m_rows, n_rows)
        if p_grad_x is not None:
            b = feature_gradient(b_g, b_x, b_y, p_rows, 0, r_x_norm, o_rows, m_rows, n_rows, EPS)
            b = tl.dot(narrowed(b_du_x, STORED), b_own_x, b, input_precision=PRECISION)
            store_block(p_grad_x, b, o_rows, m_rows, o_cols, n_cols)
        if p_grad_y is not None:
            b = feature_gradient(b_g, b_x, b_y, p_rows, 1, r_y_norm, o_rows, m_rows, n_rows, EPS)
            b = tl.dot(narrowed(b_du_y, STORED), b_own_y, b, input_precision=PRECISION)
            store_block(p_grad_y, b, o_rows, m_rows, o_cols, n_cols)
    if p_grad_weight_mix is not None:
        store_part(p_grad_weight_mix, b_grad_mix, i_chunk, o_classes, n_classes, o_cols, n_cols)
    if p_grad_weight_x is not None:
        store_part(p_grad_weight_x, b_grad_x, i_chunk, o_classes, n_classes, o_cols, n_cols)
    if p_grad_weight_y is not None:
        store_part(p_grad_weight_y, b_grad_y, i_chunk, o_classes, n_classes, o_cols, n_cols)
    if i_panel == 0:
        if p_grad_bias_mix is not None:
            store_bias_part(p_grad_bias_mix, r_bias_mix, i_chunk, o_classes, n_classes)
        if p_grad_bias_x is not None:
            store_bias_part(p_grad_bias_x, r_bias_x, i_chunk, o_classes, n_classes)
        if p_grad_bias_y is not None:
            store_bias_part(p_grad_bias_y, r_bias_y, i_chunk, o_classes, n_classes)


@triton.jit
def reduce_part(p_parts, p_out, n_chunks, o, n):
    """Σ over chunks of elements of (n_chunks, n)."""
    b_sum = tl.zeros(o.shape, p_parts.dtype.element_ty)
    for i_chunk in range(n_chunks):
        b_sum += tl.load(p_parts + i_chunk * n + o, mask=o < n, other=0.0)
    if INTERPRETED and p_out.dtype.element_ty == tl.bfloat16:
        b_sum = nearest_bfloat16(b_sum)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=o < n)


@triton.jit(do_not_specialize=["n_chunks"])
def head_reduce_kernel(
    p_weight_x_parts,  # (n_chunks, C, D), as all parts of weights; None where its output is
    p_bias_x_parts,  # (n_chunks, C), as all parts of biases
    p_weight_y_parts,
    p_bias_y_parts,
    p_weight_mix_parts,
    p_bias_mix_parts,
    p_grad_weight_x,  # (C, D) or None
    p_grad_bias_x,  # (C,) or None
    p_grad_weight_y,
    p_grad_bias_y,
    p_grad_weight_mix,
    p_grad_bias_mix,
    n_weights,
    n_biases,
    n_chunks,
    BLOCK: tl.constexpr,
):
    """Gradients of heads from the parts that the chunks of rows left, one head after the other."""
    n_blocks = tl.cdiv(n_weights, BLOCK)
    i_head = tl.program_id(0) // n_blocks
    o = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # the first n_biases of them are biases too
    if i_head == 0:
        if p_grad_weight_x is not None:
            reduce_part(p_weight_x_parts, p_grad_weight_x, n_chunks, o, n_weights)
        if p_grad_bias_x is not None:
            reduce_part(p_bias_x_parts, p_grad_bias_x, n_chunks, o, n_biases)
    elif i_head == 1:
        if p_grad_weight_y is not None:
            reduce_part(p_weight_y_parts, p_grad_weight_y, n_chunks, o, n_weights)
        if p_grad_bias_y is not None:
            reduce_part(p_bias_y_parts, p_grad_bias_y, n_chunks, o, n_biases)
    else:
        if p_grad_weight_mix is not None:
            reduce_part(p_weight_mix_parts, p_grad_weight_mix, n_chunks, o, n_weights)
        if p_grad_bias_mix is not None:
            reduce_part(p_bias_mix_parts, p_grad_bias_mix, n_chunks, o, n_biases)


@triton.jit(do_not_specialize=["n_rows"])
def head_features_kernel(
    p_g,  # (B, D) dZ W_m, or None: then the mixture itself is made, as grad_x
    p_x,  # (B, D)
    p_y,  # (B, D)
    p_stats,  # (3, B)
    p_rows,  # (6, B)
    p_grad_x,  # (B, D), or None
    p_grad_y,  # (B, D), or None; either may be g itself
    x_row,
    x_col,
    y_row,
    y_col,
    n_rows,
    n_cols,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What comes to the features through the mixture, where a library makes the products."""
    DTYPE: tl.constexpr = p_rows.dtype.element_ty
    n_panels = tl.cdiv(n_cols, BLOCK_D)
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0) // n_panels, BLOCK_B)
    o_cols = (tl.program_id(0) % n_panels) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
    b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
    if p_g is None:
        r_x = tl.load(p_rows + o_rows, mask=m_rows, other=0.0)
        r_y = tl.load(p_rows + n_rows.to(tl.int64) + o_rows, mask=m_rows, other=0.0)
        store_block(p_grad_x, r_x[:, None] * b_x + r_y[:, None] * b_y, o_rows, m_rows, o_cols, n_cols)
    else:
        b_g = load_block(p_g, n_cols, 1, o_rows, m_rows, o_cols, n_cols, DTYPE)
        r_x_norm, r_y_norm, _ = load_stats(p_stats, o_rows, m_rows, n_rows)
        if p_grad_x is not None:
            b = feature_gradient(b_g, b_x, b_y, p_rows, 0, r_x_norm, o_rows, m_rows, n_rows, EPS)
            store_block(p_grad_x, b, o_rows, m_rows, o_cols, n_cols)
        if p_grad_y is not None:
            b = feature_gradient(b_g, b_x, b_y, p_rows, 1, r_y_norm, o_rows, m_rows, n_rows, EPS)
            store_block(p_grad_y, b, o_rows, m_rows, o_cols, n_cols)
