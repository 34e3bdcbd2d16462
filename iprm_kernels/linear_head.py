"""The linear head step in closed form, composed from matrix products and the other operators' kernels.

With x̂ = X/‖x‖, c = ⟨x̂, ŷ⟩, p = S(w, c), q = S(1-w, c) and projections A = X W_mᵀ, V = Y W_mᵀ, Â = A/‖x‖, V̂ = V/‖y‖::

    mixed logits  Z = p Â + q V̂ + b_m          for the probe (w = λ) and, after the KL, for the step (w = ω_x)
    κ   = S'(ω,c) Σ dZ Â + S'(1-ω,c) Σ dZ V̂
    dX  = [p/‖x‖ dZ | dU_x] [W_m ; W_x] + κ/(‖x‖‖y‖) Y - (p Σ dZ Â + κ c)/‖x‖² X        and the same for y
    dW_m = (p/‖x‖ dZ)ᵀ X + (q/‖y‖ dZ)ᵀ Y,   dW_x = dU_xᵀ X,   biases sum the rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import kernels
from .collectives import all_reduce_named
from .reference import (
    arithmetic_dtype,
    inverse_norm,
    live_inverse_norm,
    slerp_weight,
    slerp_weight_dc,
)

EPS = 1e-12  # the smallest length divided by, as in `normalize`
Head = Tensor | None


def linear_head_forward(
    x: Tensor,
    y: Tensor,
    heads: tuple[Tensor, Head, Tensor, Head, Tensor, Head],
    target: Tensor,
    weight: Tensor,
    label_smoothing: float,
    ignore_index: int,
    group: str,
) -> tuple[Tensor, ...]:
    """(B, D) x2, heads of x, y and the mixture, (B,), () -> the fields of StepResult, then A, V (B, C), stats (3, B)"""
    weight_x, bias_x, weight_y, bias_y, weight_mix, bias_mix = heads
    dtype, classes = arithmetic_dtype(x.dtype), weight_x.shape[0]
    a, u_x = (x.to(dtype) @ torch.cat([weight_mix, weight_x]).to(dtype).T).split(classes, dim=1)
    v, u_y = (y.to(dtype) @ torch.cat([weight_mix, weight_y]).to(dtype).T).split(classes, dim=1)
    logits_x, logits_y = _biased(u_x, bias_x), _biased(u_y, bias_y)
    stats = _row_stats(x.to(dtype), y.to(dtype))

    probe = _mix(a, v, stats, weight.to(dtype), bias_mix)
    kl = all_reduce_named(torch.stack([_batch_kl_sum(logits_x, probe), _batch_kl_sum(logits_y, probe)]), group)
    strength = torch.empty_like(kl)  # (2,)
    kernels(x.device).strength_weights(kl, strength)
    logits_mix = _mix(a, v, stats, strength[0], bias_mix)

    losses = torch.stack(
        [_cross_entropy(logits, target, label_smoothing, ignore_index) for logits in (logits_mix, logits_x, logits_y)]
    )
    # outputs may not alias each other: contiguous copies of the column blocks, which the backward pass reads row by row
    logits = tuple(value.to(x.dtype).contiguous() for value in (logits_mix, logits_x, logits_y))
    return losses.sum(), losses, *logits, strength, kl, a.contiguous(), v.contiguous(), stats


def linear_head_backward(
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    y: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    logits: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, y (B, D), then weight (C, D) and bias (C,) of the heads of x, y and the mixture."""
    grad_loss, grad_losses, *grad_logits = grads
    weight_x, weight_y, weight_mix = weights
    strength, a, v, stats = saved
    dtype = stats.dtype
    loss_grads = stats.new_zeros(3) if grad_losses is None else grad_losses
    loss_grads = loss_grads if grad_loss is None else loss_grads + grad_loss
    dz, du_x, du_y = (
        _cross_entropy_backward(value.to(dtype), target, label_smoothing, ignore_index, scale, upstream)
        for value, scale, upstream in zip(logits, loss_grads, grad_logits, strict=True)
    )

    c = stats[2]
    p, q = slerp_weight(strength[0].expand_as(c), c), slerp_weight(1 - strength[0].expand_as(c), c)
    inv_x, inv_y = inverse_norm(stats[0], EPS), inverse_norm(stats[1], EPS)
    gx, gy = (dz * a).sum(1) * inv_x, (dz * v).sum(1) * inv_y
    kappa = slerp_weight_dc(strength[0].expand_as(c), c) * gx + slerp_weight_dc(1 - strength[0].expand_as(c), c) * gy

    dx = _feature_gradient(x, y, (weight_mix, weight_x), (dz, du_x), p, gx, kappa, c, stats[0], inv_y)
    dy = _feature_gradient(y, x, (weight_mix, weight_y), (dz, du_y), q, gy, kappa, c, stats[1], inv_x)
    mix_x, d_weight_x = _head_gradient(x, (p * inv_x)[:, None] * dz, du_x)
    mix_y, d_weight_y = _head_gradient(y, (q * inv_y)[:, None] * dz, du_y)
    heads = (d_weight_x, du_x.sum(0), d_weight_y, du_y.sum(0), mix_x + mix_y, dz.sum(0))
    return dx, dy, *(gradient.to(x.dtype) for gradient in heads)


def _row_stats(x: Tensor, y: Tensor) -> Tensor:
    """‖x‖, ‖y‖ and c = ⟨x̂, ŷ⟩.  (B, D) x2 -> (3, B)"""
    x_norm, y_norm = x.norm(dim=1), y.norm(dim=1)
    c = (x * y).sum(1) * (inverse_norm(x_norm, EPS) * inverse_norm(y_norm, EPS))
    return torch.stack([x_norm, y_norm, c])


def _mix(a: Tensor, v: Tensor, stats: Tensor, weight: Tensor, bias: Head) -> Tensor:
    """S(w,c) A/‖x‖ + S(1-w,c) V/‖y‖ + b.  (B, C) x2, (3, B), () -> (B, C)"""
    x_norm, y_norm, c = stats
    weight = weight.expand_as(c)
    p = slerp_weight(weight, c) * inverse_norm(x_norm, EPS)
    q = slerp_weight(1 - weight, c) * inverse_norm(y_norm, EPS)
    return _biased(p[:, None] * a + q[:, None] * v, bias)


def _biased(logits: Tensor, bias: Head) -> Tensor:
    return logits if bias is None else logits + bias.to(logits.dtype)


def _batch_kl_sum(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Σ_i KL_i by the backend's kernel.  (B, C) x2 -> ()"""
    rows = torch.empty(p_logits.shape[:1], dtype=p_logits.dtype, device=p_logits.device)  # (B,)
    stats = torch.empty((2, p_logits.shape[0]), dtype=p_logits.dtype, device=p_logits.device)  # (2, B)
    kernels(p_logits.device).batch_kl(p_logits, q_logits, rows, stats)
    return rows.sum()


def _targets(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels safe to index with, which rows count, and 1 or, for a label out of range, NaN.  (B,) each"""
    counted = target != ignore_index
    wrong = counted & ((target < 0) | (target >= classes))
    poison = torch.where(wrong, float("nan"), 1.0)
    return torch.where(counted & ~wrong, target, 0), counted, poison


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> Tensor:
    """Mean over the rows that count of -(1-ε) log P_t - ε/C Σ_k log P_k.  (B, C), (B,) -> ()"""
    label, counted, poison = _targets(target, logits.shape[1], ignore_index)
    log_p = logits.log_softmax(1)
    rows = -log_p.gather(1, label[:, None])[:, 0]
    if label_smoothing:
        rows = (1 - label_smoothing) * rows - label_smoothing * log_p.mean(1)
    return torch.where(counted, rows * poison.to(rows.dtype), 0).sum() / counted.sum()


def _cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    scale: Tensor,
    upstream: Tensor | None,
) -> Tensor:
    """scale / N (P - (1-ε) onehot - ε/C), plus the gradient that came to the logits themselves.  (B, C), (B,) -> (B, C)"""
    label, counted, poison = _targets(target, logits.shape[1], ignore_index)
    wanted = torch.full_like(logits, label_smoothing / logits.shape[1])
    wanted.scatter_add_(1, label[:, None], torch.full_like(logits[:, :1], 1 - label_smoothing))
    gradient = (logits.softmax(1) - wanted) * (poison.to(logits.dtype) * (scale / counted.sum()))[:, None]
    gradient = torch.where(counted[:, None], gradient, 0)
    return gradient if upstream is None else gradient + upstream.to(gradient.dtype)


def _feature_gradient(
    x: Tensor,
    y: Tensor,
    weights: tuple[Tensor, Tensor],
    logit_grads: tuple[Tensor, Tensor],
    p: Tensor,
    gx: Tensor,
    kappa: Tensor,
    c: Tensor,
    x_norm: Tensor,
    inv_y: Tensor,
) -> Tensor:
    """dX of the module's docstring; the part through the mixture is zero for a dead row.  -> (B, D)"""
    live, alive = live_inverse_norm(x_norm, EPS), (x_norm > EPS) | ~x_norm.isfinite()
    dz, du = logit_grads
    through_mix = torch.where(alive[:, None], (p * live)[:, None] * dz, 0)
    gradient = torch.cat([through_mix, du], dim=1).to(x.dtype) @ torch.cat(weights)
    to_y = torch.where(alive, kappa * live * inv_y, 0).to(x.dtype)
    to_x = torch.where(alive, (p * gx + kappa * c) * live * live, 0).to(x.dtype)
    return gradient.addcmul_(to_y[:, None], y).addcmul_(to_x[:, None], x, value=-1)


def _head_gradient(x: Tensor, dz: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """[dz | du]ᵀ X: this modality's part of dW_m, and dW_x.  (B, D), (B, C) x2 -> (C, D) x2"""
    product = torch.cat([dz, du], dim=1).to(x.dtype).T @ x
    return product[: dz.shape[1]], product[dz.shape[1] :].clone()  # an operator's outputs may not share memory
