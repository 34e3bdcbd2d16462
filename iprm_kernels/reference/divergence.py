"""`batch_kl` and `strength_weights` by their definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..convention import EXCESS_SERIES_BELOW, EXCESS_SERIES_TERMS
from ..dtypes import arithmetic_dtype


def excess(d: Tensor) -> Tensor:
    """φ(d) = d + exp(-d) - 1 >= 0, to full relative accuracy: Σ (-1)ⁿ dⁿ/n! from n = 2 for small d.  (...) -> (...)"""
    terms = EXCESS_SERIES_TERMS[d.dtype]
    series = torch.zeros_like(d)
    for n in range(terms + 1, 1, -1):
        series = 1 / math.factorial(n) - d * series
    return torch.where(d.abs() < EXCESS_SERIES_BELOW, d * d * series, d + torch.expm1(-d))


def batch_kl(p_logits: Tensor, q_logits: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """KL_i = Σ_k P_ik (log P_ik - log Q_ik), P and Q the softmax of the logits.  (B, C) x2 -> () or (B,), stats (5, B)

    Because ΣP = ΣQ, this equals Σ_k P φ(d) with d = log P - log Q and φ(d) = d + exp(-d) - 1: terms that are never
    negative, so nothing cancels however close P and Q are. The statistics are max p, Σ exp(p - max p), the same two for q, and
    KL.
    """
    dtype = arithmetic_dtype(p_logits.dtype)
    p, q = p_logits.to(dtype), q_logits.to(dtype)
    p_top, q_top = _row_max(p), _row_max(q)
    stats = [p_top, (p - p_top[:, None]).exp().sum(1), q_top, (q - q_top[:, None]).exp().sum(1)]
    p_prob, q_prob, d = _probabilities(p, q, stats)
    close = d.abs() < EXCESS_SERIES_BELOW
    terms = torch.where(close, p_prob * excess(d), p_prob * d + (q_prob - p_prob))
    terms = torch.where(p_prob == 0, q_prob, terms)
    kl = torch.where((q == -math.inf) & (p != -math.inf), math.inf, terms).sum(1)
    value = kl if reduction == "none" else kl.sum() if reduction == "sum" else kl.mean()
    return value, torch.stack([*stats, kl])


def batch_kl_backward(grad: Tensor, p_logits: Tensor, q_logits: Tensor, stats: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """∂p = g P (d - KL),  ∂q = g (Q - P); where P and Q are close, Q - P is computed as P (φ(d) - d). Zero where g is zero,
    even in a row whose KL is not finite.

    grad () or (B,), logits (B, C) x2, stats (5, B) -> (B, C), (B, C)
    """
    *softmaxes, kl = stats
    p_prob, q_prob, d = _probabilities(p_logits.to(kl.dtype), q_logits.to(kl.dtype), softmaxes)
    g = (grad / len(kl) if reduction == "mean" else grad).expand(len(kl))[:, None]
    dp = torch.where((p_prob == 0) & ~kl.isnan()[:, None], torch.zeros_like(d), p_prob * (d - kl[:, None]))
    close = (d.abs() < EXCESS_SERIES_BELOW) & (p_prob > 0)
    dq = torch.where(close, p_prob * (excess(d) - d), q_prob - p_prob)
    dp, dq = (torch.where(g == 0, torch.zeros_like(rows), g * rows) for rows in (dp, dq))
    return dp.to(p_logits.dtype), dq.to(q_logits.dtype)


def _row_max(logits: Tensor) -> Tensor:
    return logits.amax(1) if logits.numel() else logits.new_full(logits.shape[:1], -math.inf)


def _probabilities(p: Tensor, q: Tensor, softmaxes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """P, Q and d = log P - log Q.  (B, C) each

    Logits are taken relative to their row's maximum, and d includes the rounding error of that subtraction: a common offset
    changes nothing, and the difference of close logits is exact.
    """
    p_top, p_sum, q_top, q_sum = (values[:, None] for values in softmaxes)
    (a, a_rest), (b, b_rest) = _difference(p, p_top), _difference(q, q_top)
    return a.exp() / p_sum, b.exp() / q_sum, (a - b) + (a_rest - b_rest) - (p_sum / q_sum).log()


def _difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x - y rounded, and its rounding error (Knuth's two-sum), which is zero where it would not be finite."""
    high = x - y
    back = high - x
    rest = (x - (high - back)) - (y + back)
    return high, torch.where(rest.isfinite(), rest, 0)


def batch_kl_pair(p_logits: Tensor, other_logits: Tensor, q_logits: Tensor) -> tuple[Tensor]:
    """KL sums of two predictions from a third.  (B, C) x3 -> (2,)"""
    return (torch.stack([batch_kl(logits, q_logits, "sum")[0] for logits in (p_logits, other_logits)]),)


def strength_weights(kl: Tensor) -> tuple[Tensor]:
    """ω_m = (1/KL_m) / Σ_j (1/KL_j), scaled by the smallest: r_m = min KL / KL_m, ω = r / Σ r.  (M,) -> (M,)

    If any KL are zero, those modalities share the weight equally. An infinite KL gets 0; if all are infinite, weights are
    uniform. A NaN makes all weights NaN.
    """
    if len(kl) == 0:
        return (kl.clone(),)
    smallest = kl.min()
    ratio = torch.where(kl == smallest, torch.ones_like(kl), smallest / kl)
    return (ratio / ratio.sum(),)


def strength_weights_backward(grad: Tensor, kl: Tensor) -> tuple[Tensor]:
    """∂ω_m/∂KL_j = 1 / (KL_m (Σ_i KL_j/KL_i)²) for m ≠ j, and every column sums to zero.  (M,) x2 -> (M,)

    Where several KL are zero, or one is infinite, ω has no derivative and the gradient is zero. A NaN makes the gradient NaN.
    """
    column = (kl[None, :] / kl[:, None]).fill_diagonal_(1.0).sum(0)[None, :]  # Σ_i KL_j / KL_i
    undefined = (kl == 0)[:, None] | kl.isinf()[:, None] | kl.isinf()[None, :] | (column.isnan() & ~kl.isnan().any())
    terms = (grad[:, None] - grad[None, :]) / (kl[:, None] * column**2)  # in this order, 0/KL is 0 for the smallest KL
    return (torch.where(undefined, torch.zeros_like(terms), terms).fill_diagonal_(0.0).sum(0),)
