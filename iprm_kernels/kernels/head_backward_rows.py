"""The kernel of the head step's backward pass on rows of C numbers: gradients of the logits, and row factors."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .head_forward_rows import load_bias, load_labels, load_stats, matrix_of, pair_stats
from .row_math import divisor, exponential, gap_of, live_inverse_norm, slerp, softmax_parts
from .tiling import block_rows, load_block, store_block


@triton.jit
def logit_gradient(b, o_cols, m_cols, n_cols, r_target, counted, r_poison, scale, SMOOTHING: tl.constexpr):
    """scale (P - (1-ε) onehot - ε/C) of rows, zero for rows that do not count and beyond the last class."""
    b = tl.where(m_cols[None, :], b, -float("inf"))
    r_top, r_sum = softmax_parts(b)
    # an expression of bare constants would be float32, even in a float64 kernel
    b_wanted = tl.where(o_cols[None, :] == r_target[:, None], tl.full(b.shape, 1 - SMOOTHING, b.dtype), 0.0)
    if SMOOTHING != 0:
        b_wanted += tl.full(b.shape, SMOOTHING, b.dtype) / n_cols
    b_grad = (exponential(b - r_top[:, None]) * (1 / r_sum)[:, None] - b_wanted) * (r_poison * scale)[:, None]
    return tl.where(counted[:, None] & m_cols[None, :], b_grad, 0.0)


@triton.jit
def load_scale(p_grad_loss, p_grad_losses, p_counted, HEAD: tl.constexpr, MIXTURES: tl.constexpr):
    """The upstream gradient of the mean cross entropy of a head, divided by the number of counted rows."""
    counted = tl.load(p_counted)
    scale = tl.zeros((), counted.dtype)
    if p_grad_loss is not None:
        if HEAD < MIXTURES:
            scale += tl.load(p_grad_loss) / MIXTURES
        else:
            scale += tl.load(p_grad_loss)
    if p_grad_losses is not None:
        scale += tl.load(p_grad_losses + HEAD)
    return scale / counted


@triton.jit
def store_live(p, r_factor, r_live, m_rows):
    """Stores a factor, exactly zero for a dead row even if its partner is not finite."""
    tl.store(p, tl.where(r_live == 0, 0.0, r_factor), mask=m_rows)


@triton.jit(do_not_specialize=["n_rows", "n_all_rows", "ignore_index"])
def head_coefficients_kernel(
    p_grad_loss,  # () or None
    p_grad_losses,  # (P + M,) or None
    p_grad_logits,  # P + M of (B, C) or None
    p_projected,  # (P, 2, all B, C)
    p_unimodal,  # M of (B, C)
    p_stats,  # (P, 3, all B)
    p_biases,  # P of (C,) or None
    p_target,  # (B,)
    p_strength,  # (2P,)
    p_counted,  # ()
    p_of_logits,  # (P + M, B, C) dZ and dU
    p_rows,  # (P, 8, B) z from x and y; the gradients of x and y from dZ W; that of x from x and y, that of y from x and y
    target_row,
    n_rows,
    n_all_rows,
    n_classes,
    ignore_index,
    MODALITIES: tl.constexpr,
    PAIRS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of all logits, and the row factors of the feature gradients, for one chunk of rows.

    Pointers start at the chunk's first row. Saved tensors have the stride of all rows ("all B"); outputs have that of the
    chunk.
    """
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    P: tl.constexpr = len(PAIRS)
    o_classes = tl.arange(0, BLOCK_C)
    m_classes = o_classes < n_classes
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    r_target, counted, r_poison = load_labels(p_target, target_row, o_rows, m_rows, n_classes, ignore_index)
    r_poison = r_poison.to(DTYPE)
    for head in tl.static_range(P + MODALITIES):
        if head < P:
            r_x_norm, r_y_norm, r_c = load_stats(pair_stats(p_stats, n_all_rows, head), o_rows, m_rows, n_all_rows)
            r_w = tl.zeros((BLOCK_B,), DTYPE) + tl.load(p_strength + 2 * head)
            r_p, _, r_p_dc = slerp(r_w, r_c, STRENGTH=True)
            r_q, _, r_q_dc = slerp(1 - r_w, r_c, STRENGTH=True)
            r_x_inverse = 1 / divisor(r_x_norm, EPS)
            r_y_inverse = 1 / divisor(r_y_norm, EPS)
            r_z_x, r_z_y = r_p * r_x_inverse, r_q * r_y_inverse
            p_a = matrix_of(p_projected, n_all_rows, n_classes, 2 * head)
            p_v = matrix_of(p_projected, n_all_rows, n_classes, 2 * head + 1)
            b_a = load_block(p_a, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
            b_v = load_block(p_v, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
            b_bias = load_bias(p_biases[head], o_classes, n_classes, DTYPE)
            b = r_z_x[:, None] * b_a + r_z_y[:, None] * b_v + b_bias[None, :]
        else:
            b = load_block(p_unimodal[head - P], n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        scale = load_scale(p_grad_loss, p_grad_losses, p_counted, head, P)
        b_g = logit_gradient(b, o_classes, m_classes, n_classes, r_target, counted, r_poison, scale, SMOOTHING)
        if p_grad_logits[head] is not None:
            b_g += load_block(p_grad_logits[head], n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        store_block(matrix_of(p_of_logits, n_rows, n_classes, head), b_g, o_rows, m_rows, o_classes, n_classes)
        if head < P:
            r_gx = tl.sum(b_g * b_a, axis=1) * r_x_inverse
            r_gy = tl.sum(b_g * b_v, axis=1) * r_y_inverse
            r_kappa = r_p_dc * r_gx + r_q_dc * r_gy
            _, _, r_c = gap_of(r_c)
            r_x_live = live_inverse_norm(r_x_norm, EPS)
            r_y_live = live_inverse_norm(r_y_norm, EPS)
            o_stats = n_rows.to(tl.int64)
            p_factors = p_rows + 8 * head * o_stats + o_rows
            tl.store(p_factors, r_z_x, mask=m_rows)
            tl.store(p_factors + o_stats, r_z_y, mask=m_rows)
            store_live(p_factors + 2 * o_stats, r_p * r_x_live, r_x_live, m_rows)
            store_live(p_factors + 3 * o_stats, r_q * r_y_live, r_y_live, m_rows)
            store_live(p_factors + 4 * o_stats, -(r_p * r_gx + r_kappa * r_c) * r_x_live * r_x_live, r_x_live, m_rows)
            store_live(p_factors + 5 * o_stats, r_kappa * r_x_live * r_y_inverse, r_x_live, m_rows)
            store_live(p_factors + 6 * o_stats, r_kappa * r_x_inverse * r_y_live, r_y_live, m_rows)
            store_live(p_factors + 7 * o_stats, -(r_q * r_gy + r_kappa * r_c) * r_y_live * r_y_live, r_y_live, m_rows)
