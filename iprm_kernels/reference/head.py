"""The linear head step in closed form: mixing commutes with a linear head, so one projection per modality is the
only work of size BCD.

A pair of modalities has features X, Y, x̂ = X/‖x‖, c = ⟨x̂, ŷ⟩, p = S(w, c), q = S(1-w, c), and projections A = X W_mᵀ,
V = Y W_mᵀ on the head of its mixture, Â = A/‖x‖, V̂ = V/‖y‖::

    mixed logits  Z = p Â + q V̂ + b_m          for the probe (w = λ) and, after the KL, for the step (w = ω_x)
    κ   = S'(ω,c) Σ dZ Â + S'(1-ω,c) Σ dZ V̂
    dX  = dU_x W_x + Σ over the pairs with x of p/‖x‖ dZ W_m + κ/(‖x‖‖y‖) Y - (p Σ dZ Â + κ c)/‖x‖² X        likewise dY
    dW_m = (p/‖x‖ dZ)ᵀ X + (q/‖y‖ dZ)ᵀ Y,   dW_x = dU_xᵀ X,   bias gradients are sums over rows

Heads, logits, losses and gradients have one order everywhere: first the P mixtures, then the M modalities. Two modalities form
the single pair (0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..convention import EPS, HeadBackwardInputs, HeadInputs, HeadState, pairs_of
from ..dtypes import arithmetic_dtype
from .divergence import batch_kl_pair, strength_weights
from .geodesic import Angle, inverse_norm, live_inverse_norm, row_norm, saved_cosine, slerp_weight, slerp_weight_dc


def head_probe(inputs: HeadInputs) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Projections, row statistics, unimodal logits, and KL sums of the unimodal predictions from the mixtures probed with λ.

    -> stats (P, 3, B), projected (P, 2, B, C), unimodal M of (B, C), kl (2P,)
    """
    features, weights, biases, pairs, _, probe_weight, *_ = inputs
    count, dtype = len(pairs) // 2, arithmetic_dtype(features[0].dtype)
    wide = [x.to(dtype) for x in features]
    own = zip(wide, weights[count:], biases[count:], strict=True)
    unimodal = [_biased(x @ weight.to(dtype).T, bias) for x, weight, bias in own]
    stats, projected, sums = [], [], []
    for k, (i, j) in enumerate(pairs_of(pairs)):
        x, y, weight = wide[i], wide[j], weights[k].to(dtype)
        x_norm, y_norm = row_norm(x), row_norm(y)
        x_hat, y_hat = x * inverse_norm(x_norm, EPS)[:, None], y * inverse_norm(y_norm, EPS)[:, None]
        stats.append(torch.stack([x_norm, y_norm, saved_cosine(x_hat, y_hat, x_norm, y_norm, EPS)]))
        projected.append(torch.stack([x @ weight.T, y @ weight.T]))
        probe = _mixed(projected[k], stats[k], probe_weight[k], biases[k])
        sums.append(batch_kl_pair(unimodal[i], unimodal[j], probe)[0])
    return torch.stack(stats), torch.stack(projected), unimodal, torch.cat(sums)


def head_rebalance(inputs: HeadInputs, state: HeadState, kl: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """ω from the KL sums (2P,), the logits of the mixtures weighted by ω, and the cross entropies of all heads.

    -> strength (2P,), logits P of (B, C), loss (), losses (P + M,), number of counted rows ()
    """
    strength = torch.cat([strength_weights(own)[0] for own in kl.view(-1, 2)])
    mixed = _mixtures(state, strength, inputs.biases)
    labels = _Labels.of(inputs.target, mixed[0].shape[1], inputs.ignore_index)
    losses = torch.stack([_cross_entropy(own, labels, inputs.label_smoothing) for own in (*mixed, *state.unimodal)])
    loss = losses[: len(mixed)].mean() + losses[len(mixed) :].sum()
    return strength, mixed, loss, losses, labels.counted.sum()


def head_backward(inputs: HeadBackwardInputs, state: HeadState) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the features (B, D), then of all weights (C, D) and all biases (C,), by the formulas above."""
    grad_loss, grad_losses, grad_logits, features, weights, biases, pairs, target = inputs[:8]
    strength, label_smoothing, ignore_index = inputs[-3:]
    count, dtype = len(pairs) // 2, state.stats.dtype
    wide = [x.to(dtype) for x in features]
    heads = [weight.to(dtype) for weight in weights]
    labels = _Labels.of(target, state.unimodal[0].shape[1], ignore_index)
    scales = state.stats.new_zeros(len(heads))
    if grad_loss is not None:
        scales[:count] += grad_loss / count
        scales[count:] += grad_loss
    scales = (scales if grad_losses is None else scales + grad_losses) / state.counted
    mixed = _mixtures(state, strength, biases)
    of_logits = [
        _cross_entropy_backward(own, labels, label_smoothing, scale, above)
        for own, scale, above in zip((*mixed, *state.unimodal), scales, grad_logits, strict=True)
    ]

    grad_features = [g @ weight for g, weight in zip(of_logits[count:], heads[count:], strict=True)]
    grad_weights = [g.T @ x for g, x in zip(of_logits[count:], wide, strict=True)]
    of_mixtures = []
    for k, (i, j) in enumerate(pairs_of(pairs)):
        x, y, dz, (a, v), (x_norm, y_norm, saved) = wide[i], wide[j], of_logits[k], state.projected[k], state.stats[k]
        weight = strength[2 * k].expand_as(saved)
        c, p, q = Angle.of(saved).c, slerp_weight(weight, saved), slerp_weight(1 - weight, saved)
        inv_x, inv_y = inverse_norm(x_norm, EPS), inverse_norm(y_norm, EPS)
        gx, gy = (dz * a).sum(1) * inv_x, (dz * v).sum(1) * inv_y
        kappa = slerp_weight_dc(weight, saved) * gx + slerp_weight_dc(1 - weight, saved) * gy
        through_x, through_y = (p * inv_x)[:, None] * dz, (q * inv_y)[:, None] * dz
        dx = _feature_gradient(through_x @ heads[k], x, y, kappa, p * gx + kappa * c, x_norm, inv_y)
        dy = _feature_gradient(through_y @ heads[k], y, x, kappa, q * gy + kappa * c, y_norm, inv_x)
        grad_features[i], grad_features[j] = grad_features[i] + dx, grad_features[j] + dy
        of_mixtures.append(through_x.T @ x + through_y.T @ y)
    return grad_features, of_mixtures + grad_weights, [g.sum(0) for g in of_logits]


def _biased(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits + bias.to(logits.dtype)


def _mixed(projected: Tensor, stats: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """S(w,c) A/‖x‖ + S(1-w,c) V/‖y‖ + b.  (2, B, C), (3, B), () -> (B, C)"""
    (a, v), (x_norm, y_norm, saved) = projected, stats
    weight = weight.expand_as(saved)
    p = slerp_weight(weight, saved) * inverse_norm(x_norm, EPS)
    q = slerp_weight(1 - weight, saved) * inverse_norm(y_norm, EPS)
    return _biased(p[:, None] * a + q[:, None] * v, bias)


def _mixtures(state: HeadState, strength: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The mixed logits of all pairs, weighted by the measured ω.  (2P,), (C,) -> P of (B, C)"""
    return [_mixed(state.projected[k], state.stats[k], strength[2 * k], biases[k]) for k in range(len(state.stats))]


class _Labels(NamedTuple):
    """Labels that are safe to index with, which rows count, and a factor: 1, or NaN for a label out of range.  (B,) each"""

    place: Tensor
    counted: Tensor
    poison: Tensor

    @staticmethod
    def of(target: Tensor, classes: int, ignore_index: int) -> _Labels:
        counted = target != ignore_index
        wrong = counted & ((target < 0) | (target >= classes))
        return _Labels(torch.where(counted & ~wrong, target, 0), counted, torch.where(wrong, float("nan"), 1.0))


def _cross_entropy(logits: Tensor, labels: _Labels, label_smoothing: float) -> Tensor:
    """Mean over the counted rows of -(1-ε) log P_t - ε/C Σ_k log P_k.  (B, C) -> ()"""
    log_p = logits.log_softmax(1)
    has_classes = logits.shape[1] > 0
    rows = -log_p.gather(1, labels.place[:, None])[:, 0] if has_classes else logits.new_zeros(len(logits))
    if label_smoothing and has_classes:
        rows = (1 - label_smoothing) * rows - label_smoothing * log_p.mean(1)
    return torch.where(labels.counted, rows * labels.poison.to(rows.dtype), 0).sum() / labels.counted.sum()


def _cross_entropy_backward(
    logits: Tensor, labels: _Labels, label_smoothing: float, scale: Tensor, upstream: Tensor | None
) -> Tensor:
    """scale (P - (1-ε) onehot - ε/C), plus the upstream gradient of the logits.  (B, C) -> (B, C)"""
    if logits.shape[1] == 0:
        return logits.clone()
    wanted = torch.full_like(logits, label_smoothing / logits.shape[1])
    wanted.scatter_add_(1, labels.place[:, None], torch.full_like(logits[:, :1], 1 - label_smoothing))
    by_row = labels.poison.to(logits.dtype) * scale
    gradient = torch.where(labels.counted[:, None], (logits.softmax(1) - wanted) * by_row[:, None], 0)
    return gradient if upstream is None else gradient + upstream.to(gradient.dtype)


def _feature_gradient(
    through_head: Tensor, x: Tensor, y: Tensor, kappa: Tensor, along: Tensor, x_norm: Tensor, inv_y: Tensor
) -> Tensor:
    """The gradient of x through the mixture, zero for a dead row.  (B, D) x3, (B,) x4 -> (B, D)"""
    live = live_inverse_norm(x_norm, EPS)
    gradient = through_head + (kappa * live * inv_y)[:, None] * y - (along * live * live)[:, None] * x
    return torch.where((x_norm <= EPS)[:, None], 0, gradient)
