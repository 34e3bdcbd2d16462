"""A second implementation of the linear head step, from its definition: two passes through the mixed head, then the chain rule.

Matrices are in numpy's long double (64 bits of mantissa on x86-64, eleven more than float64); S and its derivatives, which
cancel near c = 1, are computed with the 90 digits of `oracle`. A row no longer than EPS is divided by EPS, and gets no
gradient through the mixture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
from error_budget import Truth
from mpmath import mpf
from torch import Tensor

EPS = 1e-12
#: Whether long double is wider than double here, which the truth for float64 requires.
EXTENDED = np.finfo(np.longdouble).nmant > 60

Matrix = np.ndarray


def linear_probe_rebalance(
    inputs: dict[str, Any], label_smoothing: float, logits_weights: Matrix, ignore_index: int = -100
) -> dict[str, Truth]:
    """Outputs and gradients of loss + Σ logits_mix ⊙ logits_weights, by name. Losses are means over the rows that count."""
    i = {name: _exact(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    target, one = inputs["target"].numpy(), np.longdouble(1)
    batch, classes = len(target), len(i["weight_x"])
    i |= {f"bias_{m}": np.zeros(classes, np.longdouble) for m in ("x", "y", "mix") if i[f"bias_{m}"] is None}
    lengths = {m: np.sqrt((i[m] ** 2).sum(1)) for m in "xy"}
    norms = {m: np.maximum(length, EPS) for m, length in lengths.items()}
    unit = {m: i[m] / norms[m][:, None] for m in "xy"}
    c = np.minimum((unit["x"] * unit["y"]).sum(1), one)

    logits = {m: i[m] @ i[f"weight_{m}"].T + i[f"bias_{m}"] for m in "xy"}
    probe = _mixed(unit, c, i["weight"]) @ i["weight_mix"].T + i["bias_mix"]
    kl = np.array([_kl(logits[m], probe) for m in "xy"])
    with np.errstate(divide="ignore", invalid="ignore"):  # equal logits have no strength: NaN
        strength = (1 / kl) / (1 / kl).sum()
    w = strength[0]
    z = _mixed(unit, c, w)
    logits["mix"] = z @ i["weight_mix"].T + i["bias_mix"]
    rows = np.flatnonzero(target != ignore_index)
    wanted = np.zeros((batch, classes), np.longdouble)
    wanted[rows] = label_smoothing * one / classes
    wanted[rows, target[rows]] += 1 - label_smoothing * one
    losses = np.array([-(wanted * _log_softmax(logits[m])).sum() / len(rows) for m in ("mix", "x", "y")])

    counted = (target != ignore_index)[:, None]
    grads = {m: (counted * np.exp(_log_softmax(logits[m])) - wanted) / len(rows) for m in ("mix", "x", "y")}
    grads["mix"] = grads["mix"] + logits_weights.astype(np.longdouble)
    g = grads["mix"] @ i["weight_mix"]
    g_x, g_y = ((g * unit[m]).sum(1) for m in "xy")
    kappa = _of_rows(oracle.slerp_weight_dc, w, c) * g_x + _of_rows(oracle.slerp_weight_dc, 1 - w, c) * g_y
    found = {"loss": losses.sum()[None], "losses": losses, "strength": strength, "kl": kl}
    found |= {f"logits_{m}": value for m, value in logits.items()}
    for m, other, s in (("x", "y", w), ("y", "x", 1 - w)):
        by_unit = _of_rows(oracle.slerp_weight, s, c)[:, None] * g + kappa[:, None] * unit[other]
        tangent = by_unit - (by_unit * unit[m]).sum(1)[:, None] * unit[m]
        found[m] = np.where(lengths[m] <= EPS, 0, 1 / norms[m])[:, None] * tangent + grads[m] @ i[f"weight_{m}"]
        found[f"weight_{m}"] = grads[m].T @ i[m]
    found["weight_mix"] = grads["mix"].T @ z
    found |= {f"bias_{m}": grads[m].sum(0) for m in ("mix", "x", "y")}
    return {name: Truth.of_digits(value.reshape(len(value), -1)) for name, value in found.items()}


def _exact(value: Tensor) -> Matrix:
    return value.double().numpy().astype(np.longdouble)


def _of_rows(function: Any, s: np.longdouble, c: Matrix) -> Matrix:
    """`function(s, c)` of `oracle` for every row, rounded to long double once.  (B,) -> (B,)"""
    values = [function(_digits(s), _digits(row)) for row in c]
    return np.array([np.longdouble(float(v)) + np.longdouble(float(v - mpf(float(v)))) for v in values])


def _digits(value: Any) -> mpf:
    high = float(value)
    return mpf(high) + mpf(float(np.longdouble(value) - high))


def _mixed(unit: dict[str, Matrix], c: Matrix, w: Any) -> Matrix:
    w = np.longdouble(w)
    p, q = _of_rows(oracle.slerp_weight, w, c), _of_rows(oracle.slerp_weight, 1 - w, c)
    return p[:, None] * unit["x"] + q[:, None] * unit["y"]


def _log_softmax(logits: Matrix) -> Matrix:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _kl(p_logits: Matrix, q_logits: Matrix) -> np.longdouble:
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    return (np.exp(log_p) * (log_p - log_q)).sum()
