"""Hostile arguments: strategies for values, layouts and types that an operator must support, and for those it must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cases
import torch
from hypothesis import strategies as st
from torch import Tensor

BATCHES = st.sampled_from([0, 1, 2, 3, 7, 16, 33])
WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100])
CLASSES = st.sampled_from([1, 2, 3, 6, 15, 16, 17, 31, 65])
SEEDS = st.integers(0, 10_000)
UPSTREAM = st.sampled_from(["ordinary", "ordinary", "zero", "NaN", "infinite"])
DTYPES = st.sampled_from(cases.DTYPES)

#: Functions that turn a pair of rows (x, y) of unit scale into the named kind.
ROWS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ordinary": lambda x, y: (x, y),
    "identical": lambda x, y: (x, x),
    "parallel": lambda x, y: (x, 3 * x),
    "close": lambda x, y: (x, x + 1e-5 * y),
    "opposite": lambda x, y: (x, -2 * x),
    "nearly opposite": lambda x, y: (x, -x + 1e-3 * y),
    "zero": lambda x, y: (0 * x, y),
    "both zero": lambda x, y: (0 * x, -0.0 * y),
    "dead": lambda x, y: (1e-14 * x, y),
    "subnormal": lambda x, y: (1e-40 * x, y),
    "short": lambda x, y: (1e-6 * x, 1e-3 * y),
    "long": lambda x, y: (1e3 * x, 1e6 * y),
    "beyond": lambda x, y: (1e38 * x, y),
    "beyond both": lambda x, y: (1e300 * x, 1e300 * y),
    "one-hot": lambda x, y: (_one_hot(x), _one_hot(y.flip(0))),
    "of all sizes": lambda x, y: (x * torch.logspace(-8, 4, len(x), dtype=x.dtype), y),
    "NaN": lambda x, y: (_at_one_place(x, math.nan), y),
    "infinite": lambda x, y: (x, _at_one_place(y, math.inf)),
    "infinite both": lambda x, y: (_at_one_place(x, -math.inf), _at_one_place(y, math.inf)),
    "all NaN": lambda x, y: (x + math.nan, y + math.nan),
}
#: The kinds whose results are finite, with angles below 154° if there is more than one column.
TAME = {kind: ROWS[kind] for kind in ("ordinary", "identical", "close", "zero", "both zero", "dead", "subnormal", "one-hot")}
#: Likewise for logits.
LOGITS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "ordinary": lambda p, q: (3 * p, 3 * q),
    "identical": lambda p, q: (p, p),
    "close": lambda p, q: (p, p + 1e-4 * q),
    "shifted": lambda p, q: (p, p + 100),
    "flat": lambda p, q: (0 * p, 0 * q),
    "steep": lambda p, q: (50 * p, 50 * q),
    "certain": lambda p, q: (1e4 * p, 1e4 * q),
    "huge": lambda p, q: (1e38 * p, 1e38 * q),
    "subnormal": lambda p, q: (1e-40 * p, 1e-40 * q),
    "impossible class": lambda p, q: (_at_one_place(p, -math.inf), _at_one_place(q, -math.inf)),
    "impossible in Q": lambda p, q: (p, _at_one_place(q, -math.inf)),
    "no class possible": lambda p, q: (p - math.inf, q),
    "infinite": lambda p, q: (_at_one_place(p, math.inf), q),
    "NaN": lambda p, q: (p, _at_one_place(q, math.nan)),
}


def _at_one_place(row: Tensor, value: float) -> Tensor:
    row = row.clone()
    row[len(row) // 2] = value
    return row


def _one_hot(row: Tensor) -> Tensor:
    return _at_one_place(0 * row, 1.0)


def kinds_of(table: dict[str, Any], batch: int) -> st.SearchStrategy[list[str]]:
    """The kind of each row, half of them ordinary."""
    return st.lists(st.just("ordinary") | st.sampled_from(sorted(table)), min_size=batch, max_size=batch)


def rows(table: dict[str, Any], kinds: list[str], width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs of rows of the kinds drawn, in float64.  -> (B, D) x2"""
    x, y = (cases.randn(len(kinds), width, seed=seed + k, dtype=torch.float64) for k in range(2))
    for row, kind in enumerate(kinds):
        x[row], y[row] = table[kind](x[row], y[row])
    return x, y


def upstream(kind: str, rows: int, width: int, seed: int) -> Tensor:
    """A gradient of ordinary numbers, zeros, or with one row that is not finite, in float64.  -> (B, D)"""
    g = cases.randn(rows, width, seed=seed, dtype=torch.float64)
    if kind == "zero":
        return 0 * g
    if kind != "ordinary" and rows:
        g[seed % rows] = _at_one_place(g[seed % rows], math.nan if kind == "NaN" else math.inf)
    return g


# layouts: the same numbers in another memory layout


class Subclass(Tensor):
    """A user-defined tensor subclass."""


def _filler(t: Tensor) -> float:
    """A value in unused memory, which no result may depend on."""
    return math.nan if t.is_floating_point() else torch.iinfo(t.dtype).max


def _columns_first(t: Tensor) -> Tensor:
    return t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() > 1 else t


def _every_other(t: Tensor) -> Tensor:
    wide = t.new_full([2 * size + 1 for size in t.shape], _filler(t))
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def _unaligned(t: Tensor) -> Tensor:
    return torch.cat([t.new_full((1,), _filler(t)), t.reshape(-1)])[1:].view(t.shape)


def _one_row_for_all(t: Tensor) -> Tensor:
    return t[:1].expand_as(t) if t.dim() > 1 and len(t) else t


def _one_column_for_all(t: Tensor) -> Tensor:
    return t[..., :1].expand_as(t) if t.dim() > 1 else t


def _negated(t: Tensor) -> Tensor:
    """A tensor with the negative bit set, whose memory holds the negated numbers."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t


def _of_inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


#: Layouts that make rows or columns equal.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "columns first": _columns_first,
    "every other": _every_other,
    "unaligned": _unaligned,
    "one row for all": _one_row_for_all,
    "one column for all": _one_column_for_all,
    "negated": _negated,
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "a subclass": lambda t: t.as_subclass(Subclass),
    "of inference": _of_inference,
}
WITH_GRADIENT = sorted(set(LAYOUTS) - {"of inference", "a parameter"})


def layouts(gradient: bool = True) -> st.SearchStrategy[str]:
    """Names of LAYOUTS; only those that can receive a gradient, if one is needed."""
    return st.sampled_from(WITH_GRADIENT if gradient else sorted(LAYOUTS))


# arguments that must be refused by name

NO_TENSOR: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda t: [t.tolist()],
    "an array": lambda t: t.detach().float().reshape(-1).numpy(),  # of one dimension: one of none is a number
    "None": lambda t: None,
    "a string": lambda t: "0.5",
    "a class": lambda t: Tensor,
    "bytes": lambda t: b"\x00",
    "a dict": lambda t: {"x": t},
    "integers": lambda t: t.detach().nan_to_num(0).clamp(0, 1).int(),
    "booleans": lambda t: t.detach() > 0,
    "complex": lambda t: torch.complex(t.detach().float(), t.detach().float()),
    "float8": lambda t: t.detach().float().to(torch.float8_e4m3fn),
    "float8 of exponents": lambda t: t.detach().float().to(torch.float8_e8m0fnu),
}
NOT_DENSE: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda t: t.detach().to_sparse(),
    "compressed rows": lambda t: torch.zeros(max(1, len(t)) if t.dim() else 1, 3, dtype=t.dtype).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], dtype=t.dtype),
    "jagged": lambda t: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], dtype=t.dtype, layout=torch.jagged),
}
#: Refused only for arguments that they do not fit.
MISFITS: dict[str, Callable[[Tensor], Any]] = {
    "on meta": lambda t: t.detach().to("meta"),
    "one row more": lambda t: torch.cat([t.detach(), t.detach().new_zeros(1, *t.shape[1:])]) if t.dim() else t[None],
    "one column less": lambda t: t.detach()[..., :-1] if t.dim() else t[None],
    "no columns": lambda t: t.detach()[..., :0] if t.dim() else t[None],
    "a dimension more": lambda t: t.detach()[None],
    "a dimension less": lambda t: t.detach().reshape(-1),
    "a number": lambda t: t.detach().new_zeros(()),
    "of another type": lambda t: t.detach().to(torch.float64 if t.dtype != torch.float64 else torch.float32),
}
NUMBERS = st.sampled_from(["0.5", None, True, [0.5], 1j, math.nan, math.inf, -math.inf, 10**400, -(10**400), 1e309, b"1", {}])
