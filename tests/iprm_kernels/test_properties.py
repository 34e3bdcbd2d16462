"""Properties that hold for every input: hypothesis draws shapes, strides, weights and edge rows."""

from __future__ import annotations

import math

import cases
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import INTERPRETED, Place
from torch import Tensor

import iprm_kernels as ik

ULP = torch.finfo(torch.float32).eps
ROWS = st.sampled_from(["random", "identical", "close", "dead", "nan"])
SEEDS = st.integers(0, 1000)
WIDTHS = st.integers(2, 40 if INTERPRETED else 300)
WEIGHTS = st.floats(0, 1, width=32)


def drawn(kinds: list[str], width: int, seed: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """A pair of rows of each kind.  -> (B, D) x2"""
    x = cases.randn(len(kinds), width, seed=seed)
    y = cases.randn(len(kinds), width, seed=seed + 1)
    # no obtuse angles: the antipode has tests of its own
    y = torch.where((x * y).sum(1, keepdim=True) < 0, -y, y)
    for row, kind in enumerate(kinds):
        if kind == "identical":
            y[row] = x[row]
        elif kind == "close":
            y[row] = x[row] + 1e-5 * y[row]
        elif kind == "dead":
            x[row] = 0.0
        elif kind == "nan":
            x[row, width // 2] = math.nan
    return (x.T.contiguous().T, y) if transposed else (x, y)


@given(kinds=st.lists(ROWS, min_size=1, max_size=12), width=WIDTHS, seed=SEEDS, transposed=st.booleans(), weight=WEIGHTS)
def test_mixture(place: Place, kinds: list[str], width: int, seed: int, transposed: bool, weight: float) -> None:
    """Unit length, symmetry, invariance to scale, and independence of rows."""
    x, y = (tensor.to(place.device) for tensor in drawn(kinds, width, seed, transposed))
    z = ik.geodesic_mixup(x, y, weight)
    for row, kind in enumerate(kinds):
        alone = ik.geodesic_mixup(x[row : row + 1], y[row : row + 1], weight)[0]
        torch.testing.assert_close(z[row], alone, rtol=0, atol=8 * ULP, equal_nan=True)
        if kind == "nan":
            assert z[row].isnan().all()
        elif kind != "dead":
            assert abs(z[row].norm().item() - 1) <= 16 * ULP
    swapped = ik.geodesic_mixup(y, x, torch.ones((), device=place.device) - weight)
    torch.testing.assert_close(swapped, z, rtol=0, atol=8 * ULP, equal_nan=True)
    assert torch.equal(ik.geodesic_mixup(4 * x, y / 8, weight).nan_to_num(7), z.nan_to_num(7))  # powers of two: exactly


@given(rows=st.integers(1, 12), classes=WIDTHS, seed=SEEDS, scale=st.floats(1e-6, 1e4))
def test_divergence(place: Place, rows: int, classes: int, seed: int, scale: float) -> None:
    """KL is never negative or NaN, and zero for equal logits; the strengths sum to one."""
    p, q = (scale * cases.randn(rows, classes, seed=seed + i, device=place.device) for i in range(2))
    kl = ik.batch_kl(p, q, reduction="none")
    assert (kl >= 0).all()
    assert (ik.batch_kl(p, p, reduction="none") == 0).all()
    strength = ik.strength_weights(torch.stack([kl.sum(), ik.batch_kl(q, p)]))
    assert abs(strength.sum().item() - 1) <= 2 * ULP
    assert (strength >= 0).all()


@given(kl=st.lists(st.floats(0, 2.0**127, width=32) | st.just(0.0) | st.just(math.inf), min_size=1, max_size=5))
def test_strength(place: Place, kl: list[float]) -> None:
    """Strengths sum to one, and are larger where the divergence is smaller."""
    strength = ik.strength_weights(torch.tensor(kl, device=place.device)).tolist()
    assert abs(sum(strength) - 1) <= 4 * ULP
    by_divergence = [share for _, share in sorted(zip(kl, strength, strict=True), key=lambda pair: (pair[0], -pair[1]))]
    assert by_divergence == sorted(strength, reverse=True)
