"""Features near the antipode, and the errors allowed there.

With δ = π - θ, z is the difference of two vectors up to 1/δ long: their rounding alone is some ulps of 1/δ, and that of the
gradients, which multiply differences of x̂ and -ŷ by 1/δ², some ulps of 1/δ².
"""

from __future__ import annotations

import math

import cases
import heads
import oracle
import torch
import torch.nn.functional as F
from torch import Tensor
from truths import mixup_with_gradients

import iprm_kernels as ik
from iprm_kernels.convention import ANTIPODE_MARGIN
from iprm_kernels.dtypes import arithmetic_dtype

#: Degrees. The clamp begins at 179.92 in the arithmetic of float32, at 179.9999 in float64.
ANGLES = (179.0, 179.5, 179.9, 179.99)
ULPS = 8


def floor(dtype: torch.dtype) -> float:
    """What c is clamped to, as the arithmetic of `dtype` rounds it."""
    wide = arithmetic_dtype(dtype)
    return torch.tensor(-1 + ANTIPODE_MARGIN[wide], dtype=wide).item()


def pairs_at(angle: float, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows at an angle, before their elements are rounded to `dtype`.  -> (rows, width) x2"""
    x, other = (cases.randn(rows, width, seed=seed, dtype=torch.float64) for seed in (1, 2))
    unit = x / x.norm(dim=1, keepdim=True)
    normal = other - (other * unit).sum(1, keepdim=True) * unit
    normal = normal / normal.norm(dim=1, keepdim=True)
    theta = math.radians(angle)
    return x.to(dtype), (3 * (unit * math.cos(theta) + normal * math.sin(theta))).to(dtype)


def supplements(x: Tensor, y: Tensor) -> Tensor:
    """π - θ, no smaller than the clamp allows.  (B, D) x2 -> (B,)"""
    x_hat, y_hat = (F.normalize(t.double(), dim=1) for t in (x, y))
    return (x_hat + y_hat).norm(dim=1).clamp(min=math.sqrt(2 * (1 + floor(x.dtype))))


def assert_close(name: str, value: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """The error of every row of `value` is below ULPS of its magnitude, plus the rounding to its type.  (B, ...), (B,)"""
    unit, stored = torch.finfo(arithmetic_dtype(value.dtype)).eps, torch.finfo(value.dtype).eps
    error = (value.double().cpu() - truth).abs().reshape(len(value), -1).amax(1)
    allowed = ULPS * unit * magnitude + stored * truth.abs().reshape(len(value), -1).amax(1)
    assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3g} times the allowed {allowed.max():.3g}"


def assert_mixup(angle: float, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """`geodesic_mixup` and its gradients, by the backend in use, against 50 digits."""
    x, y = pairs_at(angle, 6, width, dtype)
    g, w = cases.randn(6, width, seed=3, dtype=dtype), torch.linspace(0, 1, 6, dtype=arithmetic_dtype(dtype))
    values = mixup_with_gradients(*(t.to(device) for t in (x, y, w, g)))
    rows = [
        oracle.geodesic_mixup(oracle.row(x), oracle.row(y), oracle.row([w])[0], oracle.row(g), floor(dtype))
        for x, y, w, g in zip(x, y, w.tolist(), g, strict=True)
    ]
    apart = supplements(x, y)
    sizes = {"z": 1 / apart, "dw": g.double().norm(dim=1) / apart**2}
    for name, of in (("dx", x), ("dy", y)):
        sizes[name] = g.double().norm(dim=1) / of.double().norm(dim=1) / apart**2
    for name, size in sizes.items():
        found = [getattr(row, name) for row in rows]
        truth = torch.tensor([float(n) if name == "dw" else [*map(float, n)] for n in found], dtype=torch.float64)
        assert_close(name, values[name], truth, size)


def assert_head_step(angle: float, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """The mixed logits of a head step and the gradients of the features, against float64 with the same ω."""
    inputs = heads.inputs(6, width, 3, dtype)
    inputs["x"], inputs["y"] = pairs_at(angle, 6, width, dtype)
    apart = supplements(inputs["x"], inputs["y"])
    step = heads.run({name: t.to(device) if isinstance(t, Tensor) else t for name, t in inputs.items()})
    of = {name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in inputs.items()}
    x, y = (of[name].requires_grad_() for name in "xy")
    strength = step.outputs["strength"].double().cpu()
    with ik.use_backend("reference"):
        mixed = F.linear(ik.geodesic_mixup(x, y, strength[0]), of["weight_mix"], of["bias_mix"])
        own = [F.linear(features, of[f"weight_{m}"], of[f"bias_{m}"]) for m, features in (("x", x), ("y", y))]
        sum(F.cross_entropy(logits, of["target"]) for logits in (mixed, *own)).backward()
    size = of["weight_mix"].norm(dim=1).max()
    assert_close("logits_mix", step.outputs["logits_mix"], mixed.detach(), size / apart)
    for name, leaf in (("x", x), ("y", y)):
        assert_close(f"d{name}", step.gradients[name], leaf.grad, size / leaf.detach().norm(dim=1) / apart**2)
