"""The reference, which all other tests rely on, against 50 digits, and its gradients against numerical differentiation."""

from __future__ import annotations

import itertools

import mpmath
import oracle
import pytest
import torch
from mpmath import mpf
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels.convention import ANTIPODE_MARGIN
from iprm_kernels.reference import geodesic
from iprm_kernels.reference.divergence import excess

#: The edges of c: its limit, both sides of the series threshold h = (1 - c) / 2 = 0.125, and the antipode's approach.
COSINES = (
    1.0,
    1 - 1e-12,
    1 - 1e-7,
    1 - 1e-3,
    0.96,
    0.76,
    0.7501,
    0.75,
    0.7499,
    0.5,
    0.1,
    0.0,
    -0.3,
    -0.9,
    -0.99,
    -0.999,
    -1 + 1e-5,
)
WEIGHTS = (0.0, 1e-30, 1e-8, 1e-3, 0.3, 0.5, 0.7, 1 - 1e-7, 1.0, -0.25, 1.5, -7.0, 12.5, 20.5)

#: Largest error of each function in ulps of its magnitude below, over this grid in float32 and float64 (measured: 1.8, 1.8,
#: 5.8). ∂S/∂c loses three bits just above the threshold.
ULPS = {"slerp_weight": 2, "slerp_weight_ds": 2, "slerp_weight_dc": 6}


def magnitude(name: str, s: mpf, c: mpf) -> mpf:
    """The size of the terms of each function, to which its rounding errors are proportional.

    An ulp of θ moves sin(sθ) by sθ ulps, and near the antipode everything is divided by a small sine.
    """
    theta, s = mpmath.acos(c), abs(s)
    ratio = theta / mpmath.sin(theta) if c < 1 else mpf(1)
    if name == "slerp_weight":
        return s * ratio
    if name == "slerp_weight_ds":
        return ratio * (1 + s * theta)
    if c >= 0.75 and s * s * (1 - c) / 2 < 1:
        return s * (1 + s * s) / 3
    return s * ratio / mpmath.sin(theta) ** 2 * max(1, s * mpmath.sin(theta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(ULPS))
def test_slerp_weight_to_the_last_digits(name: str, dtype: torch.dtype) -> None:
    s, c = torch.tensor(list(itertools.product(WEIGHTS, COSINES)), dtype=dtype).T
    values = getattr(geodesic, name)(s, c)
    for s_i, c_i, value in zip(oracle.row(s), oracle.row(c), oracle.row(values), strict=True):
        bound = ULPS[name] * torch.finfo(dtype).eps * magnitude(name, s_i, c_i)
        assert abs(value - getattr(oracle, name)(s_i, c_i)) <= bound, (float(s_i), float(c_i))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamped_at_the_antipode(dtype: torch.dtype) -> None:
    delta = ANTIPODE_MARGIN[dtype]
    s, c = torch.full((3,), 0.3, dtype=dtype), torch.tensor([-1 - 1e-3, -1.0, -1 + delta / 4], dtype=dtype)
    floor = torch.full((3,), -1 + delta, dtype=dtype)
    assert torch.equal(geodesic.slerp_weight(s, c), geodesic.slerp_weight(s, floor))
    assert torch.equal(geodesic.slerp_weight_dc(s, c), torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess_to_the_last_digits(dtype: torch.dtype) -> None:
    """φ within 2 ulps of itself (measured: 1.5), either side of |d| = 0.5 where the series begins and at both ends."""
    sizes = (1e-15, 1e-12, 1e-5, 1e-3, 0.1, 0.49999, 0.5, 0.50001, 1.0, 3.0, 20.0, 80.0)
    d = torch.tensor([sign * size for size in sizes for sign in (1, -1)], dtype=dtype)
    for d_i, value in zip(oracle.row(d), oracle.row(excess(d)), strict=True):
        truth = oracle.excess(d_i)
        assert abs(value - truth) <= 2 * torch.finfo(dtype).eps * truth, float(d_i)
    assert excess(torch.zeros(1, dtype=dtype)).item() == 0


def unit_pair(cosine: float, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Rows of lengths 1 to 3 with ⟨x̂, ŷ⟩ = cosine.  -> (rows, 4) x2"""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(rows, 4, 2, dtype=torch.float64, generator=generator))[0]
    x, normal = basis.unbind(2)
    y = cosine * x + (1 - cosine**2) ** 0.5 * normal
    length = torch.linspace(1, 3, rows, dtype=torch.float64)[:, None]
    return (x * length).requires_grad_(), (y * length.flip(0)).requires_grad_()


@pytest.fixture
def by_reference() -> object:
    with ik.use_backend("reference"):
        yield


@pytest.mark.usefixtures("by_reference")
class TestGradients:
    def test_normalize(self) -> None:
        x, _ = unit_pair(0.5)
        assert torch.autograd.gradcheck(ik.normalize, (x,))

    # 1 - 1e-7 is as close as the step 1e-6 of numerical differentiation can tell from identical
    @pytest.mark.parametrize("cosine", [1 - 1e-7, 0.999, 0.76, 0.74, 0.0, -0.9])
    @pytest.mark.parametrize("shape", [(), (3,)], ids=["one weight", "one weight per row"])
    def test_geodesic_mixup(self, cosine: float, shape: tuple[int, ...]) -> None:
        x, y = unit_pair(cosine)
        weight = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(ik.geodesic_mixup, (x, y, weight))

    def test_geodesic_mixup_by_a_float(self) -> None:
        x, y = unit_pair(0.9)
        assert torch.autograd.gradcheck(lambda x, y: ik.geodesic_mixup(x, y, 0.3), (x, y))

    @pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
    @pytest.mark.parametrize("apart", [1e-3, 0.5, 3.0])
    def test_batch_kl(self, reduction: str, apart: float) -> None:
        generator = torch.Generator().manual_seed(0)
        p = torch.randn(3, 5, dtype=torch.float64, generator=generator)
        q = p + apart * torch.randn(3, 5, dtype=torch.float64, generator=generator)
        inputs = (p.requires_grad_(), q.requires_grad_())
        assert torch.autograd.gradcheck(lambda p, q: ik.batch_kl(p, q, reduction=reduction), inputs)

    @pytest.mark.parametrize("kl", [[2.0], [0.3, 0.7], [1e-3, 5.0, 0.4], [1.0, 2.0, 3.0, 4.0, 5.0]])
    def test_strength_weights(self, kl: list[float]) -> None:
        assert torch.autograd.gradcheck(ik.strength_weights, (torch.tensor(kl, dtype=torch.float64, requires_grad=True),))
