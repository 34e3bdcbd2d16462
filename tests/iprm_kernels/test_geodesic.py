"""`normalize` and `geodesic_mixup` at the edges of their contract: values, layouts, weights, gradients."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels.convention import ANTIPODE_MARGIN
from iprm_kernels.dtypes import arithmetic_dtype
from iprm_kernels.reference.geodesic import slerp_weight

FLOATS = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


def gradients(x: Tensor, y: Tensor, w: Tensor | float, g: Tensor) -> tuple[Tensor, ...]:
    """z, ∂x, ∂y and, for a tensor, ∂w."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, y, w) if isinstance(tensor, Tensor)]
    z = ik.geodesic_mixup(*inputs, *([] if isinstance(w, Tensor) else [w]))
    return z.detach(), *torch.autograd.grad(z, inputs, g)


def ulps(dtype: torch.dtype, count: float) -> float:
    """Tolerance for values of size 1, stored in dtype and computed in at least float32."""
    return count * torch.finfo(arithmetic_dtype(dtype)).eps + torch.finfo(dtype).eps / 2


# angles


@FLOATS
@pytest.mark.parametrize("width", [1, 5, 512])
def test_identical_vectors_give_themselves(place: Place, dtype: torch.dtype, width: int) -> None:
    """The limit at c = 1: z = x̂, and ∂x = w (g - ⟨g, x̂⟩ x̂) / ‖x‖, for any weight."""
    x = cases.randn(64, width, dtype=dtype, device=place.device)
    g = cases.randn(64, width, seed=1, dtype=dtype, device=place.device)
    w = torch.linspace(0, 1, 64, device=place.device, dtype=arithmetic_dtype(dtype))
    z, dx, dy, dw = gradients(x, x.clone(), w, g)
    unit, norm, g64, w64 = F.normalize(x.double(), dim=1), x.double().norm(dim=1, keepdim=True), g.double(), w.double()[:, None]
    tangent = (g64 - (g64 * unit).sum(1, keepdim=True) * unit) / norm
    scale = g64.norm(dim=1, keepdim=True) / norm
    assert ((z.double() - unit).abs() <= ulps(dtype, 4)).all()
    assert ((dx.double() - w64 * tangent).abs() <= ulps(dtype, 8) * scale).all()
    assert ((dy.double() - (1 - w64) * tangent).abs() <= ulps(dtype, 8) * scale).all()
    assert (dw.abs() <= 8 * torch.finfo(dw.dtype).eps * g64.norm(dim=1)).all()


@pytest.mark.parametrize("apart", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_near_identical_vectors_keep_their_relative_accuracy(place: Place, apart: float) -> None:
    """Value and gradient keep all digits where arccos in float32 has none left."""
    x, noise, g = (cases.randn(64, 100, seed=seed, device=place.device) for seed in range(3))
    y, w = x + apart * noise, torch.full((64,), 0.3, device=place.device)
    single = gradients(x, y, w, g)
    with ik.use_backend("reference"):
        double = gradients(x.double(), y.double(), w.double(), g.double())
    scales = [1.0, *(g.norm(dim=1, keepdim=True) / tensor.norm(dim=1, keepdim=True) for tensor in (x, y))]
    for value, truth, scale in zip(single, double, scales, strict=False):
        assert ((value - truth).abs() <= 8 * torch.finfo(torch.float32).eps * scale).all()


@FLOATS
def test_opposite_vectors_stay_finite_and_bounded(place: Place, dtype: torch.dtype) -> None:
    """At c = -1 both terms are some 1/√(2δ) long and cancel: the norm is at most 1 within that many ulps."""
    arithmetic = arithmetic_dtype(dtype)
    x = cases.randn(64, 31, dtype=dtype, device=place.device)
    w = torch.linspace(0, 1, 64, device=place.device, dtype=arithmetic)
    z, *grads = gradients(x, -2 * x, w, torch.ones_like(x))
    lengthening = 4 * torch.finfo(arithmetic).eps / math.sqrt(2 * ANTIPODE_MARGIN[arithmetic])
    assert (z.double().norm(dim=1) <= 1 + lengthening + torch.finfo(dtype).eps).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("width", [4, 100, 9000])
@pytest.mark.parametrize("apart", [1e-5, 1e-3, 1e-2, 0.3])
def test_no_row_is_longer_than_one(place: Place, apart: float, width: int) -> None:
    """For nearly opposite vectors, z is the difference of two long vectors, but no longer than 1."""
    x, noise = (cases.randn(16, width, seed=seed, device=place.device) for seed in range(2))
    y = -x + apart * noise
    z = ik.geodesic_mixup(x, y, torch.linspace(0, 1, 16, device=place.device))
    assert (z.double().norm(dim=1) <= 1 + 16 * torch.finfo(torch.float32).eps).all()


def test_no_gradient_through_the_clamp(place: Place) -> None:
    """For vectors opposite along an axis, c is exactly -1, so that κ = 0 and ∂x = p (g - ⟨g, x̂⟩ x̂) / ‖x‖."""
    x = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64, device=place.device)
    g = torch.tensor([[5.0, 1.0, 0.0]], dtype=torch.float64, device=place.device)
    w = torch.full((1,), 0.3, dtype=torch.float64, device=place.device)
    _, dx, dy, _ = gradients(x, -x, w, g)
    c = torch.full((1,), -1.0, dtype=torch.float64)
    p, q = slerp_weight(w.cpu(), c).item(), slerp_weight(1 - w.cpu(), c).item()
    tangent = torch.tensor([[0.0, 0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(dx.cpu(), p * tangent, rtol=1e-14, atol=0)
    torch.testing.assert_close(dy.cpu(), q * tangent, rtol=1e-14, atol=0)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weights_0_and_1_give_the_ends(place: Place, weight: float) -> None:
    x, y = cases.feature_pairs(64, 31, torch.float32, place.device)
    z = ik.geodesic_mixup(x, y, weight)
    assert ((z - F.normalize(x if weight == 1 else y)).abs() <= 4 * torch.finfo(torch.float32).eps).all()


def test_weight_beyond_the_ends_continues_the_circle(place: Place) -> None:
    x = torch.tensor([[1.0, 0.0]], device=place.device)
    y = torch.tensor([[0.0, 1.0]], device=place.device)
    torch.testing.assert_close(ik.geodesic_mixup(x, y, 2.0), -y, rtol=0, atol=1e-6)
    torch.testing.assert_close(ik.geodesic_mixup(x, y, -1.0), -x, rtol=0, atol=1e-6)


@FLOATS
@pytest.mark.parametrize("weight", [30.0, 1e3, 1e6])
def test_identical_vectors_have_finite_gradients_by_any_weight(place: Place, dtype: torch.dtype, weight: float) -> None:
    """The coefficients of the series of ∂S/∂c overflow, their products with powers of h = 0 do not. With one column, ŷ = x̂."""
    x = torch.full((3, 1), 2.0, dtype=dtype, device=place.device)
    _, dx, dy, _ = gradients(x, x, torch.full((3,), weight, dtype=arithmetic_dtype(dtype), device=place.device), x / 2)
    assert dx.isfinite().all()
    assert dy.isfinite().all()


@FLOATS
@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_has_no_gradient_even_between_identical_vectors(
    place: Place, dtype: torch.dtype, weight: float
) -> None:
    """At c = 1, ∂S/∂s is 1 for every finite s; where z is NaN, the gradient must be NaN too. With one column, c is exactly
    1."""
    x = torch.full((1, 1), 2.0, dtype=dtype, device=place.device)
    z, _, _, dw = gradients(x, x, torch.full((1,), weight, dtype=arithmetic_dtype(dtype), device=place.device), x)
    assert z.isnan().all()
    assert dw.isnan().all()


def test_one_column_overflows_like_many(place: Place) -> None:
    x = torch.tensor([[1e38], [1.0]], device=place.device)
    assert ik.normalize(x).isnan().tolist() == [[True], [False]]


# rows that are dead or not finite


@FLOATS
def test_dead_rows(place: Place, dtype: torch.dtype) -> None:
    """‖x‖ <= eps: x̂ = x / eps as in `torch.nn.functional.normalize`, and exactly no gradient."""
    eps = 1e-3  # representable in float16, as are rows half as long
    x = cases.randn(5, 7, dtype=dtype, device=place.device)
    x[1], x[3] = 0.0, 0.5 * eps / math.sqrt(7)
    g = torch.full_like(x, 1e4)
    leaf = x.clone().requires_grad_()
    out = ik.normalize(leaf, eps=eps)
    out.backward(g)
    torch.testing.assert_close(out.detach(), F.normalize(x.double(), eps=eps).to(dtype))
    assert (leaf.grad[[1, 3]] == 0).all()
    assert (leaf.grad[[0, 2, 4]] != 0).any(dim=1).all()


def test_dead_rows_in_a_mixture(place: Place) -> None:
    """The other modality's row still gets a gradient: with x̂ = 0, z = S(1-w, 0) ŷ."""
    x, y, g = (cases.randn(4, 7, seed=seed, device=place.device) for seed in range(3))
    x[1] = 0.0
    y[2] = 0.0
    x[3] = y[3] = 0.0
    w = torch.full((4,), 0.5, device=place.device)
    z, dx, dy, dw = gradients(x, y, w, g)
    torch.testing.assert_close(z[1], math.sin(math.pi / 4) * F.normalize(y[1], dim=0))
    assert (dx[[1, 3]] == 0).all()
    assert (dy[[2, 3]] == 0).all()
    assert (dx[[0, 2]] != 0).any(dim=1).all()
    assert (dy[[0, 1]] != 0).any(dim=1).all()
    assert dw.isfinite().all()
    assert (z[3] == 0).all()


@FLOATS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_nan_and_touches_no_other(place: Place, dtype: torch.dtype, bad: float) -> None:
    x, y, g = (cases.randn(9, 31, seed=seed, dtype=dtype, device=place.device) for seed in range(3))
    w = torch.full((9,), 0.3, device=place.device, dtype=arithmetic_dtype(dtype))
    clean = gradients(x, y, w, g)
    x[2, 5] = bad
    y[7, 30] = bad
    bad_rows, good_rows = [2, 7], [0, 1, 3, 4, 5, 6, 8]
    for value, wanted in zip(gradients(x, y, w, g), clean, strict=True):
        assert value[bad_rows].isnan().all()
        assert torch.equal(value[good_rows], wanted[good_rows])
    unit = ik.normalize(x)
    assert unit[2].isnan().all()
    assert unit[[row for row in range(9) if row != 2]].isfinite().all()


# layouts


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same (B, D) values in another layout."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "every other column":
        return tensor.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "unaligned":  # starts one element after an aligned address
        return torch.cat([tensor[:1, :1].reshape(-1), tensor.reshape(-1)])[1:].view(tensor.shape)
    if layout == "padded rows":
        return F.pad(tensor, (0, 3))[:, :-3]
    return tensor


@FLOATS
@pytest.mark.parametrize("layout", ["transposed", "every other column", "unaligned", "padded rows"])
def test_any_strides(place: Place, dtype: torch.dtype, layout: str) -> None:
    x, y, g = (cases.randn(9, 31, seed=seed, dtype=dtype, device=place.device) for seed in range(3))
    w = torch.linspace(0, 1, 18, device=place.device, dtype=arithmetic_dtype(dtype))[::2]
    contiguous = gradients(x, y, w.contiguous(), g)
    # a strided row may be summed in another order: equal up to rounding
    tolerance = {"rtol": 0, "atol": ulps(dtype, 4) * g.double().norm(dim=1).max().item()}
    for value, wanted in zip(gradients(*(strided(t, layout) for t in (x, y)), w, strided(g, layout)), contiguous, strict=True):
        torch.testing.assert_close(value, wanted, **tolerance)


def test_expanded_inputs_and_gradient(place: Place) -> None:
    """Stride 0 in either dimension, as `expand` and the backward pass of `sum` make them."""
    x = cases.randn(1, 31, device=place.device).expand(9, 31)
    y = cases.randn(9, 1, seed=1, device=place.device).expand(9, 31)
    leaf_x, leaf_y = (tensor.detach().requires_grad_() for tensor in (x, y))
    ik.geodesic_mixup(leaf_x, leaf_y, 0.3).sum().backward()
    _, dx, dy = gradients(x.contiguous(), y.contiguous(), 0.3, torch.ones(9, 31, device=place.device))
    torch.testing.assert_close(leaf_x.grad, dx)
    torch.testing.assert_close(leaf_y.grad, dy)


def test_no_rows(place: Place) -> None:
    x, y = (torch.zeros(0, 7, device=place.device, requires_grad=True) for _ in range(2))
    weight = torch.tensor(0.3, device=place.device, requires_grad=True)
    z = ik.geodesic_mixup(x, y, weight) + ik.normalize(x)
    z.sum().backward()
    assert z.shape == x.grad.shape == y.grad.shape == (0, 7)
    assert weight.grad.item() == 0


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(place: Place, lead: tuple[int, ...]) -> None:
    x, y = (cases.randn(*lead, 7, seed=seed, device=place.device) for seed in range(2))
    w = torch.rand(lead, device=place.device)
    rows = ik.geodesic_mixup(x.reshape(-1, 7), y.reshape(-1, 7), w.reshape(-1))
    assert torch.equal(ik.geodesic_mixup(x, y, w), rows.view(x.shape))
    assert torch.equal(ik.normalize(x), ik.normalize(x.reshape(-1, 7)).view(x.shape))


# weights and gradients


@pytest.mark.parametrize("weight_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["0-d", "one weight per row"])
def test_gradient_of_the_weight_has_its_shape_and_dtype(
    place: Place, shape: tuple[int, ...], weight_dtype: torch.dtype
) -> None:
    x, y = (cases.randn(2, 3, 7, seed=seed, device=place.device) for seed in range(2))
    weight = torch.full(shape, 0.25, dtype=weight_dtype, device=place.device, requires_grad=True)
    z = ik.geodesic_mixup(x, y, weight)
    z.sum().backward()
    assert (weight.grad.shape, weight.grad.dtype) == (shape, weight_dtype)
    assert torch.equal(z.detach(), ik.geodesic_mixup(x, y, 0.25))
    by_row = torch.full((2, 3), 0.25, device=place.device, requires_grad=True)
    ik.geodesic_mixup(x, y, by_row).sum().backward()
    torch.testing.assert_close(weight.grad, (by_row.grad if shape else by_row.grad.sum()).to(weight_dtype))


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)), ids=str)
def test_every_combination_of_gradients(place: Place, needed: tuple[bool, ...]) -> None:
    x, y = cases.feature_pairs(5, 31, torch.float32, place.device)
    inputs = (x, y, torch.full((5,), 0.3, device=place.device))
    g = cases.randn(5, 31, seed=6, device=place.device)
    z, *all_grads = gradients(*inputs, g)
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
    out = ik.geodesic_mixup(*leaves)
    assert torch.equal(out.detach(), z)
    assert out.requires_grad is any(needed)
    if any(needed):
        out.backward(g)
    for leaf, need, grad in zip(leaves, needed, all_grads, strict=True):
        assert torch.equal(leaf.grad, grad) if need else leaf.grad is None


def test_rows_of_a_matrix_that_no_cache_holds() -> None:
    """From 32 MiB on the C++ kernels write past the caches: each row is bit-identical to that of a small matrix."""
    if not ik.backends()["cpp"].available:
        pytest.skip(str(ik.backends()["cpp"]))
    x, y, g = (cases.randn(8200, 1024, seed=seed) for seed in range(3))

    def step(rows: slice) -> list[Tensor]:
        leaves = [t[rows].clone().requires_grad_() for t in (x, y)]
        z = ik.geodesic_mixup(*leaves, 0.3)
        return [z.detach(), *torch.autograd.grad(z, leaves, g[rows])]

    with ik.use_backend("cpp"):
        for large, small in zip(step(slice(None)), step(slice(8100, None)), strict=True):
            assert torch.equal(large[8100:], small)
