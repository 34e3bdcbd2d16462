"""Valid outcomes of a call with hostile arguments: an error that names the argument, or the result of the float64 reference."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import error_budget
import pytest
import torch
import truths
from error_budget import Truth
from iprm.errors import InputError
from torch import Tensor

from iprm_kernels.convention import ANTIPODE_MARGIN
from iprm_kernels.dtypes import arithmetic_dtype

#: Completed examples by test name, which `make fuzz` reports.
EXAMPLES: collections.Counter[str] = collections.Counter()


def counted(test: Callable[..., None]) -> Callable[..., None]:
    """Wraps a test so that its examples are counted."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        test(*args, **kwargs)
        EXAMPLES[test.__name__] += 1

    return run


def assert_refused(call: Callable[[], Any], *names: str) -> None:
    """`call` raises a TypeError or ValueError that begins with one of the names."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert_named(caught.value, *names)


def assert_named(error: Exception, *names: str) -> None:
    assert type(error) in (TypeError, ValueError, InputError)
    assert re.match(rf"({'|'.join(map(re.escape, names))})(\b|[\[ :])", str(error)), f"names none of {names}: {error}"


def refused_or_none(call: Callable[[], Any], *names: str) -> Any:
    """The result of `call`; None if it refused an argument by name."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        assert_named(error, *names)
        return None


def exact(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor's numbers as a plain contiguous tensor on the CPU, of `dtype` if one is given."""
    return tensor.detach().as_subclass(Tensor).resolve_neg().contiguous().clone().cpu().to(dtype or tensor.dtype)


# geodesic


def overflows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that are NaN throughout: not finite, or with a squared length beyond the arithmetic of `dtype`.  (B, D) -> (B,)"""
    return ~(rows.double().square().sum(1) < torch.finfo(arithmetic_dtype(dtype)).max)


def mixup_magnitudes(x: Tensor, y: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The size of the terms of the rows of results, to which rounding errors are proportional.

    For weights in [0, 1] and c of at least -0.9, as in test_accuracy.py. Outside, S(w, c) and its derivatives in c, which
    multiply rounding errors of c and w, grow like s √n, s³ n^1.5 and s⁵ n^2.5, with s = max(|w|, |1-w|) and n = 1/(1+c).

    x, y, g (B, D), w (B,), of the type under test.
    """
    margin = ANTIPODE_MARGIN[arithmetic_dtype(x.dtype)]
    x, y, w, g = (tensor.double() for tensor in (x, y, w, g))
    x_norm, y_norm = (rows.norm(dim=1).clamp(min=truths.EPS) for rows in (x, y))
    c = ((x / x_norm[:, None]) * (y / y_norm[:, None])).sum(1).clamp(min=-1 + margin)
    s, n = torch.maximum(w.abs(), (1 - w).abs()), 1 / (1 + c)
    wild = ~((w >= 0) & (w <= 1) & (c >= -0.9))
    terms = [torch.where(wild, s ** (2 * k + 1) * n ** (k + 0.5), 0) for k in range(3)]
    one, g_norm = torch.ones_like(s), g.norm(dim=1)
    of_gradient = (one + sum(terms)) * g_norm
    sizes = {"z": one + terms[0] + terms[1], "dx": of_gradient / x_norm, "dy": of_gradient / y_norm}
    return {**sizes, "dw": g_norm * (one + s * (terms[0] + terms[1])), "out": one}


# divergence


def kl_magnitudes(p: Tensor, q: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Likewise for `batch_kl`. Rounding of the logits moves a KL by Σ|∂KL/∂logits|; P is accurate to the smallest normal
    number, and exponentials to the ulps of their arguments.

    p, q (B, C), g (B,), of the type under test.
    """
    info = torch.finfo(arithmetic_dtype(p.dtype))
    p, q, g = (tensor.double() for tensor in (p, q, g))
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    own, other = log_p.exp(), log_q.exp()
    a, b = (rows - rows.amax(1, keepdim=True) for rows in (p, q))
    d = ((a - b) - (a.exp().sum(1) / b.exp().sum(1)).log()[:, None]).abs().nan_to_num(0, posinf=0)
    known_to = info.tiny / info.eps * (1 + d.amax(1))
    spread = 1 + torch.maximum(-log_p, -log_q).nan_to_num(0, posinf=0).amax(1).clamp(max=-torch.tensor(info.tiny).log())
    apart = (a != b).any(1)
    kl = (own * d).sum(1) * spread + torch.where(apart, known_to, info.tiny)
    terms = (own * (d + (own * d).sum(1, keepdim=True))).amax(1) * spread + known_to
    gradients = g.abs() * (terms + torch.where(apart, torch.maximum(own, other).amax(1), 0) * spread) + info.tiny
    return {"kl": kl, "dp": gradients, "dq": gradients}


# both


@functools.cache
def ordinary(kind: str, width: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Truth, Tensor]]:
    """For ordinary inputs, the results of plain torch, the true results, and the magnitudes, by result.

    They are added to the hostile rows when the error of plain torch is measured, which may be zero by chance for few rows."""
    if kind == "kl":
        inputs, truth = truths.kl_truth(64, width, dtype)
        values, sizes = truths.plain(truths.kl_with_gradients, *inputs), kl_magnitudes(*inputs)
    else:
        inputs, truth = truths.mixup_truth(64, width, dtype)
        values, sizes = truths.plain(truths.mixup_with_gradients, *inputs), mixup_magnitudes(*inputs)
    return {name: (values[name], truth[name], sizes[name]) for name in values}


def assert_agrees(
    name: str,
    value: Tensor,
    plain: Tensor,
    double: Tensor,
    magnitude: Tensor,
    beside: Iterable[tuple[Tensor, Truth, Tensor]] = (),
    truth: Truth | None = None,
) -> None:
    """`value` is NaN or infinite where the reference is, and within the error budget of the truth elsewhere.

    Args:
        value, plain, double: (B, ...) by the backend, by plain torch at the type under test, and in float64 (or (),
            one row). Where only one of them overflows or underflows, any value is allowed.
        magnitude: (B,). A row whose magnitude is not finite in the type under test may have any value.
        beside: further rows of the same kind to measure plain torch on: its results, the true results, and magnitudes.
        truth: shaped like `value`; None means `double`, whose error for a float64 `value` may be that of plain torch.
    """
    assert value.dtype == plain.dtype, name
    assert value.shape == plain.shape == double.shape, name
    rows = max(1, len(magnitude))
    if truth is None:
        truth = Truth.of(double)
        if value.dtype == torch.float64:
            magnitude = magnitude * ((error_budget.FACTOR + 1) / error_budget.FACTOR)
    value, plain, double, high, low = (exact(tensor).reshape(rows, -1) for tensor in (value, plain, double, *truth))
    if value.numel() == 0:
        return
    assert not value[~double.isfinite() & ~plain.isfinite()].isfinite().any(), f"{name}: a finite number where none is expected"
    # rows whose rounding errors alone may overflow are not compared
    known = (double.isfinite() & plain.isfinite()).all(1) & (magnitude <= torch.finfo(value.dtype).max)
    assert value[known].isfinite().all(), f"{name}: no number where there is one: {value[known]}, not {double[known]}"
    if known.any():
        columns = value.shape[1]
        others = [(b.reshape(-1, columns).to(value), t, m) for b, t, m in beside]
        error_budget.assert_within_budget(
            name,
            torch.cat([value[known], *(other for other, *_ in others)]),
            torch.cat([plain[known], *(other for other, *_ in others)]),
            Truth(
                torch.cat([high[known], *(of.high.reshape(-1, columns) for _, of, _ in others)]),
                torch.cat([low[known], *(of.low.reshape(-1, columns) for _, of, _ in others)]),
            ),
            torch.cat([magnitude[known].double(), *(m.double() for *_, m in others)]).clamp(min=torch.finfo(value.dtype).tiny),
        )
