"""The gradient of a row that the loss does not select is exactly zero, also where the row or its result is not finite."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from places import Place
from torch import Tensor

import iprm_kernels as ik

INF, NAN = math.inf, math.nan
B, D = 5, 37  # not a multiple of any vector; row 3 is the one that is not selected
KEPT = [0, 1, 2, 4]
EACH_TYPE = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
SELECTIONS = pytest.mark.parametrize("select", ["mask", "index", "where"])


def selected(rows: Tensor, how: str) -> Tensor:
    """The sum over all rows but row 3, by what users write."""
    keep = torch.tensor([True, True, True, False, True], device=rows.device)
    if how == "index":
        return rows[keep].sum()
    if how == "where":
        keep = keep.view(-1, *(1,) * (rows.dim() - 1))
        return torch.where(keep, rows, torch.zeros_like(rows)).sum()
    return rows.masked_fill(~keep.view(-1, *(1,) * (rows.dim() - 1)), 0).sum()


def assert_zero_in_row_3(leaves: list[Tensor], clean: list[Tensor]) -> None:
    for leaf, other in zip(leaves, clean, strict=True):
        assert (leaf.grad[3] == 0).all()
        assert torch.equal(leaf.grad[KEPT], other.grad[KEPT])
        assert leaf.grad[KEPT].isfinite().all()


ROWS = {
    "impossible in q": (None, [-INF, *[0.0] * (D - 1)]),
    "impossible in all of q but one": (None, [0.0, *[-INF] * (D - 1)]),
    "all of q masked": (None, [-INF] * D),
    "all of p masked": ([-INF] * D, None),
    "both masked": ([-INF] * D, [-INF] * D),
    "nan in p": ([NAN, *[0.0] * (D - 1)], None),
    "nan in q": (None, [NAN, *[0.0] * (D - 1)]),
    "infinite in p": ([INF, *[0.0] * (D - 1)], None),
    "infinite in q": (None, [INF, *[0.0] * (D - 1)]),
}


@EACH_TYPE
@SELECTIONS
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_divergence(place: Place, rows: tuple[list[float] | None, ...], select: str, dtype: torch.dtype) -> None:
    found = []
    for spoiled in (True, False):
        leaves = [cases.randn(B, D, seed=seed, dtype=dtype, device=place.device) for seed in range(2)]
        for leaf, row in zip(leaves, rows, strict=True):
            if spoiled and row is not None:
                leaf[3] = torch.tensor(row, dtype=dtype, device=place.device)
            leaf.requires_grad_()
        selected(ik.batch_kl(*leaves, reduction="none"), select).backward()
        found.append(leaves)
    assert_zero_in_row_3(*found)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_divergence_of_one_side(place: Place, needed: tuple[bool, bool]) -> None:
    p, q = (cases.randn(B, D, seed=seed, device=place.device) for seed in range(2))
    q[3, 5] = -INF
    leaves = [leaf.requires_grad_(need) for leaf, need in zip((p, q), needed, strict=True)]
    kl = ik.batch_kl(*leaves, reduction="none")
    assert kl[3] == INF
    (gradient,) = torch.autograd.grad(kl, [leaf for leaf in leaves if leaf.requires_grad], kl.isfinite().to(kl.dtype))
    assert (gradient[3] == 0).all()
    assert gradient.isfinite().all()
    assert gradient[KEPT].any(1).all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_divergence_that_nothing_selects(place: Place, reduction: str) -> None:
    p, q = (cases.randn(B, D, seed=seed, device=place.device) for seed in range(2))
    q[3, 5] = -INF
    kl = ik.batch_kl(p.requires_grad_(), q.requires_grad_(), reduction=reduction)
    torch.autograd.backward(kl, torch.zeros_like(kl))
    assert (p.grad == 0).all()
    assert (q.grad == 0).all()


def test_a_row_that_is_selected_keeps_its_infinite_gradient(place: Place) -> None:
    p, q = (cases.randn(B, D, seed=seed, device=place.device) for seed in range(2))
    q[3, 5] = -INF
    ik.batch_kl(p.requires_grad_(), q.requires_grad_(), reduction="none").sum().backward()
    assert not p.grad[3].isfinite().all()
    assert p.grad[KEPT].isfinite().all()


FEATURES = {"nan": NAN, "infinite": INF, "overflowing": 3e38}


@EACH_TYPE
@pytest.mark.parametrize("value", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("width", [D, 3000])
def test_mixture(place: Place, width: int, side: int, value: float, dtype: torch.dtype) -> None:
    if value == 3e38 and dtype in (torch.float16, torch.float64):
        value = torch.finfo(dtype).max
    found = []
    for spoiled in (True, False):
        leaves = [cases.randn(B, width, seed=seed, dtype=dtype, device=place.device) for seed in range(2)]
        if spoiled:
            leaves[side][3, :2] = value
        weight = torch.full((B,), 0.3, dtype=torch.promote_types(dtype, torch.float32), device=place.device)
        leaves = [leaf.requires_grad_() for leaf in (*leaves, weight)]
        selected(ik.geodesic_mixup(*leaves), "mask").backward()
        found.append(leaves)
    assert_zero_in_row_3(*found)


@EACH_TYPE
@pytest.mark.parametrize("value", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("width", [D, 3000])
def test_unit_rows(place: Place, width: int, value: float, dtype: torch.dtype) -> None:
    if value == 3e38 and dtype in (torch.float16, torch.float64):
        value = torch.finfo(dtype).max
    found = []
    for spoiled in (True, False):
        x = cases.randn(B, width, dtype=dtype, device=place.device)
        if spoiled:
            x[3, :2] = value
        selected(ik.normalize(x.requires_grad_()), "mask").backward()
        found.append([x])
    assert_zero_in_row_3(*found)


def test_the_weight_of_a_mixture_of_rows_that_are_not_selected(place: Place) -> None:
    x, y = (cases.randn(B, D, seed=seed, device=place.device) for seed in range(2))
    x[3, 0] = INF
    weight = torch.tensor(0.3, device=place.device, requires_grad=True)
    z = ik.geodesic_mixup(x, y, weight)
    z.masked_fill(~z.isfinite(), 0).sum().backward()
    assert weight.grad.isfinite()
