"""λ, the moving average of measured strengths, by its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def average_strength(
    strength: Tensor, alpha: float, released: bool, weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The new weight (P,), eval_weight (P,), last (P, 2) and steps (P,), from strength (P, 2) and the old values."""
    measured, finite = strength[:, 0], strength.isfinite()
    averaged = torch.lerp(measured, weight, alpha)
    if not released:
        averaged = torch.where(steps == 0, measured, averaged)
    averaged = torch.where(finite[:, 0], averaged, weight)
    return averaged, weight.clone() if released else averaged, torch.where(finite, strength, last), steps + finite[:, 0]
