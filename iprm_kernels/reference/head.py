"""The linear head step in closed form: mixing commutes with a linear head, so one projection a modality is all that is wide.

With x̂ = X/‖x‖, c = ⟨x̂, ŷ⟩, p = S(w, c), q = S(1-w, c) and projections A = X W_mᵀ, V = Y W_mᵀ, Â = A/‖x‖, V̂ = V/‖y‖::

    mixed logits  Z = p Â + q V̂ + b_m          for the probe (w = λ) and, after the KL, for the step (w = ω_x)
    κ   = S'(ω,c) Σ dZ Â + S'(1-ω,c) Σ dZ V̂
    dX  = [p/‖x‖ dZ | dU_x] [W_m ; W_x] + κ/(‖x‖‖y‖) Y - (p Σ dZ Â + κ c)/‖x‖² X        and the same for y
    dW_m = (p/‖x‖ dZ)ᵀ X + (q/‖y‖ dZ)ᵀ Y,   dW_x = dU_xᵀ X,   biases sum the rows
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import arithmetic_dtype
from .divergence import batch_kl_pair, strength_weights
from .geodesic import inverse_norm, live_inverse_norm, slerp_weight, slerp_weight_dc

EPS = 1e-12  # the smallest length divided by, as in `normalize`


class State(NamedTuple):
    """What a step keeps for its backward pass."""

    stats: Tensor  #: (3, B) holding ‖x‖, ‖y‖, c
    a: Tensor  #: (B, C) X W_mᵀ
    v: Tensor  #: (B, C) Y W_mᵀ
    u_x: Tensor  #: (B, C) unimodal logits of x
    u_y: Tensor  #: (B, C) unimodal logits of y
    counted: Tensor  #: () rows that the losses are means over

    @staticmethod
    def views(state: Tensor, logits_x: Tensor, logits_y: Tensor) -> State:
        """Of the one tensor that holds them; u_x and u_y are in it where the logits returned are narrower, else these."""
        batch, classes = logits_x.shape
        ends = range(3 * batch, len(state), batch * classes) if batch else [0] * 5
        parts = [state[begin:end].view(batch, classes) for begin, end in itertools.pairwise(ends)]
        u_x, u_y = (logits_x, logits_y) if logits_x.dtype == state.dtype else parts[2:4]
        return State(state[: 3 * batch].view(3, batch), parts[0], parts[1], u_x, u_y, state[-1])


def head_probe(
    x: Tensor,
    y: Tensor,
    weight_x: Tensor,
    bias_x: Tensor | None,
    weight_y: Tensor,
    bias_y: Tensor | None,
    weight_mix: Tensor,
    bias_mix: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, ...]:
    """Projections, row statistics, unimodal logits, and the KL sums of these from the mixture probed with λ.

    (B, D) x2, heads (C, D) and (C,), λ () -> a, v, u_x, u_y (B, C); stats (3, B) holding ‖x‖, ‖y‖, c; kl (2,)
    """
    dtype = arithmetic_dtype(x.dtype)
    x, y, weight_mix = x.to(dtype), y.to(dtype), weight_mix.to(dtype)
    a, v = x @ weight_mix.T, y @ weight_mix.T
    u_x, u_y = _biased(x @ weight_x.to(dtype).T, bias_x), _biased(y @ weight_y.to(dtype).T, bias_y)
    x_norm, y_norm = x.norm(dim=1), y.norm(dim=1)
    c = (x * y).sum(1) * (inverse_norm(x_norm, EPS) * inverse_norm(y_norm, EPS))
    stats = torch.stack([x_norm, y_norm, c])
    probe = _mixed(a, v, stats, weight, bias_mix)
    (kl,) = batch_kl_pair(u_x, u_y, probe)
    return a, v, u_x, u_y, stats, kl


def head_rebalance(
    of: State, bias_mix: Tensor | None, kl: Tensor, target: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, ...]:
    """ω from the KL sums, the logits of the mixture with it, and the cross entropies of mixture, x and y.

    bias (C,), kl (2,), target (B,) -> strength (2,), logits_mix (B, C), loss (), losses (3,), rows that count ()
    """
    (strength,) = strength_weights(kl)
    logits = _mixed(of.a, of.v, of.stats, strength[0], bias_mix)
    labels = _Labels.of(target, logits.shape[1], ignore_index)
    losses = torch.stack([_cross_entropy(own, labels, label_smoothing) for own in (logits, of.u_x, of.u_y)])
    return strength, logits, losses.sum(), losses, labels.counted.sum()


def head_backward(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_mix: Tensor | None,
    grad_logits_x: Tensor | None,
    grad_logits_y: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight_x: Tensor,
    weight_y: Tensor,
    weight_mix: Tensor,
    bias_mix: Tensor | None,
    target: Tensor,
    of: State,
    strength: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, y (B, D), then weight (C, D) and bias (C,) of the heads of x, y and the mixture, by the formulas above.

    The upstream gradients are those of loss (), losses (3,) and the logits (B, C) of mixture, x and y.
    """
    stats, a, v, u_x, u_y, counted = of
    x_norm, y_norm, c = stats
    x, y, weight_mix = x.to(c.dtype), y.to(c.dtype), weight_mix.to(c.dtype)
    labels = _Labels.of(target, a.shape[1], ignore_index)
    scales = a.new_zeros(3)
    scales = scales if grad_loss is None else scales + grad_loss
    scales = (scales if grad_losses is None else scales + grad_losses) / counted
    weight = strength[0].expand_as(c)
    logits = _mixed(a, v, stats, strength[0], bias_mix)
    dz, du_x, du_y = (
        _cross_entropy_backward(own, labels, label_smoothing, scale, upstream)
        for own, scale, upstream in zip((logits, u_x, u_y), scales, (grad_mix, grad_logits_x, grad_logits_y), strict=True)
    )

    p, q = slerp_weight(weight, c), slerp_weight(1 - weight, c)
    inv_x, inv_y = inverse_norm(x_norm, EPS), inverse_norm(y_norm, EPS)
    gx, gy = (dz * a).sum(1) * inv_x, (dz * v).sum(1) * inv_y
    kappa = slerp_weight_dc(weight, c) * gx + slerp_weight_dc(1 - weight, c) * gy
    through_x, through_y = (p * inv_x)[:, None] * dz, (q * inv_y)[:, None] * dz
    dx = _feature_gradient(through_x @ weight_mix, x, y, kappa, p * gx + kappa * c, x_norm, inv_y)
    dy = _feature_gradient(through_y @ weight_mix, y, x, kappa, q * gy + kappa * c, y_norm, inv_x)
    return (
        dx + du_x @ weight_x.to(c.dtype),
        dy + du_y @ weight_y.to(c.dtype),
        du_x.T @ x,
        du_x.sum(0),
        du_y.T @ y,
        du_y.sum(0),
        through_x.T @ x + through_y.T @ y,
        dz.sum(0),
    )


def _biased(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits + bias.to(logits.dtype)


def _mixed(a: Tensor, v: Tensor, stats: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """S(w,c) A/‖x‖ + S(1-w,c) V/‖y‖ + b.  (B, C) x2, (3, B), () -> (B, C)"""
    x_norm, y_norm, c = stats
    weight = weight.expand_as(c)
    p = slerp_weight(weight, c) * inverse_norm(x_norm, EPS)
    q = slerp_weight(1 - weight, c) * inverse_norm(y_norm, EPS)
    return _biased(p[:, None] * a + q[:, None] * v, bias)


class _Labels(NamedTuple):
    """Labels safe to index with, which rows count, and 1 or, for a label out of range, NaN.  (B,) each"""

    place: Tensor
    counted: Tensor
    poison: Tensor

    @staticmethod
    def of(target: Tensor, classes: int, ignore_index: int) -> _Labels:
        counted = target != ignore_index
        wrong = counted & ((target < 0) | (target >= classes))
        return _Labels(torch.where(counted & ~wrong, target, 0), counted, torch.where(wrong, float("nan"), 1.0))


def _cross_entropy(logits: Tensor, labels: _Labels, label_smoothing: float) -> Tensor:
    """Mean over the rows that count of -(1-ε) log P_t - ε/C Σ_k log P_k.  (B, C) -> ()"""
    log_p = logits.log_softmax(1)
    rows = -log_p.gather(1, labels.place[:, None])[:, 0]
    if label_smoothing:
        rows = (1 - label_smoothing) * rows - label_smoothing * log_p.mean(1)
    return torch.where(labels.counted, rows * labels.poison.to(rows.dtype), 0).sum() / labels.counted.sum()


def _cross_entropy_backward(
    logits: Tensor, labels: _Labels, label_smoothing: float, scale: Tensor, upstream: Tensor | None
) -> Tensor:
    """scale (P - (1-ε) onehot - ε/C), plus the gradient that came to the logits themselves.  (B, C) -> (B, C)"""
    wanted = torch.full_like(logits, label_smoothing / logits.shape[1])
    wanted.scatter_add_(1, labels.place[:, None], torch.full_like(logits[:, :1], 1 - label_smoothing))
    by_row = labels.poison.to(logits.dtype) * scale
    gradient = torch.where(labels.counted[:, None], (logits.softmax(1) - wanted) * by_row[:, None], 0)
    return gradient if upstream is None else gradient + upstream.to(gradient.dtype)


def _feature_gradient(
    through_head: Tensor, x: Tensor, y: Tensor, kappa: Tensor, along: Tensor, x_norm: Tensor, inv_y: Tensor
) -> Tensor:
    """What comes to x through the mixture: nothing for a dead row.  (B, D) x3, (B,) x4 -> (B, D)"""
    live = live_inverse_norm(x_norm, EPS)
    gradient = through_head + (kappa * live * inv_y)[:, None] * y - (along * live * live)[:, None] * x
    return torch.where((x_norm <= EPS)[:, None], 0, gradient)
