"""Baselines of the benchmarks: sum fusion, and the formulas of `iprm_kernels.verify.formulas`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from iprm_kernels.verify.formulas import Head, batch_kl, geodesic_mixup, released

__all__ = ["batch_kl", "geodesic_mixup", "naive", "released"]


def naive(x: Tensor, y: Tensor, head_x: Head, head_y: Head, head_mix: Head, target: Tensor, weight: Tensor) -> Tensor:
    """Sum fusion: two linear heads and one cross entropy, the cost of a step without rebalancing."""
    return F.cross_entropy(F.linear(x, *head_x) + F.linear(y, *head_y), target)
