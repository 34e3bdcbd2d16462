"""`normalize` and `geodesic_mixup`: kernels and launchers, forward and backward."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .row_math import (
    NEAR_ANTIPODE,
    cosine,
    divisor,
    gap_of,
    live_inverse_norm,
    no_longer_than_one,
    saved_cosine,
    scale_rows,
    slerp,
    square_root,
)
from .tiling import block_rows, load_block, on_device_of, store_block, tiling

# eps is a constant of the kernels: Triton passes float arguments as float32, even to a float64 kernel.


@triton.jit(do_not_specialize=["n_rows"])
def normalize_forward_kernel(
    p_x,  # (B, D)
    p_out,  # (B, D)
    p_norm,  # (B,)
    x_row,
    x_col,
    n_rows,
    n_cols,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    DTYPE: tl.constexpr = p_norm.dtype.element_ty
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    o_cols = tl.arange(0, BLOCK_D)
    if WHOLE:
        b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        r_norm = square_root(tl.sum(b_x * b_x, axis=1))
        store_block(p_out, b_x * (1 / divisor(r_norm, EPS))[:, None], o_rows, m_rows, o_cols, n_cols)
    else:
        b_xx = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
        for i_col in range(0, n_cols, BLOCK_D):
            b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
            b_xx += b_x * b_x
        r_norm = square_root(tl.sum(b_xx, axis=1))
        r_inverse = 1 / divisor(r_norm, EPS)
        for i_col in range(0, n_cols, BLOCK_D):  # rows that do not fit in registers are read a second time
            b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
            store_block(p_out, b_x * r_inverse[:, None], o_rows, m_rows, i_col + o_cols, n_cols)
    tl.store(p_norm + o_rows, r_norm, mask=m_rows)


@triton.jit
def selected(b_g):
    """Whether a row of the incoming gradient is not all zero. Where it is, the gradient of the row is exactly zero, even if the
    row is not finite."""
    return tl.sum((b_g != 0).to(tl.int32), axis=1) != 0  # as a maximum, it made ptxas spill for sm_80


@triton.jit
def normalize_gradient(b_g, b_unit, r_gx, r_live):
    """(g - ⟨g, x̂⟩ x̂) / ‖x‖"""
    return scale_rows(b_g - r_gx[:, None] * b_unit, r_live)


@triton.jit(do_not_specialize=["n_rows"])
def normalize_backward_kernel(
    p_grad,  # (B, D)
    p_x,  # (B, D)
    p_norm,  # (B,)
    p_grad_x,  # (B, D)
    grad_row,
    grad_col,
    x_row,
    x_col,
    n_rows,
    n_cols,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    DTYPE: tl.constexpr = p_norm.dtype.element_ty
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    o_cols = tl.arange(0, BLOCK_D)
    r_norm = tl.load(p_norm + o_rows, mask=m_rows, other=1.0)
    r_inverse = 1 / divisor(r_norm, EPS)
    r_live = live_inverse_norm(r_norm, EPS)
    if WHOLE:
        b_g = load_block(p_grad, grad_row, grad_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        r_live = tl.where(selected(b_g), r_live, 0.0)
        b_unit = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE) * r_inverse[:, None]
        r_gx = tl.sum(b_g * b_unit, axis=1)
        store_block(p_grad_x, normalize_gradient(b_g, b_unit, r_gx, r_live), o_rows, m_rows, o_cols, n_cols)
    else:
        b_gx = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
        r_any = tl.full((BLOCK_B,), 0, tl.int1)
        for i_col in range(0, n_cols, BLOCK_D):
            b_g = load_block(p_grad, grad_row, grad_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
            b_unit = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE) * r_inverse[:, None]
            b_gx += b_g * b_unit
            r_any = r_any | selected(b_g)
        r_gx = tl.sum(b_gx, axis=1)
        r_live = tl.where(r_any, r_live, 0.0)
        for i_col in range(0, n_cols, BLOCK_D):
            b_g = load_block(p_grad, grad_row, grad_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
            b_unit = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE) * r_inverse[:, None]
            store_block(p_grad_x, normalize_gradient(b_g, b_unit, r_gx, r_live), o_rows, m_rows, i_col + o_cols, n_cols)


@triton.jit
def sum_length(
    p_x,
    p_y,
    x_row,
    x_col,
    y_row,
    y_col,
    r_x_divisor,
    r_y_divisor,
    o_rows,
    m_rows,
    n_cols,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """‖x̂ + ŷ‖² of rows, which are read once more."""
    DTYPE: tl.constexpr = r_x_divisor.dtype
    r_uu = tl.zeros((BLOCK_B,), DTYPE)
    for i_col in range(0, n_cols, BLOCK_D):
        o_cols = i_col + tl.arange(0, BLOCK_D)
        b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        b_u = b_x * (1 / r_x_divisor)[:, None] + b_y * (1 / r_y_divisor)[:, None]
        r_uu += tl.sum(b_u * b_u, axis=1)  # not once at the end: a tile of sums spilled registers
    return r_uu


@triton.jit(do_not_specialize=["n_rows"])
def geodesic_mixup_forward_kernel(
    p_x,  # (B, D)
    p_y,  # (B, D)
    p_weight,  # (B,)
    p_z,  # (B, D)
    p_stats,  # (3, B)
    x_row,
    x_col,
    y_row,
    y_col,
    weight_row,
    n_rows,
    n_cols,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
    KNOWN: tl.constexpr,  # whether p_stats already holds the statistics
):
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    o_cols = tl.arange(0, BLOCK_D)
    r_w = tl.load(p_weight + o_rows * weight_row, mask=m_rows, other=0.0).to(DTYPE)
    o_stats = n_rows.to(tl.int64)
    if WHOLE and not KNOWN:
        b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
    if KNOWN:
        r_x_norm = tl.load(p_stats + o_rows, mask=m_rows, other=1.0)
        r_y_norm = tl.load(p_stats + o_stats + o_rows, mask=m_rows, other=1.0)
        r_c = tl.load(p_stats + 2 * o_stats + o_rows, mask=m_rows, other=1.0)
        r_x_divisor, r_y_divisor = divisor(r_x_norm, EPS), divisor(r_y_norm, EPS)
    else:
        if WHOLE:
            r_xx = tl.sum(b_x * b_x, axis=1)
            r_yy = tl.sum(b_y * b_y, axis=1)
            r_xy = tl.sum(b_x * b_y, axis=1)
        else:
            b_xx = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
            b_yy = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
            b_xy = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
            for i_col in range(0, n_cols, BLOCK_D):
                b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
                b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
                b_xx += b_x * b_x
                b_yy += b_y * b_y
                b_xy += b_x * b_y
            r_xx = tl.sum(b_xx, axis=1)
            r_yy = tl.sum(b_yy, axis=1)
            r_xy = tl.sum(b_xy, axis=1)
        r_x_norm = square_root(r_xx)
        r_y_norm = square_root(r_yy)
        r_x_divisor, r_y_divisor = divisor(r_x_norm, EPS), divisor(r_y_norm, EPS)
        r_c = cosine(r_xx, r_yy, r_xy, EPS)
        if tl.min(r_c, axis=0) < NEAR_ANTIPODE:
            if WHOLE:
                b_u = b_x * (1 / r_x_divisor)[:, None] + b_y * (1 / r_y_divisor)[:, None]
                r_uu = tl.sum(b_u * b_u, axis=1)
            else:
                r_uu = sum_length(
                    p_x, p_y, x_row, x_col, y_row, y_col, r_x_divisor, r_y_divisor, o_rows, m_rows, n_cols, BLOCK_B, BLOCK_D
                )
            r_c = saved_cosine(r_c, r_uu, r_x_norm, r_y_norm, EPS)
        tl.store(p_stats + o_rows, r_x_norm, mask=m_rows)
        tl.store(p_stats + o_stats + o_rows, r_y_norm, mask=m_rows)
        tl.store(p_stats + 2 * o_stats + o_rows, r_c, mask=m_rows)
    r_p, _, _ = slerp(r_w, r_c)
    r_q, _, _ = slerp(1 - r_w, r_c)
    r_p /= r_x_divisor
    r_q /= r_y_divisor
    if WHOLE and KNOWN:  # after the coefficients: beside them, the rows spilled registers for sm_100
        b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
    if WHOLE:
        b_z = r_p[:, None] * b_x + r_q[:, None] * b_y
        r_shorter = no_longer_than_one(tl.sum(b_z * b_z, axis=1), r_c)
        store_block(p_z, b_z * r_shorter[:, None], o_rows, m_rows, o_cols, n_cols)
    else:
        r_shorter = tl.full((BLOCK_B,), 1.0, DTYPE)
        if tl.min(r_c, axis=0) < NEAR_ANTIPODE:
            b_zz = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
            for i_col in range(0, n_cols, BLOCK_D):
                b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
                b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
                b_z = r_p[:, None] * b_x + r_q[:, None] * b_y
                b_zz += b_z * b_z
            r_shorter = no_longer_than_one(tl.sum(b_zz, axis=1), r_c)
        for i_col in range(0, n_cols, BLOCK_D):  # rows that do not fit in registers are read a second time
            b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
            b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
            b_z = (r_p[:, None] * b_x + r_q[:, None] * b_y) * r_shorter[:, None]
            store_block(p_z, b_z, o_rows, m_rows, i_col + o_cols, n_cols)


@triton.jit
def geodesic_mixup_gradient(b_g, b_own, b_other, r_p, r_gp, r_kappa, r_c, r_live):
    """[p g + κ ŷ - (p⟨g,x̂⟩ + κ c) x̂] / ‖x‖ for the gradient of x; with x and y exchanged, the gradient of y."""
    b = r_p[:, None] * b_g + r_kappa[:, None] * b_other - (r_p * r_gp + r_kappa * r_c)[:, None] * b_own
    return scale_rows(b, r_live)


@triton.jit(do_not_specialize=["n_rows"])
def geodesic_mixup_backward_kernel(
    p_grad,  # (B, D)
    p_x,  # (B, D)
    p_y,  # (B, D)
    p_weight,  # (B,)
    p_stats,  # (3, B)
    p_grad_x,  # (B, D) or None
    p_grad_y,  # (B, D) or None
    p_grad_w,  # (B,) or None
    grad_row,
    grad_col,
    x_row,
    x_col,
    y_row,
    y_col,
    weight_row,
    n_rows,
    n_cols,
    EPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    DTYPE: tl.constexpr = p_stats.dtype.element_ty
    o_rows, m_rows = block_rows(n_rows, tl.program_id(0), BLOCK_B)
    o_cols = tl.arange(0, BLOCK_D)
    o_stats = n_rows.to(tl.int64)
    r_w = tl.load(p_weight + o_rows * weight_row, mask=m_rows, other=0.0).to(DTYPE)
    r_x_norm = tl.load(p_stats + o_rows, mask=m_rows, other=1.0)
    r_y_norm = tl.load(p_stats + o_stats + o_rows, mask=m_rows, other=1.0)
    r_c = tl.load(p_stats + 2 * o_stats + o_rows, mask=m_rows, other=1.0)
    r_x_inverse = 1 / divisor(r_x_norm, EPS)
    r_y_inverse = 1 / divisor(r_y_norm, EPS)
    if WHOLE:
        b_g = load_block(p_grad, grad_row, grad_col, o_rows, m_rows, o_cols, n_cols, DTYPE)
        b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, o_cols, n_cols, DTYPE) * r_x_inverse[:, None]
        b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, o_cols, n_cols, DTYPE) * r_y_inverse[:, None]
        r_gx = tl.sum(b_g * b_x, axis=1)
        r_gy = tl.sum(b_g * b_y, axis=1)
        r_any = selected(b_g)
    else:
        b_gx = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
        b_gy = tl.zeros((BLOCK_B, BLOCK_D), DTYPE)
        r_any = tl.full((BLOCK_B,), 0, tl.int1)
        for i_col in range(0, n_cols, BLOCK_D):
            b_g = load_block(p_grad, grad_row, grad_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
            b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE) * r_x_inverse[:, None]
            b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE) * r_y_inverse[:, None]
            b_gx += b_g * b_x
            b_gy += b_g * b_y
            r_any = r_any | selected(b_g)
        r_gx = tl.sum(b_gx, axis=1)
        r_gy = tl.sum(b_gy, axis=1)
    r_p, r_p_ds, r_p_dc = slerp(r_w, r_c)
    r_q, r_q_ds, r_q_dc = slerp(1 - r_w, r_c)
    r_kappa = r_p_dc * r_gx + r_q_dc * r_gy
    _, _, r_c = gap_of(r_c)
    if p_grad_w is not None:
        tl.store(p_grad_w + o_rows, tl.where(r_any, r_gx * r_p_ds - r_gy * r_q_ds, 0.0), mask=m_rows)
    r_x_live = tl.where(r_any, live_inverse_norm(r_x_norm, EPS), 0.0)
    r_y_live = tl.where(r_any, live_inverse_norm(r_y_norm, EPS), 0.0)
    if WHOLE:
        if p_grad_x is not None:
            b = geodesic_mixup_gradient(b_g, b_x, b_y, r_p, r_gx, r_kappa, r_c, r_x_live)
            store_block(p_grad_x, b, o_rows, m_rows, o_cols, n_cols)
        if p_grad_y is not None:
            b = geodesic_mixup_gradient(b_g, b_y, b_x, r_q, r_gy, r_kappa, r_c, r_y_live)
            store_block(p_grad_y, b, o_rows, m_rows, o_cols, n_cols)
    elif (p_grad_x is not None) or (p_grad_y is not None):
        for i_col in range(0, n_cols, BLOCK_D):
            b_g = load_block(p_grad, grad_row, grad_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE)
            b_x = load_block(p_x, x_row, x_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE) * r_x_inverse[:, None]
            b_y = load_block(p_y, y_row, y_col, o_rows, m_rows, i_col + o_cols, n_cols, DTYPE) * r_y_inverse[:, None]
            if p_grad_x is not None:
                b = geodesic_mixup_gradient(b_g, b_x, b_y, r_p, r_gx, r_kappa, r_c, r_x_live)
                store_block(p_grad_x, b, o_rows, m_rows, i_col + o_cols, n_cols)
            if p_grad_y is not None:
                b = geodesic_mixup_gradient(b_g, b_y, b_x, r_q, r_gy, r_kappa, r_c, r_y_live)
                store_block(p_grad_y, b, o_rows, m_rows, i_col + o_cols, n_cols)


def normalize(x: Tensor, eps: float, out: Tensor, norm: Tensor) -> None:
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    tile = tiling(n_cols, norm.dtype)
    with on_device_of(x):
        normalize_forward_kernel[(triton.cdiv(n_rows, tile["BLOCK_B"]),)](
            x, out, norm, *x.stride(), n_rows, n_cols, EPS=eps, **tile
        )


def normalize_backward(grad: Tensor, x: Tensor, norm: Tensor, eps: float, grad_x: Tensor) -> None:
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    tile = tiling(n_cols, norm.dtype)
    with on_device_of(x):
        normalize_backward_kernel[(triton.cdiv(n_rows, tile["BLOCK_B"]),)](
            grad, x, norm.contiguous(), grad_x, *grad.stride(), *x.stride(), n_rows, n_cols, EPS=eps, **tile
        )


def geodesic_mixup(x: Tensor, y: Tensor, weight: Tensor, eps: float, z: Tensor, stats: Tensor) -> None:
    _mix(x, y, weight, eps, z, stats, known=False)


def geodesic_remix(x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float, z: Tensor) -> None:
    _mix(x, y, weight, eps, z, stats.contiguous(), known=True)


def _mix(x: Tensor, y: Tensor, weight: Tensor, eps: float, z: Tensor, stats: Tensor, *, known: bool) -> None:
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    tile = tiling(n_cols, stats.dtype)
    strides = (*x.stride(), *y.stride(), *weight.stride())
    with on_device_of(x):
        geodesic_mixup_forward_kernel[(triton.cdiv(n_rows, tile["BLOCK_B"]),)](
            x, y, weight, z, stats, *strides, n_rows, n_cols, EPS=eps, KNOWN=known, **tile
        )


def geodesic_mixup_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    stats: Tensor,
    eps: float,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    grad_w: Tensor | None,
) -> None:
    n_rows, n_cols = x.shape
    if n_rows == 0:
        return
    tile = tiling(n_cols, stats.dtype)
    strides = (*grad.stride(), *x.stride(), *y.stride(), *weight.stride())
    with on_device_of(x):
        geodesic_mixup_backward_kernel[(triton.cdiv(n_rows, tile["BLOCK_B"]),)](
            grad, x, y, weight, stats.contiguous(), grad_x, grad_y, grad_w, *strides, n_rows, n_cols, EPS=eps, **tile
        )
