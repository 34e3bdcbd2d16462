"""`normalize` and `geodesic_mixup` by their definitions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..convention import ANTIPODE_MARGIN, NEAR_ANTIPODE, SAVED_BELOW, SERIES_BELOW, SERIES_TERMS
from ..dtypes import arithmetic_dtype


class Angle(NamedTuple):
    """θ between two unit vectors, from the saved c (see `saved_cosine`).  (B,) each"""

    c: Tensor  #: clamped
    h: Tensor  #: sin²(θ/2) = (1 - c) / 2
    theta: Tensor
    sine: Tensor  #: sin θ
    clamped: Tensor

    @staticmethod
    def of(saved: Tensor) -> Angle:
        """θ = 2 atan(√(h / (1 - h))) keeps full relative accuracy for small angles, which arccos does not."""
        floor = torch.full_like(saved, -1 + ANTIPODE_MARGIN[saved.dtype])
        near = saved < SAVED_BELOW
        gap = torch.where(near, -1 / torch.where(near, saved, -1), 1 + saved)  # 1 + c
        clamped = gap <= 1 + floor
        c = torch.where(clamped, floor, torch.where(near, gap - 1, saved))
        h, k = ((1 - c) / 2).clamp(min=0), torch.where(clamped, 1 + floor, gap) / 2
        return Angle(c, h, 2 * torch.atan2(h.sqrt(), k.sqrt()), 2 * (h * k).sqrt(), clamped)


def saved_cosine(x_hat: Tensor, y_hat: Tensor, x_norm: Tensor, y_norm: Tensor, eps: float) -> Tensor:
    """c = ⟨x̂, ŷ⟩ as the statistics hold it: below NEAR_ANTIPODE -1 / (1 + c), at most -10.  (B, D) x2, (B,) x2 -> (B,)

    In float32, c near -1 has few digits of 1 + c, which the angle depends on: two at 179.9°. There 1 + c is ‖x̂ + ŷ‖² / 2,
    unless a row is dead, and x̂ or ŷ no unit vector.
    """
    c = (x_hat * y_hat).sum(1)
    gap = torch.where((x_norm > eps) & (y_norm > eps), (x_hat + y_hat).square().sum(1) / 2, 1 + c)
    return torch.where(c < NEAR_ANTIPODE, -1 / gap.clamp(min=0), c)  # rounding can put 1 + c below 0


def slerp_weight(s: Tensor, saved: Tensor) -> Tensor:
    """S(s, c) = sin(sθ) / sin θ with θ = arccos c, analytic at c = 1, where S = s.  (B,), (B,) -> (B,)"""
    angle = Angle.of(saved)
    # `h <= 0` instead of `h > 0`, so that a NaN selects the quotient and not the limit
    return torch.where(angle.h <= 0, s, torch.sin(s * angle.theta) / angle.sine)


def slerp_weight_ds(s: Tensor, saved: Tensor) -> Tensor:
    """∂S/∂s = θ cos(sθ) / sin θ; at c = 1 it is cos(s·0), which is 1 unless s is not finite.  (B,), (B,) -> (B,)"""
    angle = Angle.of(saved)
    cosine = torch.cos(s * angle.theta)
    return torch.where(angle.h <= 0, cosine, angle.theta * cosine / angle.sine)


def slerp_weight_dc(s: Tensor, saved: Tensor) -> Tensor:
    """∂S/∂c = (c sin(sθ) - s cos(sθ) sin θ) / sin³θ, zero where c is clamped.  (B,), (B,) -> (B,)

    Near c = 1 the numerator cancels like θ³. There the series of S(s, c) = s ₂F₁(1-s, 1+s; 3/2; h) is used: with
    a₀ = 1 and aₙ₊₁ = aₙ ((n+1)² - s²) / ((n+1)(n+3/2)), ∂S/∂c = -(s/2) Σ n aₙ hⁿ⁻¹. Beyond s²h = 1, an arc of 2 radians,
    nothing cancels and the series would alternate.
    """
    c, h, theta, sine, clamped = Angle.of(saved)
    closed = (c * torch.sin(s * theta) - s * torch.cos(s * theta) * sine) / sine**3
    series, term = torch.zeros_like(h), torch.ones_like(h)  # aₙ hⁿ⁻¹ stays small where aₙ alone would overflow
    for n in range(SERIES_TERMS[c.dtype]):
        term = term * ((n + 1) ** 2 - s * s) / ((n + 1) * (n + 1.5))
        series = series + (n + 1) * term
        term = term * h
    value = torch.where((h < SERIES_BELOW) & (s * s * h < 1), -0.5 * s * series, closed)
    return torch.where(clamped, torch.zeros_like(c), value)


def row_norm(rows: Tensor) -> Tensor:
    """‖x‖, infinite where the squared length overflows; torch alone would not square a single column.  (B, D) -> (B,)"""
    return rows.norm(dim=1) if rows.shape[1] > 1 else rows.square().sum(1).sqrt()


def inverse_norm(norm: Tensor, eps: float) -> Tensor:
    """1 / max(‖x‖, eps), and NaN for a norm that is not finite, so that the whole row becomes NaN.  (B,) -> (B,)"""
    return torch.where(norm.isfinite(), 1 / norm.clamp(min=eps), torch.full_like(norm, math.nan))


def live_inverse_norm(norm: Tensor, eps: float) -> Tensor:
    """1 / ‖x‖ as the gradient uses it: zero for a dead row, ‖x‖ <= eps.  (B,) -> (B,)"""
    return torch.where(norm <= eps, torch.zeros_like(norm), inverse_norm(norm, eps))


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ = x / max(‖x‖, eps).  (B, D) -> (B, D), norm (B,)"""
    rows = x.to(arithmetic_dtype(x.dtype))
    norm = row_norm(rows)
    return (rows * inverse_norm(norm, eps)[:, None]).to(x.dtype), norm


def normalize_backward(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor]:
    """∂x = (g - ⟨g, x̂⟩ x̂) / ‖x‖, zero for a dead row and for a row with g = 0.  (B, D) x2, (B,) -> (B, D)"""
    g, rows = grad.to(norm.dtype), x.to(norm.dtype)
    unit = rows * inverse_norm(norm, eps)[:, None]
    projected = g - (g * unit).sum(1, keepdim=True) * unit
    return (_where_selected(g, _scale_rows(projected, live_inverse_norm(norm, eps))).to(x.dtype),)


def geodesic_mixup(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z = S(w, c) x̂ + S(1-w, c) ŷ.  (B, D) x2, (B,) -> (B, D), stats (3, B) holding ‖x‖, ‖y‖, saved c"""
    dtype = weight.dtype
    x_hat, x_norm = normalize(x.to(dtype), eps)
    y_hat, y_norm = normalize(y.to(dtype), eps)
    stats = torch.stack([x_norm, y_norm, saved_cosine(x_hat, y_hat, x_norm, y_norm, eps)])
    return (*geodesic_remix(x, y, weight, stats, eps), stats)


def geodesic_remix(x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float) -> tuple[Tensor]:
    """`geodesic_mixup` from statistics that an earlier mixture saved.  (B, D) x2, (B,), (3, B) -> (B, D)"""
    x_norm, y_norm, saved = stats
    x_hat, y_hat = (t.to(stats.dtype) * inverse_norm(norm, eps)[:, None] for t, norm in ((x, x_norm), (y, y_norm)))
    z = slerp_weight(weight, saved)[:, None] * x_hat + slerp_weight(1 - weight, saved)[:, None] * y_hat
    length = z.norm(dim=1, keepdim=True)
    return (torch.where((saved < NEAR_ANTIPODE)[:, None] & (length > 1), z / length, z).to(x.dtype),)


def geodesic_mixup_backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """∂x, ∂y, ∂w of `geodesic_mixup`.  (B, D) x3, (B,), (3, B) -> (B, D), (B, D), (B,)

    κ  = S'(w,c)⟨g,x̂⟩ + S'(1-w,c)⟨g,ŷ⟩
    ∂x = [p g + κ ŷ - (p⟨g,x̂⟩ + κ c) x̂] / ‖x‖        p = S(w,c)
    ∂y = [q g + κ x̂ - (q⟨g,ŷ⟩ + κ c) ŷ] / ‖y‖        q = S(1-w,c)
    ∂w = ⟨g,x̂⟩ ∂S/∂s(w,c) - ⟨g,ŷ⟩ ∂S/∂s(1-w,c)

    All of a row are zero where g is zero, also if the row is not finite.
    """
    x_norm, y_norm, saved = stats
    g = grad.to(stats.dtype)
    x_hat, y_hat = (t.to(stats.dtype) * inverse_norm(norm, eps)[:, None] for t, norm in ((x, x_norm), (y, y_norm)))
    gx, gy = (g * x_hat).sum(1), (g * y_hat).sum(1)
    c, p, q = Angle.of(saved).c, slerp_weight(weight, saved), slerp_weight(1 - weight, saved)
    kappa = slerp_weight_dc(weight, saved) * gx + slerp_weight_dc(1 - weight, saved) * gy
    dx = p[:, None] * g + kappa[:, None] * y_hat - (p * gx + kappa * c)[:, None] * x_hat
    dy = q[:, None] * g + kappa[:, None] * x_hat - (q * gy + kappa * c)[:, None] * y_hat
    dw = gx * slerp_weight_ds(weight, saved) - gy * slerp_weight_ds(1 - weight, saved)
    dx = _where_selected(g, _scale_rows(dx, live_inverse_norm(x_norm, eps)))
    dy = _where_selected(g, _scale_rows(dy, live_inverse_norm(y_norm, eps)))
    return dx.to(x.dtype), dy.to(y.dtype), _where_selected(g, dw[:, None])[:, 0]


def _scale_rows(rows: Tensor, factor: Tensor) -> Tensor:
    """rows · factor, exactly zero where the factor is zero: the gradient of a dead row is zero even if `rows` is not finite."""
    return torch.where(factor[:, None] == 0, torch.zeros_like(rows), rows * factor[:, None])


def _where_selected(grad: Tensor, rows: Tensor) -> Tensor:
    """The rows, exactly zero where the incoming gradient of the row is zero: no 0 · NaN.  (B, D), (B, K) -> (B, K)"""
    return torch.where((grad == 0).all(1, keepdim=True), torch.zeros_like(rows), rows)
