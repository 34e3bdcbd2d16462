"""Inputs of the operators, seeded: for `verify` and for the tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The same numbers on every device and, up to rounding, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def feature_pairs(batch: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows with evenly spaced angles from 0 to 154° (c = -0.9), which includes the range of trained features.  -> (B, D) x2

    An ulp of c moves θ by 1/sin θ ulps: nearer to the antipode, rounding of the inputs dominates. With one column all angles
    are 0.
    """
    x, other = randn(batch, width, seed=1).double(), randn(batch, width, seed=2).double()
    unit = x / x.norm(dim=1, keepdim=True)
    normal = other - (other * unit).sum(1, keepdim=True) * unit
    normal = normal / normal.norm(dim=1, keepdim=True)
    angle = torch.linspace(0, math.acos(-0.9), batch, dtype=torch.float64)[:, None]
    length = 1 + randn(batch, 1, seed=3).double().abs()
    y = length * (unit * angle.cos() + normal * angle.sin() if width > 1 else unit)
    return x.to(device, dtype), y.to(device, dtype)


def logit_pairs(batch: int, classes: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of logits of scale 3 whose distances are evenly spaced on a log scale from 1e-3 to 5.  -> (B, C) x2"""
    p = 3 * randn(batch, classes, seed=4).double()
    apart = torch.logspace(-3, math.log10(5), batch, dtype=torch.float64)[:, None]
    return p.to(device, dtype), (p + apart * randn(batch, classes, seed=5)).to(device, dtype)


def step(
    batch: int, width: int, classes: int, dtype: torch.dtype = torch.float32, *, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Inputs of a linear head step: features at all angles, heads that make logits of size 1 to 3, labels of every class, and
    λ = 0.3."""
    x, y = feature_pairs(batch, width, dtype, device)
    made = {"x": x, "y": y}
    for seed, name in enumerate(("x", "y", "mix"), start=10):
        scale = 2.0 if name != "mix" else 2.0 * width**0.5  # features of the mixture have length 1
        made[f"weight_{name}"] = (scale / width**0.5 * randn(classes, width, seed=seed)).to(device, dtype)
        made[f"bias_{name}"] = randn(classes, seed=seed + 3, dtype=dtype, device=device)
    target = torch.arange(batch, device=device) % classes
    return {**made, "target": target, "weight": 0.3}
