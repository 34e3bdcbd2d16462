"""Kernels of the head step that work on rows of C numbers: probe, rebalance, losses, gradients of the logits."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ._rows import cosine, divisor, live_inverse_norm, slerp, square_root
from ._tiles import block_rows, load_block, store_block, sum_of_parts
from .divergence import row_kl, softmax_parts


@triton.jit
def load_bias(p_bias, o_cols, n_cols, DTYPE: tl.constexpr):
    """(BLOCK_C,), zeros where there is none."""
    if p_bias is None:
        b_bias = tl.zeros(o_cols.shape, DTYPE)
    else:
        b_bias = tl.load(p_bias + o_cols, mask=o_cols < n_cols, other=0.0).to(DTYPE)
    return b_bias


@triton.jit
def load_stats(p_stats, o_rows, m_rows, n_rows):
    """‖x‖, ‖y‖ and c of rows."""
    o_stats = n_rows.to(tl.int64)
    r_x_norm = tl.load(p_stats + o_rows, mask=m_rows, other=1.0)
    r_y_norm = tl.load(p_stats + o_stats + o_rows, mask=m_rows, other=1.0)
    return r_x_norm, r_y_norm, tl.load(p_stats + 2 * o_stats + o_rows, mask=m_rows, other=1.0)


@triton.jit
def row_stats(r_xx, r_yy, r_xy, p_stats, o_rows, m_rows, n_rows, EPS: tl.constexpr):
    """‖x‖, ‖y‖ and c from the inner products, stored as well."""
    r_x_norm = square_root(r_xx)
    r_y_norm = square_root(r_yy)
    r_c = cosine(r_xx, r_yy, r_xy, EPS)
    o_stats = n_rows.to(tl.int64)
    tl.store(p_stats + o_rows, r_x_norm, mask=m_rows)
    tl.store(p_stats + o_stats + o_rows, r_y_norm, mask=m_rows)
    tl.store(p_stats + 2 * o_stats + o_rows, r_c, mask=m_rows)
    return r_x_norm, r_y_norm, r_c


@triton.jit
def mixed_logits(b_a, b_v, b_bias, r_x_norm, r_y_norm, r_c, weight, m_cols, EPS: tl.constexpr):
    """S(w,c) A/‖x‖ + S(1-w,c) V/‖y‖ + b, and -∞ beyond the last class."""
    r_w = tl.zeros(r_c.shape, r_c.dtype) + weight
    r_p, _, _ = slerp(r_w, r_c)
    r_q, _, _ = slerp(1 - r_w, r_c)
    r_p /= divisor(r_x_norm, EPS)
    r_q /= divisor(r_y_norm, EPS)
    return tl.where(m_cols[None, :], r_p[:, None] * b_a + r_q[:, None] * b_v + b_bias[None, :], -float("inf"))


@triton.jit
def load_labels(p_target, target_row, o_rows, m_rows, n_cols, ignore_index):
    """Labels, which rows count, and 1 or, for a label out of range, NaN. A row beyond the last does not count."""
    r_target = tl.load(p_target + o_rows * target_row, mask=m_rows, other=0)
    counted = m_rows & (r_target != ignore_index)
    wrong = counted & ((r_target < 0) | (r_target >= n_cols))
    return r_target, counted, tl.where(wrong, float("nan"), 1.0)


@triton.jit
def cross_entropy(b, o_cols, m_cols, n_cols, r_target, counted, r_poison, SMOOTHING: tl.constexpr):
    """-(1-ε) log P_t - ε/C Σ log P of rows, zero where they do not count."""
    b = tl.where(m_cols[None, :], b, -float("inf"))
    r_top, r_sum = softmax_parts(b)
    b_below = r_top[:, None] - b
    r_log = tl.log(r_sum)
    r_loss = tl.sum(tl.where(o_cols[None, :] == r_target[:, None], b_below, 0.0), axis=1) + r_log
    if SMOOTHING != 0:
        r_mean = tl.sum(tl.where(m_cols[None, :], b_below, 0.0), axis=1) / n_cols
        r_loss = (1 - SMOOTHING) * r_loss + SMOOTHING * (r_mean + r_log)
    return tl.where(counted, r_loss * r_poison, 0.0)


@triton.jit
def logit_gradient(b, o_cols, m_cols, n_cols, r_target, counted, r_poison, scale, SMOOTHING: tl.constexpr):
    """scale (P - (1-ε) onehot - ε/C) of rows, zero where they do not count and beyond the last class."""
    b = tl.where(m_cols[None, :], b, -float("inf"))
    r_top, r_sum = softmax_parts(b)
    # a bare constant beside another would be a float32, in a float64 kernel too
    b_wanted = tl.where(o_cols[None, :] == r_target[:, None], tl.full(b.shape, 1 - SMOOTHING, b.dtype), 0.0)
    if SMOOTHING != 0:
        b_wanted += tl.full(b.shape, SMOOTHING, b.dtype) / n_cols
    b_grad = (tl.exp(b - r_top[:, None]) / r_sum[:, None] - b_wanted) * (r_poison * scale)[:, None]
    return tl.where(counted[:, None] & m_cols[None, :], b_grad, 0.0)


@triton.jit
def add_bias(p_bias, p_u, p_logits, b_u, o_rows, m_rows, o_classes, n_classes):
    """A product of the library completed to logits, in place and, where they are narrower, beside it."""
    b_u += load_bias(p_bias, o_classes, n_classes, b_u.dtype)[None, :]
    store_block(p_u, b_u, o_rows, m_rows, o_classes, n_classes)
    if p_logits is not None:
        store_block(p_logits, b_u, o_rows, m_rows, o_classes, n_classes)
    return b_u


@triton.jit(do_not_specialize=["n_rows"])
def head_probe_kernel(
    p_x,  # (B, D), or None, as y: then row statistics are there, and u_x and u_y have their bias
    p_y,
    p_bias_x,  # (C,) or None, as the two below
    p_bias_y,
    p_bias_mix,
    p_weight,  # () λ
    p_stats,  # (3, B)
    p_a,  # (B, C) X W_mᵀ
    p_v,  # (B, C) Y W_mᵀ
    p_u_x,  # (B, C) X W_xᵀ
    p_u_y,
    p_logits_x,  # (B, C) or None: a narrower copy, as the one below
    p_logits_y,
    p_kl_parts,  # (programs, 2)
    x_row,
    x_col,
    y_row,
    y_col,
    n_rows,
    n_cols,
    n_classes,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """KL of either modality from the mixture probed with λ; before that, where a library made the projections, the rest."""
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    o_classes = tl.arange(0, BLOCK_C)
    m_classes = o_classes < n_classes
    weight = tl.load(p_weight)
    r_kl_x = tl.zeros((BLOCK_B,), DTYPE)
    r_kl_y = tl.zeros((BLOCK_B,), DTYPE)
    for i_rows in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_B), tl.num_programs(0)):
        o_rows, m_rows = block_rows(n_rows, i_rows, BLOCK_B)
        if p_x is None:
            r_x_norm, r_y_norm, r_c = load_stats(p_stats, o_rows, m_rows, n_rows)
        else:
            o_cols = tl.arange(0, BLOCK_D)
            b_xx = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
            b_yy = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
            b_xy = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
            for i_col in range(0, n_cols, BLOCK_D):
                b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
                b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
                b_xx += b_x * b_x
                b_yy += b_y * b_y
                b_xy += b_x * b_y
            r_xx, r_yy, r_xy = tl.sum(b_xx, axis=1), tl.sum(b_yy, axis=1), tl.sum(b_xy, axis=1)
            r_x_norm, r_y_norm, r_c = row_stats(r_xx, r_yy, r_xy, p_stats, o_rows, m_rows, n_rows, EPS)
        b_a = load_block(p_a, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        b_v = load_block(p_v, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        b_bias = load_bias(p_bias_mix, o_classes, n_classes, DTYPE)
        b_z = mixed_logits(b_a, b_v, b_bias, r_x_norm, r_y_norm, r_c, weight, m_classes, EPS)
        r_z_top, r_z_sum = softmax_parts(b_z)
        b_u = load_block(p_u_x, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        if p_x is not None:
            b_u = add_bias(p_bias_x, p_u_x, p_logits_x, b_u, o_rows, m_rows, o_classes, n_classes)
        r_kl_x += tl.where(m_rows, row_kl(b_u, b_z, m_classes, r_z_top, r_z_sum), 0.0)
        b_u = load_block(p_u_y, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        if p_x is not None:
            b_u = add_bias(p_bias_y, p_u_y, p_logits_y, b_u, o_rows, m_rows, o_classes, n_classes)
        r_kl_y += tl.where(m_rows, row_kl(b_u, b_z, m_classes, r_z_top, r_z_sum), 0.0)
    tl.store(p_kl_parts + 2 * tl.program_id(0), tl.sum(r_kl_x, axis=0))
    tl.store(p_kl_parts + 2 * tl.program_id(0) + 1, tl.sum(r_kl_y, axis=0))


@triton.jit
def store_losses(p_loss, p_losses, p_counted, mix, x, y, counted):
    mix, x, y = mix / counted, x / counted, y / counted
    tl.store(p_losses, mix)
    tl.store(p_losses + 1, x)
    tl.store(p_losses + 2, y)
    tl.store(p_loss, mix + x + y)
    tl.store(p_counted, counted)


@triton.jit(do_not_specialize=["n_rows", "n_parts", "ignore_index"])
def head_rebalance_kernel(
    p_a,  # (B, C)
    p_v,  # (B, C)
    p_u_x,  # (B, C)
    p_u_y,  # (B, C)
    p_stats,  # (3, B)
    p_bias_mix,  # (C,) or None
    p_target,  # (B,)
    p_kl_parts,  # (n_parts, 2)
    p_kl,  # (2,) or None where it is what p_kl_parts holds
    p_strength,  # (2,)
    p_logits_mix,  # (B, C)
    p_loss_parts,  # (programs, 4) or None for a single program, which stores the losses themselves
    p_loss,  # ()
    p_losses,  # (3,)
    p_counted,  # ()
    target_row,
    n_rows,
    n_classes,
    n_parts,
    ignore_index,
    SMOOTHING: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ω from the KL sums, the logits of the mixture with it, and the cross entropies of mixture, x and y."""
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    o_classes = tl.arange(0, BLOCK_C)
    m_classes = o_classes < n_classes
    kl_x = sum_of_parts(p_kl_parts, n_parts, 2, 0)
    kl_y = sum_of_parts(p_kl_parts, n_parts, 2, 1)
    # as in strength_weights: zeros share everything, an infinite KL gets nothing, two infinite are equal, a NaN spreads
    smallest = tl.where(kl_y < kl_x, kl_y, kl_x)
    share_x = tl.where(kl_x == smallest, 1.0, smallest / kl_x)
    share_y = tl.where(kl_y == smallest, 1.0, smallest / kl_y)
    weight = share_x / (share_x + share_y)
    if tl.program_id(0) == 0:
        tl.store(p_strength, weight)
        tl.store(p_strength + 1, share_y / (share_x + share_y))
        if p_kl is not None:
            tl.store(p_kl, kl_x)
            tl.store(p_kl + 1, kl_y)
    r_mix = tl.zeros((BLOCK_B,), DTYPE)
    r_x = tl.zeros((BLOCK_B,), DTYPE)
    r_y = tl.zeros((BLOCK_B,), DTYPE)
    r_counted = tl.zeros((BLOCK_B,), DTYPE)
    for i_rows in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_B), tl.num_programs(0)):
        o_rows, m_rows = block_rows(n_rows, i_rows, BLOCK_B)
        r_target, counted, r_poison = load_labels(p_target, target_row, o_rows, m_rows, n_classes, ignore_index)
        r_poison = r_poison.to(DTYPE)
        r_x_norm, r_y_norm, r_c = load_stats(p_stats, o_rows, m_rows, n_rows)
        b_a = load_block(p_a, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        b_v = load_block(p_v, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        b_bias = load_bias(p_bias_mix, o_classes, n_classes, DTYPE)
        b_z = mixed_logits(b_a, b_v, b_bias, r_x_norm, r_y_norm, r_c, weight, m_classes, EPS)
        store_block(p_logits_mix, b_z, o_rows, m_rows, o_classes, n_classes)
        r_mix += cross_entropy(b_z, o_classes, m_classes, n_classes, r_target, counted, r_poison, SMOOTHING)
        b_u = load_block(p_u_x, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        r_x += cross_entropy(b_u, o_classes, m_classes, n_classes, r_target, counted, r_poison, SMOOTHING)
        b_u = load_block(p_u_y, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
        r_y += cross_entropy(b_u, o_classes, m_classes, n_classes, r_target, counted, r_poison, SMOOTHING)
        r_counted += counted.to(DTYPE)
    mix, x, y = tl.sum(r_mix, axis=0), tl.sum(r_x, axis=0), tl.sum(r_y, axis=0)
    counted_here = tl.sum(r_counted, axis=0)
    if p_loss_parts is None:
        store_losses(p_loss, p_losses, p_counted, mix, x, y, counted_here)
    else:
        p_parts = p_loss_parts + 4 * tl.program_id(0)
        tl.store(p_parts, mix)
        tl.store(p_parts + 1, x)
        tl.store(p_parts + 2, y)
        tl.store(p_parts + 3, counted_here)


@triton.jit(do_not_specialize=["n_parts"])
def head_losses_kernel(
    p_loss_parts,  # (n_parts, 4)
    p_loss,  # ()
    p_losses,  # (3,)
    p_counted,  # ()
    n_parts,
):
    mix = sum_of_parts(p_loss_parts, n_parts, 4, 0)
    x = sum_of_parts(p_loss_parts, n_parts, 4, 1)
    y = sum_of_parts(p_loss_parts, n_parts, 4, 2)
    store_losses(p_loss, p_losses, p_counted, mix, x, y, sum_of_parts(p_loss_parts, n_parts, 4, 3))


@triton.jit
def load_scale(p_grad_loss, p_grad_losses, p_counted, HEAD: tl.constexpr):
    """What came to the mean cross entropy of a head, over the rows that count."""
    counted = tl.load(p_counted)
    scale = tl.zeros((), counted.dtype)
    if p_grad_loss is not None:
        scale += tl.load(p_grad_loss)
    if p_grad_losses is not None:
        scale += tl.load(p_grad_losses + HEAD)
    return scale / counted


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def head_coefficients_kernel(
    p_grad_loss,  # () or None
    p_grad_losses,  # (3,) or None
    p_grad_mix,  # (B, C) or None, as the two below
    p_grad_logits_x,
    p_grad_logits_y,
    p_a,  # (B, C)
    p_v,  # (B, C)
    p_u_x,  # (B, C)
    p_u_y,  # (B, C)
    p_stats,  # (3, B)
    p_bias_mix,  # (C,) or None
    p_target,  # (B,)
    p_strength,  # (2,)
    p_counted,  # ()
    p_dz,  # (B, C), as the two below
    p_du_x,
    p_du_y,
    p_rows,  # (6, B) z from x and y; of the gradient of x what comes of x and of y; of that of y of x and of y
    target_row,
    n_rows,
    n_classes,
    ignore_index,
    SMOOTHING: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of all logits, and the row factors of the gradients of the features."""
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    o_classes = tl.arange(0, BLOCK_C)
    m_classes = o_classes < n_classes
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    r_target, counted, r_poison = load_labels(p_target, target_row, o_rows, m_rows, n_classes, ignore_index)
    r_poison = r_poison.to(DTYPE)
    r_x_norm, r_y_norm, r_c = load_stats(p_stats, o_rows, m_rows, n_rows)
    r_w = tl.zeros((BLOCK_B,), DTYPE) + tl.load(p_strength)
    r_p, _, r_p_dc = slerp(r_w, r_c)
    r_q, _, r_q_dc = slerp(1 - r_w, r_c)
    r_x_inverse = 1 / divisor(r_x_norm, EPS)
    r_y_inverse = 1 / divisor(r_y_norm, EPS)
    r_z_x, r_z_y = r_p * r_x_inverse, r_q * r_y_inverse
    b_a = load_block(p_a, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
    b_v = load_block(p_v, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
    b_z = r_z_x[:, None] * b_a + r_z_y[:, None] * b_v + load_bias(p_bias_mix, o_classes, n_classes, DTYPE)[None, :]
    scale = load_scale(p_grad_loss, p_grad_losses, p_counted, 0)
    b_g = logit_gradient(b_z, o_classes, m_classes, n_classes, r_target, counted, r_poison, scale, SMOOTHING)
    if p_grad_mix is not None:
        b_g += load_block(p_grad_mix, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
    store_block(p_dz, b_g, o_rows, m_rows, o_classes, n_classes)
    r_gx = tl.sum(b_g * b_a, axis=1) * r_x_inverse
    r_gy = tl.sum(b_g * b_v, axis=1) * r_y_inverse
    r_kappa = r_p_dc * r_gx + r_q_dc * r_gy
    r_x_live = live_inverse_norm(r_x_norm, EPS)
    r_y_live = live_inverse_norm(r_y_norm, EPS)
    o_stats = n_rows.to(tl.int64)
    tl.store(p_rows + o_rows, r_z_x, mask=m_rows)
    tl.store(p_rows + o_stats + o_rows, r_z_y, mask=m_rows)
    tl.store(p_rows + 2 * o_stats + o_rows, -(r_p * r_gx + r_kappa * r_c) * r_x_live * r_x_live, mask=m_rows)
    tl.store(p_rows + 3 * o_stats + o_rows, r_kappa * r_x_live * r_y_inverse, mask=m_rows)
    tl.store(p_rows + 4 * o_stats + o_rows, r_kappa * r_x_inverse * r_y_live, mask=m_rows)
    tl.store(p_rows + 5 * o_stats + o_rows, -(r_q * r_gy + r_kappa * r_c) * r_y_live * r_y_live, mask=m_rows)

    scale = load_scale(p_grad_loss, p_grad_losses, p_counted, 1)
    b_u = load_block(p_u_x, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
    b_g = logit_gradient(b_u, o_classes, m_classes, n_classes, r_target, counted, r_poison, scale, SMOOTHING)
    if p_grad_logits_x is not None:
        b_g += load_block(p_grad_logits_x, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
    store_block(p_du_x, b_g, o_rows, m_rows, o_classes, n_classes)

    scale = load_scale(p_grad_loss, p_grad_losses, p_counted, 2)
    b_u = load_block(p_u_y, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
    b_g = logit_gradient(b_u, o_classes, m_classes, n_classes, r_target, counted, r_poison, scale, SMOOTHING)
    if p_grad_logits_y is not None:
        b_g += load_block(p_grad_logits_y, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
    store_block(p_du_y, b_g, o_rows, m_rows, o_classes, n_classes)
