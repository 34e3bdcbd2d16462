"""A second implementation of the formulas of `iprm_kernels.reference`, in 50 digits, from their definitions.

Scalars are mpmath numbers; a row is a numpy array of them. It uses none of the series and rearrangements of
the package: extra digits absorb cancellation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import mpmath
import numpy as np
from mpmath import mpf
from torch import Tensor

#: Every result must have 50 correct digits; ∂S/∂c at h = 1e-17 cancels 26 of these, φ at d = 1e-12 another 24.
mpmath.mp.dps = 90


def row(values: Tensor | Iterable[float]) -> np.ndarray:
    """Exact mpmath copies of floating point numbers.  (D,) -> (D,)"""
    numbers = values.double().tolist() if isinstance(values, Tensor) else values
    return np.array([mpf(value) for value in numbers], dtype=object)


# geodesic


def slerp_weight(s: mpf, c: mpf) -> mpf:
    """S = sin(sθ) / sin θ, θ = arccos c; its limits s at c = 1."""
    if c == 1:
        return mpf(s)
    theta = mpmath.acos(c)
    return mpmath.sin(s * theta) / mpmath.sin(theta)


def slerp_weight_ds(s: mpf, c: mpf) -> mpf:
    """∂S/∂s = θ cos(sθ) / sin θ; 1 at c = 1."""
    if c == 1:
        return mpf(1)
    theta = mpmath.acos(c)
    return theta * mpmath.cos(s * theta) / mpmath.sin(theta)


def slerp_weight_dc(s: mpf, c: mpf) -> mpf:
    """∂S/∂c = (c sin(sθ) - s cos(sθ) sin θ) / sin³θ; -s(1-s²)/3 at c = 1."""
    if c == 1:
        return -s * (1 - mpf(s) ** 2) / 3
    theta = mpmath.acos(c)
    sine = mpmath.sin(theta)
    return (c * mpmath.sin(s * theta) - s * mpmath.cos(s * theta) * sine) / sine**3


class Mixup(NamedTuple):
    """One row of `geodesic_mixup` and its gradients for ∂L/∂z = g."""

    z: np.ndarray  # (D,)
    dx: np.ndarray  # (D,)
    dy: np.ndarray  # (D,)
    dw: mpf


def geodesic_mixup(x: np.ndarray, y: np.ndarray, w: mpf, g: np.ndarray, floor: float = -1.0) -> Mixup:
    """Rows (D,) that are not dead, and opposite only if c is clamped to a `floor` above -1. Gradients follow the chain rule
    through x̂, ŷ and c, one step at a time."""
    x_norm, y_norm = mpmath.sqrt(x.dot(x)), mpmath.sqrt(y.dot(y))
    x_hat, y_hat = x / x_norm, y / y_norm
    inner = min(x_hat.dot(y_hat), mpf(1))
    c = max(inner, mpf(floor))
    p, q = slerp_weight(w, c), slerp_weight(1 - w, c)
    gx, gy = g.dot(x_hat), g.dot(y_hat)
    dc = slerp_weight_dc(w, c) * gx + slerp_weight_dc(1 - w, c) * gy if inner > floor else mpf(0)
    dx_hat, dy_hat = p * g + dc * y_hat, q * g + dc * x_hat
    return Mixup(
        z=p * x_hat + q * y_hat,
        dx=(dx_hat - dx_hat.dot(x_hat) * x_hat) / x_norm,
        dy=(dy_hat - dy_hat.dot(y_hat) * y_hat) / y_norm,
        dw=gx * slerp_weight_ds(w, c) - gy * slerp_weight_ds(1 - w, c),
    )


# divergence


def excess(d: mpf) -> mpf:
    """φ(d) = d + exp(-d) - 1"""
    return d + mpmath.exp(-d) - 1


class Divergence(NamedTuple):
    """One row of `batch_kl` and its gradients for ∂L/∂KL = 1."""

    kl: mpf
    dp: np.ndarray  # (C,)
    dq: np.ndarray  # (C,)


def batch_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> Divergence:
    """Rows (C,) of finite logits; KL = Σ P (log P - log Q)."""
    log_p, log_q = (logits - mpmath.log(sum(map(mpmath.exp, logits))) for logits in (p_logits, q_logits))
    p, q = (np.array([mpmath.exp(value) for value in logs]) for logs in (log_p, log_q))
    d = log_p - log_q
    kl = p.dot(d)
    return Divergence(kl, p * (d - kl), q - p)


def strength_weights(kl: np.ndarray) -> np.ndarray:
    """(1/KL_m) / Σ_j (1/KL_j) of finite positive divergences.  (M,) -> (M,)"""
    inverse = 1 / kl
    return inverse / inverse.sum()
