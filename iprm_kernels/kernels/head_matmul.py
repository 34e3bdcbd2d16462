"""Kernels of the head step that multiply features and heads, for so few classes that all logits of a row fit in one tile.

Each tile of the features is read once forward and once backward. The forward pass projects it on its own head and on the heads
of its mixtures and sums the row statistics; the backward pass adds it to the gradients of all heads and computes the gradient
of the features. Batch sums are computed per chunk of rows, and head_reduce_kernel adds the chunks in a fixed order.
"""

# mypy: ignore-errors
# tuples of tiles grow in loops that the compiler unrolls, which type annotations cannot express

from __future__ import annotations

import triton
import triton.language as tl

from .head_forward_rows import load_bias, matrix_of, pair_stats, row_stats
from .tiling import INTERPRETED, block_rows, load_block, nearest_bfloat16, store_block


@triton.jit
def load_head(p_weight, o_classes, n_classes, o_cols, n_cols):
    """Columns of a contiguous (C, D) matrix, in its own type.  -> (BLOCK_C, BLOCK_D)"""
    pointers = p_weight + o_classes[:, None].to(tl.int64) * n_cols + o_cols[None, :]
    return tl.load(pointers, mask=(o_classes < n_classes)[:, None] & (o_cols < n_cols)[None, :], other=0.0)


@triton.jit
def factor(b):
    """A factor of a matrix product, unchanged; in float32 under the interpreter, which cannot multiply bfloat16."""
    return b.to(tl.float32) if INTERPRETED and b.dtype == tl.bfloat16 else b


@triton.jit
def narrowed(b, STORED: tl.constexpr):
    """A float32 factor of a matrix product, narrowed as far as features of type STORED allow.

    Gradients in float16 would vanish below 6e-8. For float16 features the products are therefore in float32, whose TF32 keeps
    the 11 bits of a float16 and the range of a float32.
    """
    if STORED == tl.bfloat16:  # noqa: SIM300 (a Triton type cannot compare with a constexpr on its right)
        b = nearest_bfloat16(b) if INTERPRETED else b.to(tl.bfloat16)
    return b


@triton.jit(do_not_specialize=["n_rows"])
def head_project_kernel(
    p_features,  # M of (B, D)
    p_weights,  # P + M of (C, D)
    p_biases,  # P + M of (C,) or None
    p_stats,  # (P, 3, B)
    p_projected,  # (P, 2, B, C) X W_mᵀ and Y W_mᵀ
    p_unimodal,  # M of (B, C) X W_xᵀ + b_x, or empty if the logits are not narrower
    p_logits,  # M of (B, C)
    row_strides,
    col_strides,
    n_rows,
    n_cols,
    n_classes,
    MODALITIES: tl.constexpr,
    PAIRS: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Projections of the features on their heads, row statistics and unimodal logits."""
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    STORED: tl.constexpr = p_features[0].dtype.element_ty
    P: tl.constexpr = len(PAIRS)
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    o_classes = tl.arange(0, BLOCK_C)
    b_projected = ()
    r_products = ()
    for _ in tl.static_range(P):
        b_projected = b_projected + (tl.zeros((BLOCK_B, BLOCK_C), DTYPE), tl.zeros((BLOCK_B, BLOCK_C), DTYPE))
        r_products = r_products + (tl.zeros((BLOCK_B,), DTYPE),)
    b_own = ()
    r_squares = ()
    for _ in tl.static_range(MODALITIES):
        b_own = b_own + (tl.zeros((BLOCK_B, BLOCK_C), DTYPE),)
        r_squares = r_squares + (tl.zeros((BLOCK_B,), DTYPE),)
    for i_col in range(0, n_cols, BLOCK_D):
        o_cols = i_col + tl.arange(0, BLOCK_D)
        b_features = ()
        for m in tl.static_range(MODALITIES):
            b_x = factor(load_block(p_features[m], row_strides[m], col_strides[m], o_rows, m_rows, o_cols, n_cols, STORED))
            b_features = b_features + (b_x,)
        b_next = ()
        for k in tl.static_range(P):
            b_head = tl.trans(factor(load_head(p_weights[k], o_classes, n_classes, o_cols, n_cols)))
            for side in tl.static_range(2):
                b = tl.dot(b_features[PAIRS[k][side]], b_head, b_projected[2 * k + side], input_precision=PRECISION)
                b_next = b_next + (b,)
        b_projected = b_next
        b_next = ()
        for m in tl.static_range(MODALITIES):
            b_head = tl.trans(factor(load_head(p_weights[P + m], o_classes, n_classes, o_cols, n_cols)))
            b_next = b_next + (tl.dot(b_features[m], b_head, b_own[m], input_precision=PRECISION),)
        b_own = b_next
        r_next = ()
        for m in tl.static_range(MODALITIES):
            b_x = b_features[m].to(DTYPE)
            r_next = r_next + (r_squares[m] + tl.sum(b_x * b_x, axis=1),)
        r_squares = r_next
        r_next = ()
        for k in tl.static_range(P):
            b_xy = b_features[PAIRS[k][0]].to(DTYPE) * b_features[PAIRS[k][1]].to(DTYPE)
            r_next = r_next + (r_products[k] + tl.sum(b_xy, axis=1),)
        r_products = r_next
    for k in tl.static_range(P):
        p_pair = pair_stats(p_stats, n_rows, k)
        row_stats(r_squares[PAIRS[k][0]], r_squares[PAIRS[k][1]], r_products[k], p_pair, o_rows, m_rows, n_rows, EPS)
        for side in tl.static_range(2):
            p_side = matrix_of(p_projected, n_rows, n_classes, 2 * k + side)
            store_block(p_side, b_projected[2 * k + side], o_rows, m_rows, o_classes, n_classes)
    for m in tl.static_range(MODALITIES):
        b_u = b_own[m] + load_bias(p_biases[P + m], o_classes, n_classes, DTYPE)[None, :]
        store_block(p_logits[m], b_u, o_rows, m_rows, o_classes, n_classes)
        if len(p_unimodal) > 0:
            store_block(p_unimodal[m], b_u, o_rows, m_rows, o_classes, n_classes)


@triton.jit
def add_product(b_sum, b_g, b_features, STORED: tl.constexpr, PRECISION: tl.constexpr):
    """Σ + Gᵀ F"""
    return tl.dot(tl.trans(narrowed(b_g, STORED)), narrowed(b_features, STORED), b_sum, input_precision=PRECISION)


@triton.jit
def store_part(p, value, i_chunk, o_classes, n_classes, o_cols, n_cols):
    """Stores a chunk's part of the gradient of a (C, D) matrix."""
    m_classes = o_classes < n_classes
    o_classes = o_classes.to(tl.int64)
    store_block(p + i_chunk.to(tl.int64) * n_classes * n_cols, value, o_classes, m_classes, o_cols, n_cols)


@triton.jit
def store_bias_part(p, value, i_chunk, o_classes, n_classes, wanted):
    if INTERPRETED and p.dtype.element_ty == tl.bfloat16:
        value = nearest_bfloat16(value)
    tl.store(p + i_chunk * n_classes + o_classes, value.to(p.dtype.element_ty), mask=wanted & (o_classes < n_classes))


@triton.jit
def feature_gradient(b_g, b_x, b_y, p_rows, SIDE: tl.constexpr, o_rows, m_rows, n_rows):
    """The gradient of one side's features through a mixture: g = dZ W_m and both features, each times a row factor. It is zero
    if all factors are zero, as for a dead row, even where g or the features are not finite."""
    o_stats = n_rows.to(tl.int64)
    r_x = tl.load(p_rows + (4 + 2 * SIDE) * o_stats + o_rows, mask=m_rows, other=0.0)
    r_y = tl.load(p_rows + (5 + 2 * SIDE) * o_stats + o_rows, mask=m_rows, other=0.0)
    if b_g is None:
        some = (r_x != 0) | (r_y != 0)
        b = r_x[:, None] * b_x + r_y[:, None] * b_y
    else:
        r_g = tl.load(p_rows + (2 + SIDE) * o_stats + o_rows, mask=m_rows, other=0.0)
        some = (r_g != 0) | (r_x != 0) | (r_y != 0)
        b = r_g[:, None] * b_g + r_x[:, None] * b_x + r_y[:, None] * b_y
    return tl.where(some[:, None], b, 0.0)


@triton.jit(do_not_specialize=["n_rows", "n_chunks"])
def head_gradients_kernel(
    p_features,  # M of (B, D)
    p_weights,  # P + M of (C, D)
    p_rows,  # (P, 8, B), from head_coefficients_kernel
    p_of_logits,  # (P + M, B, C)
    p_grad_features,  # M of (B, D) or None
    p_grad_weights,  # P + M of (n_chunks, C, D) or None
    p_grad_biases,  # P + M of (n_chunks, C) or None
    row_strides,
    col_strides,
    n_rows,
    n_cols,
    n_classes,
    n_chunks,
    MODALITIES: tl.constexpr,
    PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of features and heads for a panel of columns, along one chunk of the rows."""
    DTYPE: tl.constexpr = p_rows.dtype.element_ty
    STORED: tl.constexpr = p_features[0].dtype.element_ty
    P: tl.constexpr = len(PAIRS)
    n_panels = tl.cdiv(n_cols, BLOCK_D)
    i_panel = tl.program_id(0) % n_panels
    i_chunk = tl.program_id(0) // n_panels
    o_cols = i_panel * BLOCK_D + tl.arange(0, BLOCK_D)
    o_classes = tl.arange(0, BLOCK_C)
    b_heads = ()
    b_grads = ()
    r_biases = ()
    for head in tl.static_range(P + MODALITIES):
        b_weight = load_head(p_weights[head], o_classes, n_classes, o_cols, n_cols)
        b_heads = b_heads + (narrowed(b_weight.to(DTYPE), STORED),)
        b_grads = b_grads + (tl.zeros((BLOCK_C, BLOCK_D), DTYPE),)
        r_biases = r_biases + (tl.zeros((BLOCK_C,), DTYPE),)
    o_stats = n_rows.to(tl.int64)
    for i_rows in range(i_chunk, tl.cdiv(n_rows, BLOCK_B), n_chunks):
        o_rows, m_rows = block_rows(n_rows, i_rows, BLOCK_B)
        b_features = ()
        for m in tl.static_range(MODALITIES):
            b_x = load_block(p_features[m], row_strides[m], col_strides[m], o_rows, m_rows, o_cols, n_cols, DTYPE)
            b_features = b_features + (b_x,)
        b_of_logits = ()
        for head in tl.static_range(P + MODALITIES):
            p_gradient = matrix_of(p_of_logits, n_rows, n_classes, head)
            b_of_logits = b_of_logits + (load_block(p_gradient, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE),)
        b_next = ()
        for head in tl.static_range(P + MODALITIES):
            b_grad = b_grads[head]
            if p_grad_weights[head] is not None:
                if head < P:
                    p_factors = p_rows + 8 * head * o_stats
                    r_z_x = tl.load(p_factors + o_rows, mask=m_rows, other=0.0)
                    r_z_y = tl.load(p_factors + o_stats + o_rows, mask=m_rows, other=0.0)
                    b_z = r_z_x[:, None] * b_features[PAIRS[head][0]] + r_z_y[:, None] * b_features[PAIRS[head][1]]
                else:
                    b_z = b_features[head - P]
                b_grad = add_product(b_grad, b_of_logits[head], b_z, STORED, PRECISION)
            b_next = b_next + (b_grad,)
        b_grads = b_next
        r_next = ()
        for head in tl.static_range(P + MODALITIES):
            r_next = r_next + (r_biases[head] + tl.sum(b_of_logits[head], axis=0),)
        r_biases = r_next
        b_through = ()
        for k in tl.static_range(P):
            b_g = b_features[
                PAIRS[k][0]
            ]  # of the same type and shape as the product, which is computed only where a gradient needs it
            if (p_grad_features[PAIRS[k][0]] is not None) or (p_grad_features[PAIRS[k][1]] is not None):
                b_g = tl.dot(narrowed(b_of_logits[k], STORED), b_heads[k], input_precision=PRECISION)
            b_through = b_through + (b_g,)
        for m in tl.static_range(MODALITIES):
            if p_grad_features[m] is not None:
                b = None
                for k in tl.static_range(P):
                    for side in tl.static_range(2):
                        if PAIRS[k][side] == m:
                            b_x, b_y = b_features[PAIRS[k][0]], b_features[PAIRS[k][1]]
                            p_factors = p_rows + 8 * k * o_stats
                            b_of_pair = feature_gradient(b_through[k], b_x, b_y, p_factors, side, o_rows, m_rows, n_rows)
                            if b is None:
                                b = b_of_pair
                            else:
                                b += b_of_pair
                if b is None:  # the modality is in no pair
                    b = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
                b = tl.dot(narrowed(b_of_logits[P + m], STORED), b_heads[P + m], b, input_precision=PRECISION)
                store_block(p_grad_features[m], b, o_rows, m_rows, o_cols, n_cols)
    for head in tl.static_range(P + MODALITIES):
        if p_grad_weights[head] is not None:
            store_part(p_grad_weights[head], b_grads[head], i_chunk, o_classes, n_classes, o_cols, n_cols)
        if p_grad_biases[head] is not None:
            store_bias_part(p_grad_biases[head], r_biases[head], i_chunk, o_classes, n_classes, i_panel == 0)


@triton.jit
def reduce_part(p_parts, p_out, n_chunks, o, n):
    """Sums (n_chunks, n) over the chunks, for elements `o`."""
    b_sum = tl.zeros(o.shape, p_parts.dtype.element_ty)
    for i_chunk in range(n_chunks):
        b_sum += tl.load(p_parts + i_chunk * n + o, mask=o < n, other=0.0)
    if INTERPRETED and p_out.dtype.element_ty == tl.bfloat16:
        b_sum = nearest_bfloat16(b_sum)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=o < n)


@triton.jit(do_not_specialize=["n_chunks"])
def head_reduce_kernel(
    p_weight_parts,  # P + M of (n_chunks, C, D), or None where the output is None
    p_bias_parts,  # P + M of (n_chunks, C)
    p_grad_weights,  # P + M of (C, D) or None
    p_grad_biases,  # P + M of (C,) or None
    n_weights,
    n_biases,
    n_chunks,
    BLOCK: tl.constexpr,
):
    """Head gradients as sums of the parts stored per chunk of rows, one head after the other."""
    n_blocks = tl.cdiv(n_weights, BLOCK)
    i_head = tl.program_id(0) // n_blocks
    o = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # the first n_biases also serve the biases
    for head in tl.static_range(len(p_grad_weights)):
        if i_head == head:
            if p_grad_weights[head] is not None:
                reduce_part(p_weight_parts[head], p_grad_weights[head], n_chunks, o, n_weights)
            if p_grad_biases[head] is not None:
                reduce_part(p_bias_parts[head], p_grad_biases[head], n_chunks, o, n_biases)


@triton.jit(do_not_specialize=["n_rows"])
def head_features_kernel(
    p_g,  # (B, D) dZ W_m, or None to omit that term
    p_x,  # (B, D)
    p_y,  # (B, D)
    p_rows,  # (8, B) of the pair
    p_grad_x,  # (B, D), or None
    p_grad_y,  # (B, D), or None; either gradient may alias g
    p_mixture,  # (B, D), or None if the mixture is not needed
    x_row,
    x_col,
    y_row,
    y_col,
    n_rows,
    n_cols,
    ADD_X: tl.constexpr,
    ADD_Y: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Feature gradients through a mixture, if torch computes the products; optionally added to the gradients already stored."""
    DTYPE: tl.constexpr = p_rows.dtype.element_ty
    n_panels = tl.cdiv(n_cols, BLOCK_D)
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0) // n_panels, BLOCK_B)
    o_cols = (tl.program_id(0) % n_panels) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
    b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
    if p_mixture is not None:
        r_x = tl.load(p_rows + o_rows, mask=m_rows, other=0.0)
        r_y = tl.load(p_rows + n_rows.to(tl.int64) + o_rows, mask=m_rows, other=0.0)
        store_block(p_mixture, r_x[:, None] * b_x + r_y[:, None] * b_y, o_rows, m_rows, o_cols, n_cols)
    b_g = None
    if p_g is not None:
        b_g = load_block(p_g, n_cols, 1, o_rows, m_rows, o_cols, n_cols, DTYPE)
    if p_grad_x is not None:
        b = feature_gradient(b_g, b_x, b_y, p_rows, 0, o_rows, m_rows, n_rows)
        if ADD_X:
            b += load_block(p_grad_x, n_cols, 1, o_rows, m_rows, o_cols, n_cols, DTYPE)
        store_block(p_grad_x, b, o_rows, m_rows, o_cols, n_cols)
    if p_grad_y is not None:
        b = feature_gradient(b_g, b_x, b_y, p_rows, 1, o_rows, m_rows, n_rows)
        if ADD_Y:
            b += load_block(p_grad_y, n_cols, 1, o_rows, m_rows, o_cols, n_cols, DTYPE)
        store_block(p_grad_y, b, o_rows, m_rows, o_cols, n_cols)
