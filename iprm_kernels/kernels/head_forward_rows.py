"""Kernels of the head step's forward pass on rows of C numbers: probe, rebalance, losses."""

# mypy: ignore-errors
# tuples of tiles grow in loops that the compiler unrolls, which type annotations cannot express

from __future__ import annotations

import triton
import triton.language as tl

from .divergence import row_kl
from .geodesic import sum_length
from .row_math import NEAR_ANTIPODE, cosine, divisor, saved_cosine, slerp, softmax_parts, square_root
from .tiling import block_rows, load_block, store_block, sum_of_parts


@triton.jit
def load_bias(p_bias, o_cols, n_cols, DTYPE: tl.constexpr):
    """(BLOCK_C,) bias, zeros if it is None."""
    if p_bias is None:
        b_bias = tl.zeros(o_cols.shape, DTYPE)
    else:
        b_bias = tl.load(p_bias + o_cols, mask=o_cols < n_cols, other=0.0).to(DTYPE)
    return b_bias


@triton.jit
def pair_stats(p_stats, n_rows, PAIR: tl.constexpr):
    """The (3, B) statistics of a pair in (P, 3, B)."""
    return p_stats + 3 * PAIR * n_rows.to(tl.int64)


@triton.jit
def matrix_of(p_matrices, n_rows, n_classes, INDEX: tl.constexpr):
    """One matrix of (..., B, C)."""
    return p_matrices + INDEX * n_rows.to(tl.int64) * n_classes


@triton.jit
def load_stats(p_stats, o_rows, m_rows, n_rows):
    """‖x‖, ‖y‖ and c of rows."""
    o_stats = n_rows.to(tl.int64)
    r_x_norm = tl.load(p_stats + o_rows, mask=m_rows, other=1.0)
    r_y_norm = tl.load(p_stats + o_stats + o_rows, mask=m_rows, other=1.0)
    return r_x_norm, r_y_norm, tl.load(p_stats + 2 * o_stats + o_rows, mask=m_rows, other=1.0)


@triton.jit
def row_stats(r_xx, r_yy, r_xy, p_stats, o_rows, m_rows, n_rows, EPS: tl.constexpr):
    """‖x‖, ‖y‖ and c from the inner products; also stores them."""
    r_x_norm = square_root(r_xx)
    r_y_norm = square_root(r_yy)
    r_c = cosine(r_xx, r_yy, r_xy, EPS)
    o_stats = n_rows.to(tl.int64)
    tl.store(p_stats + o_rows, r_x_norm, mask=m_rows)
    tl.store(p_stats + o_stats + o_rows, r_y_norm, mask=m_rows)
    tl.store(p_stats + 2 * o_stats + o_rows, r_c, mask=m_rows)
    return r_x_norm, r_y_norm, r_c


@triton.jit
def near_antipode(
    r_x_norm,
    r_y_norm,
    r_c,
    p_stats,
    p_features,
    row_strides,
    col_strides,
    o_rows,
    m_rows,
    n_rows,
    n_cols,
    X: tl.constexpr,
    Y: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """c as it is saved. If a row is near the antipode, the features X and Y are read once more and its statistics replaced."""
    # ptxas spilled a word or more with the other width, in float64 for sm_80 and with three modalities for sm_100
    COLUMNS: tl.constexpr = 2 * BLOCK_D if r_c.dtype == tl.float64 or len(p_features) > 2 else BLOCK_D
    if tl.min(r_c, axis=0) < NEAR_ANTIPODE:
        r_uu = sum_length(
            p_features[X],
            p_features[Y],
            row_strides[X],
            col_strides[X],
            row_strides[Y],
            col_strides[Y],
            divisor(r_x_norm, EPS),
            divisor(r_y_norm, EPS),
            o_rows,
            m_rows,
            n_cols,
            BLOCK_B,
            COLUMNS,
        )
        r_c = saved_cosine(r_c, r_uu, r_x_norm, r_y_norm, EPS)
        tl.store(p_stats + 2 * n_rows.to(tl.int64) + o_rows, r_c, mask=m_rows)
    return r_c


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
    """Labels, which rows count, and a factor: 1, or NaN for a label out of range. Rows beyond the last do not count."""
    r_target = tl.load(p_target + o_rows * target_row, mask=m_rows, other=0)
    counted = m_rows & (r_target != ignore_index)
    wrong = counted & ((r_target < 0) | (r_target >= n_cols))
    return r_target, counted, tl.where(wrong, float("nan"), 1.0)


@triton.jit
def cross_entropy(b, o_cols, m_cols, n_cols, r_target, counted, r_poison, SMOOTHING: tl.constexpr):
    """-(1-ε) log P_t - ε/C Σ log P of rows, zero for rows that do not count."""
    b = tl.where(m_cols[None, :], b, -float("inf"))
    r_top, r_sum = softmax_parts(b)
    b_below = r_top[:, None] - b
    r_log = tl.log(r_sum)
    r_loss = tl.sum(tl.where(o_cols[None, :] == r_target[:, None], b_below, 0.0), axis=1) + r_log
    if SMOOTHING != 0:
        r_mean = tl.sum(tl.where(m_cols[None, :], b_below, 0.0), axis=1) / n_cols
        r_loss = (1 - SMOOTHING) * r_loss + SMOOTHING * (r_mean + r_log)
    return tl.where(counted, r_loss * r_poison, 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def head_probe_kernel(
    p_features,  # M of (B, D)
    p_biases,  # P + M of (C,) or None
    p_probing,  # (P,) λ
    p_stats,  # (P, 3, B)
    p_projected,  # (P, 2, B, C) X W_mᵀ and Y W_mᵀ
    p_unimodal,  # M of (B, C) X W_xᵀ
    p_logits,  # M of (B, C), the returned narrower copies, or empty
    p_kl_parts,  # (programs, 2P)
    row_strides,
    col_strides,
    n_rows,
    n_cols,
    n_classes,
    MODALITIES: tl.constexpr,
    PAIRS: tl.constexpr,
    EPS: tl.constexpr,
    PROJECTED: tl.constexpr,  # whether stats are already stored, and the unimodal logits include their bias
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """KL of both modalities of each pair from the mixture probed with λ. If torch computed the projections, the kernel first
    computes the row statistics and adds the biases. Rows near the antipode get their statistics here in either case: within
    the kernel of the projections, this second look at the features spilled registers."""
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    P: tl.constexpr = len(PAIRS)
    o_classes = tl.arange(0, BLOCK_C)
    m_classes = o_classes < n_classes
    r_kl = ()
    for _ in tl.static_range(2 * P):
        r_kl = r_kl + (tl.zeros((BLOCK_B,), DTYPE),)
    for i_rows in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_B), tl.num_programs(0)):
        o_rows, m_rows = block_rows(n_rows, i_rows, BLOCK_B)
        if not PROJECTED:
            b_squares = ()
            for _ in tl.static_range(MODALITIES):
                b_squares = b_squares + (tl.zeros((BLOCK_B, BLOCK_D), DTYPE),)
            b_products = ()
            for _ in tl.static_range(P):
                b_products = b_products + (tl.zeros((BLOCK_B, BLOCK_D), DTYPE),)
            for i_col in range(0, n_cols, BLOCK_D):
                o_cols = i_col + tl.arange(0, BLOCK_D)
                b_features = ()
                b_next = ()
                for m in tl.static_range(MODALITIES):
                    b_x = load_block(p_features[m], row_strides[m], col_strides[m], o_rows, m_rows, o_cols, n_cols, DTYPE)
                    b_features = b_features + (b_x,)
                    b_next = b_next + (b_squares[m] + b_x * b_x,)
                b_squares = b_next
                b_next = ()
                for k in tl.static_range(P):
                    b_next = b_next + (b_products[k] + b_features[PAIRS[k][0]] * b_features[PAIRS[k][1]],)
                b_products = b_next
        b_logits = ()
        for m in tl.static_range(MODALITIES):
            b_u = load_block(p_unimodal[m], n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
            if not PROJECTED:  # computed by torch: the bias is added in place
                b_u += load_bias(p_biases[P + m], o_classes, n_classes, DTYPE)[None, :]
                store_block(p_unimodal[m], b_u, o_rows, m_rows, o_classes, n_classes)
                if len(p_logits) > 0:
                    store_block(p_logits[m], b_u, o_rows, m_rows, o_classes, n_classes)
            b_logits = b_logits + (b_u,)
        r_next = ()
        for k in tl.static_range(P):
            p_pair = pair_stats(p_stats, n_rows, k)
            if PROJECTED:
                r_x_norm, r_y_norm, r_c = load_stats(p_pair, o_rows, m_rows, n_rows)
            else:
                r_xx = tl.sum(b_squares[PAIRS[k][0]], axis=1)
                r_yy = tl.sum(b_squares[PAIRS[k][1]], axis=1)
                r_xy = tl.sum(b_products[k], axis=1)
                r_x_norm, r_y_norm, r_c = row_stats(r_xx, r_yy, r_xy, p_pair, o_rows, m_rows, n_rows, EPS)
            r_c = near_antipode(
                r_x_norm, r_y_norm, r_c, p_pair, p_features, row_strides, col_strides, o_rows, m_rows, n_rows, n_cols,
                PAIRS[k][0], PAIRS[k][1], EPS, BLOCK_B, BLOCK_D,
            )  # fmt: skip
            p_a = matrix_of(p_projected, n_rows, n_classes, 2 * k)
            p_v = matrix_of(p_projected, n_rows, n_classes, 2 * k + 1)
            b_a = load_block(p_a, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
            b_v = load_block(p_v, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
            b_bias = load_bias(p_biases[k], o_classes, n_classes, DTYPE)
            weight = tl.load(p_probing + k)
            b_z = mixed_logits(b_a, b_v, b_bias, r_x_norm, r_y_norm, r_c, weight, m_classes, EPS)
            r_z_top, r_z_sum = softmax_parts(b_z)
            for side in tl.static_range(2):
                r_row = row_kl(b_logits[PAIRS[k][side]], b_z, m_classes, r_z_top, r_z_sum)
                r_next = r_next + (r_kl[2 * k + side] + tl.where(m_rows, r_row, 0.0),)
        r_kl = r_next
    for column in tl.static_range(2 * P):
        tl.store(p_kl_parts + 2 * P * tl.program_id(0) + column, tl.sum(r_kl[column], axis=0))


@triton.jit
def store_losses(p_loss, p_losses, p_counted, sums, counted, PAIRS: tl.constexpr):
    """Mean cross entropies of all heads, and the loss: the mean over the mixtures plus the sum over the modalities."""
    P: tl.constexpr = len(PAIRS)
    loss = tl.zeros((), counted.dtype)
    for head in tl.static_range(len(sums)):
        mean = sums[head] / counted
        tl.store(p_losses + head, mean)
        if head < P:
            loss += mean / P
        else:
            loss += mean
    tl.store(p_loss, loss)
    tl.store(p_counted, counted)


@triton.jit
def measured_weights(p_kl_parts, n_parts, COLUMNS: tl.constexpr, PAIR: tl.constexpr):
    """The KL sums of a pair and its ω, as in strength_weights: two zero or two infinite KL give equal weights, an infinite KL
    gets 0, a NaN makes both NaN."""
    kl_x = sum_of_parts(p_kl_parts, n_parts, COLUMNS, 2 * PAIR)
    kl_y = sum_of_parts(p_kl_parts, n_parts, COLUMNS, 2 * PAIR + 1)
    smallest = tl.where(kl_y < kl_x, kl_y, kl_x)
    share_x = tl.where(kl_x == smallest, 1.0, smallest / kl_x)
    share_y = tl.where(kl_y == smallest, 1.0, smallest / kl_y)
    return kl_x, kl_y, share_x / (share_x + share_y), share_y / (share_x + share_y)


@triton.jit(do_not_specialize=["n_rows", "n_parts", "ignore_index"])
def head_rebalance_kernel(
    p_projected,  # (P, 2, B, C)
    p_unimodal,  # M of (B, C)
    p_stats,  # (P, 3, B)
    p_biases,  # P of (C,) or None
    p_target,  # (B,)
    p_kl_parts,  # (n_parts, 2P)
    p_kl,  # (2P,), or None if p_kl_parts is the sums themselves
    p_strength,  # (2P,)
    p_logits,  # P of (B, C)
    p_loss_parts,  # (programs, P + M + 1), or None for a single program, which stores the losses directly
    p_loss,  # ()
    p_losses,  # (P + M,)
    p_counted,  # ()
    target_row,
    n_rows,
    n_classes,
    n_parts,
    ignore_index,
    MODALITIES: tl.constexpr,
    PAIRS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ω from the KL sums, the logits of the mixtures weighted by ω, and the cross entropies of all heads."""
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    P: tl.constexpr = len(PAIRS)
    o_classes = tl.arange(0, BLOCK_C)
    m_classes = o_classes < n_classes
    weights = ()
    for k in tl.static_range(P):
        kl_x, kl_y, weight_x, weight_y = measured_weights(p_kl_parts, n_parts, 2 * P, k)
        weights = weights + (weight_x,)
        if tl.program_id(0) == 0:
            tl.store(p_strength + 2 * k, weight_x)
            tl.store(p_strength + 2 * k + 1, weight_y)
            if p_kl is not None:
                tl.store(p_kl + 2 * k, kl_x)
                tl.store(p_kl + 2 * k + 1, kl_y)
    r_losses = ()
    for _ in tl.static_range(P + MODALITIES):
        r_losses = r_losses + (tl.zeros((BLOCK_B,), DTYPE),)
    r_counted = tl.zeros((BLOCK_B,), DTYPE)
    for i_rows in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_B), tl.num_programs(0)):
        o_rows, m_rows = block_rows(n_rows, i_rows, BLOCK_B)
        r_next = ()
        for head in tl.static_range(P + MODALITIES):
            if head < P:
                r_x_norm, r_y_norm, r_c = load_stats(pair_stats(p_stats, n_rows, head), o_rows, m_rows, n_rows)
                p_a = matrix_of(p_projected, n_rows, n_classes, 2 * head)
                p_v = matrix_of(p_projected, n_rows, n_classes, 2 * head + 1)
                b_a = load_block(p_a, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
                b_v = load_block(p_v, n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
                b_bias = load_bias(p_biases[head], o_classes, n_classes, DTYPE)
                b = mixed_logits(b_a, b_v, b_bias, r_x_norm, r_y_norm, r_c, weights[head], m_classes, EPS)
            else:
                b = load_block(p_unimodal[head - P], n_classes, 1, o_rows, m_rows, o_classes, n_classes, DTYPE)
            if head == 0:
                r_target, counted, r_poison = load_labels(p_target, target_row, o_rows, m_rows, n_classes, ignore_index)
                r_poison = r_poison.to(DTYPE)
            r_loss = cross_entropy(b, o_classes, m_classes, n_classes, r_target, counted, r_poison, SMOOTHING)
            if head < P:  # after the loss: before it, ptxas spilled a register for sm_90
                store_block(p_logits[head], b, o_rows, m_rows, o_classes, n_classes)
            r_next = r_next + (r_losses[head] + r_loss,)
        r_losses = r_next
        r_counted += counted.to(DTYPE)
    sums = ()
    for head in tl.static_range(P + MODALITIES):
        sums = sums + (tl.sum(r_losses[head], axis=0),)
    counted_here = tl.sum(r_counted, axis=0)
    if p_loss_parts is None:
        store_losses(p_loss, p_losses, p_counted, sums, counted_here, PAIRS)
    else:
        p_parts = p_loss_parts + (P + MODALITIES + 1) * tl.program_id(0)
        for head in tl.static_range(P + MODALITIES):
            tl.store(p_parts + head, sums[head])
        tl.store(p_parts + P + MODALITIES, counted_here)


@triton.jit(do_not_specialize=["n_parts"])
def head_losses_kernel(
    p_loss_parts,  # (n_parts, P + M + 1)
    p_loss,  # ()
    p_losses,  # (P + M,)
    p_counted,  # ()
    n_parts,
    MODALITIES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    HEADS: tl.constexpr = len(PAIRS) + MODALITIES
    sums = ()
    for head in tl.static_range(HEADS):
        sums = sums + (sum_of_parts(p_loss_parts, n_parts, HEADS + 1, head),)
    store_losses(p_loss, p_losses, p_counted, sums, sum_of_parts(p_loss_parts, n_parts, HEADS + 1, HEADS), PAIRS)
