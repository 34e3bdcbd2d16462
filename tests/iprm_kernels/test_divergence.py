"""`batch_kl` and `strength_weights` at the edges: impossible classes, equal and huge logits, zero and infinite divergences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import cases
import oracle
import pytest
import torch
from error_budget import FACTOR
from places import Place

import iprm_kernels as ik

INF, NAN = math.inf, math.nan


def on(place: Place, values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=place.device)


# batch_kl


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 6, 31, 1000])
def test_equal_logits_diverge_by_exactly_zero(place: Place, dtype: torch.dtype, classes: int) -> None:
    p = cases.randn(5, classes, dtype=dtype, device=place.device).requires_grad_()
    q = p.detach().clone().requires_grad_()
    kl = ik.batch_kl(p, q, reduction="none")
    kl.sum().backward()
    assert (kl == 0).all()
    assert (p.grad == 0).all()
    assert (q.grad == 0).all()


@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiny_divergences_are_accurate(place: Place, apart: float, dtype: torch.dtype) -> None:
    """For a KL of 1e-12, Σ P (log P - log Q) in float32 has no correct digit; Σ P φ(d) has nearly all."""
    p = cases.randn(3, 31, dtype=dtype)
    q = p + apart * cases.randn(3, 31, seed=1, dtype=dtype)
    kl = ik.batch_kl(p.to(place.device), q.to(place.device), reduction="none")
    for value, p_row, q_row in zip(kl.tolist(), p, q, strict=True):
        truth = oracle.batch_kl(oracle.row(p_row), oracle.row(q_row)).kl
        # the shift log ΣP - log ΣQ is rounded to an ulp of about 4, which enters KL squared
        doubt = (4 * torch.finfo(dtype).eps) ** 2 + 32 * torch.finfo(dtype).eps * truth
        assert abs(value - truth) <= doubt


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits_are_never_nan_nor_negative(place: Place, size: float, dtype: torch.dtype) -> None:
    p, q = (size * cases.randn(9, 31, seed=seed, dtype=dtype, device=place.device) for seed in range(2))
    q[0] = p[0]
    kl = ik.batch_kl(p.requires_grad_(), q.requires_grad_(), reduction="none")
    kl.sum().backward()
    assert kl[0] == 0
    assert (kl[1:] > 0).all()
    assert p.grad.isfinite().all()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize(
    ("p", "q", "kl"),
    [
        ([3e38, 0.0], [-3e38, -3e38], math.log(2)),
        ([1e9, 0.0], [0.0, 10.0], 10.0 + math.log1p(math.exp(-10))),
        ([0.0, -90.0], [-INF, 0.0], INF),  # exp(-90) is subnormal, but not zero
        ([90.0, 0.0], [0.0, -INF], INF),
    ],
    ids=str,
)
def test_extreme_rows(place: Place, p: list[float], q: list[float], kl: float) -> None:
    assert ik.batch_kl(on(place, [p]), on(place, [q])).item() == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize(("scale", "offset"), [(3, 1e3), (3, 1e6), (30, 0.0), (100, -1e4)])
def test_no_less_exact_than_log_softmax_at_any_size_and_offset(place: Place, scale: float, offset: float) -> None:
    p, q = (scale * cases.randn(64, 31, seed=seed) + (offset if seed == 0 else 0.0) for seed in range(2))

    def errors(kl: Callable[..., torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        narrow = [kl_and_gradients(kl, *(t.to(device, dtype) for t in (p, q))) for dtype in (torch.float32, torch.float64)]
        return [(a.double() - b).abs().max() for a, b in zip(*narrow, strict=True)]

    def plain(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="sum", log_target=True)

    for own, baseline in zip(errors(ik.batch_kl, place.device), errors(plain, torch.device("cpu")), strict=True):
        assert own <= FACTOR * baseline


def kl_and_gradients(kl: Callable[..., torch.Tensor], *logits: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.requires_grad_() for tensor in logits]
    value = kl(*leaves)
    return [value.detach().cpu(), *(grad.cpu() for grad in torch.autograd.grad(value, leaves))]


def test_impossible_classes(place: Place) -> None:
    """A logit of -inf: no term where P is zero; infinite where Q is zero and P is not; the class absent where both are."""
    p = on(place, [[0.0, 1.0, -INF], [0.0, 1.0, 2.0], [0.0, 1.0, -INF]])
    q = on(place, [[0.0, 1.0, 2.0], [0.0, 1.0, -INF], [1.0, 0.0, -INF]])
    kl = ik.batch_kl(p.requires_grad_(), q.requires_grad_(), reduction="none")
    # rows 0 and 2 by hand: P = (1, e)/(1+e); Q = (1, e, e²)/(1+e+e²), then (e, 1)/(1+e)
    e = math.e
    torch.testing.assert_close(kl[[0, 2]], on(place, [math.log((1 + e + e * e) / (1 + e)), (e - 1) / (1 + e)]))
    assert kl[1] == INF
    kl[[0, 2]].sum().backward()
    assert p.grad[[0, 2]].isfinite().all()
    assert q.grad[[0, 2]].isfinite().all()
    assert (p.grad[[0, 2], 2] == 0).all()


@pytest.mark.parametrize("side", [0, 1], ids=["p", "q"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_row_that_is_not_finite_is_nan_and_touches_no_other(place: Place, bad: float, side: int) -> None:
    logits = [cases.randn(5, 31, seed=seed, device=place.device) for seed in range(2)]
    clean = ik.batch_kl(*logits, reduction="none")
    logits[side][3, 30] = bad
    kl = ik.batch_kl(*(tensor.requires_grad_() for tensor in logits), reduction="none")
    kl.sum().backward()
    good = [0, 1, 2, 4]
    assert kl[3].isnan()
    assert torch.equal(kl[good], clean[good])
    assert logits[0].grad[3].isnan().all()
    assert not logits[1].grad[3].isfinite().all()
    assert all(tensor.grad[good].isfinite().all() for tensor in logits)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_reductions(place: Place, reduction: str) -> None:
    p, q = cases.logit_pairs(9, 31, torch.float32, place.device)
    rows = torch.nn.functional.kl_div(
        q.double().log_softmax(1), p.double().log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    wanted = rows if reduction == "none" else getattr(rows, reduction)()
    leaves = p.clone().requires_grad_(), q.clone().requires_grad_()
    value = ik.batch_kl(*leaves, reduction=reduction)
    torch.testing.assert_close(value.detach(), wanted.float())
    value.sum().backward()
    scale = 1 / 9 if reduction == "mean" else 1.0
    torch.testing.assert_close(leaves[1].grad, (scale * (q.softmax(1) - p.softmax(1))), rtol=1e-4, atol=1e-6)


def test_no_rows_diverge(place: Place) -> None:
    p = torch.zeros(0, 6, device=place.device, requires_grad=True)
    total = ik.batch_kl(p, p.detach())
    total.backward()
    assert total.item() == 0
    assert p.grad.shape == (0, 6)


def test_any_strides(place: Place) -> None:
    p, q = cases.logit_pairs(9, 31, torch.float32, place.device)
    wanted = ik.batch_kl(p, q, reduction="none")
    for strided in (p.T.contiguous().T, p.repeat_interleave(2, dim=1)[:, ::2]):
        torch.testing.assert_close(ik.batch_kl(strided, q, reduction="none"), wanted)
    one = p[:1].expand(9, 31)
    assert torch.equal(ik.batch_kl(one, q, reduction="none"), ik.batch_kl(one.contiguous(), q, reduction="none"))


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=2)), ids=str)
def test_every_combination_of_gradients(place: Place, needed: tuple[bool, ...]) -> None:
    inputs = cases.logit_pairs(5, 31, torch.float32, place.device)
    every = [tensor.clone().requires_grad_() for tensor in inputs]
    ik.batch_kl(*every).backward()
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
    total = ik.batch_kl(*leaves)
    assert total.requires_grad is any(needed)
    if any(needed):
        total.backward()
    for leaf, need, wanted in zip(leaves, needed, every, strict=True):
        assert torch.equal(leaf.grad, wanted.grad) if need else leaf.grad is None


# strength_weights


@pytest.mark.parametrize(
    ("kl", "strength"),
    [
        ([3.0], [1.0]),
        ([0.0], [1.0]),
        ([1.0, 3.0], [0.75, 0.25]),
        ([0.0, 3.0], [1.0, 0.0]),
        ([0.0, 0.0], [0.5, 0.5]),
        ([0.0, 2.0, 0.0], [0.5, 0.0, 0.5]),
        ([0.0] * 5, [0.2] * 5),
        ([INF, 2.0], [0.0, 1.0]),
        ([0.0, INF], [1.0, 0.0]),
        ([INF, INF], [0.5, 0.5]),
        ([2.0, 2.0, INF, 2.0], [1 / 3, 1 / 3, 0.0, 1 / 3]),
        ([NAN, 1.0], [NAN, NAN]),
        ([1e-38, 1e-38], [0.5, 0.5]),
        ([1e38, 3e38], [0.75, 0.25]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strength_weights(place: Place, kl: list[float], strength: list[float], dtype: torch.dtype) -> None:
    leaf = on(place, kl, dtype).requires_grad_()
    omega = ik.strength_weights(leaf)
    torch.testing.assert_close(omega.detach(), on(place, strength, dtype), equal_nan=True)
    omega[0].backward()
    assert leaf.grad.isfinite().all() or any(map(math.isnan, kl))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_strength_weights_of_narrow_types(place: Place, dtype: torch.dtype) -> None:
    kl = on(place, [1.0, 3.0], dtype).requires_grad_()
    strength = ik.strength_weights(kl)
    strength[0].backward()
    assert strength.dtype == kl.grad.dtype == dtype
    assert strength.tolist() == [0.75, 0.25]


def test_gradient_of_strength_weights_at_the_edges(place: Place) -> None:
    """The smallest KL have enormous slopes, but zero slope if both upstream gradients are equal; a NaN gives NaN."""
    for values, grad in (([1e-40, 1e-40], [1.0, 1.0]), ([NAN, 1.0], [1.0, 0.0])):
        kl = on(place, values).requires_grad_()
        ik.strength_weights(kl).backward(on(place, grad))
        assert kl.grad.isnan().all() if math.isnan(values[0]) else (kl.grad == 0).all()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_strength_weights_and_gradient_in_50_digits(place: Place, count: int) -> None:
    values = [0.1 * 3.0**m for m in range(count)]
    kl, g = on(place, values, torch.float64).requires_grad_(), on(place, [1.0 + m for m in range(count)], torch.float64)
    omega = ik.strength_weights(kl)
    omega.backward(g)
    truth = oracle.strength_weights(oracle.row(values))
    gradient = truth * (truth.dot(oracle.row(g)) - oracle.row(g)) / oracle.row(values)
    torch.testing.assert_close(omega.tolist(), truth.astype(float).tolist(), rtol=4e-16, atol=0)
    torch.testing.assert_close(kl.grad.tolist(), gradient.astype(float).tolist(), rtol=1e-14, atol=1e-16)
