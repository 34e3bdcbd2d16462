"""Operators without gradients, by their definitions, with the same arguments and results as the operators."""

from __future__ import annotations

from torch import Tensor

from ..dtypes import arithmetic_dtype
from . import divergence, geodesic


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return geodesic.normalize(x, eps)


def geodesic_mixup(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return geodesic.geodesic_mixup(x, y, weight.to(arithmetic_dtype(x.dtype)).expand(x.shape[0]), eps)


def batch_kl(p_logits: Tensor, q_logits: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    return divergence.batch_kl(p_logits, q_logits, reduction)


def strength_weights(kl: Tensor) -> Tensor:
    return divergence.strength_weights(kl.to(arithmetic_dtype(kl.dtype)))[0].to(kl.dtype)
