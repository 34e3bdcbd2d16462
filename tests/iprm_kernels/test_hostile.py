"""Hostile values, shapes, strides and types: an operator raises an error that names the argument, or agrees
with the float64 reference.

`make fuzz` runs all examples of these tests, the test suite only some; both use the same examples in every run.
"""

from __future__ import annotations

import math
from typing import Any

import cases
import hostile
import hostile_results as results
import pytest
import torch
import torch.utils._pytree as pytree
import truths
from hostile import BATCHES, CLASSES, DTYPES, LAYOUTS, LOGITS, ROWS, SEEDS, UPSTREAM, WIDTHS, kinds_of, layouts
from hostile_calls import calls
from hostile_results import assert_agrees, counted, exact
from hypothesis import given
from hypothesis import strategies as st
from places import INTERPRETED, Place
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels.dtypes import arithmetic_dtype

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a hundred examples would take the interpreter minutes")

LEADS = st.sampled_from([lambda batch: (batch,), lambda batch: (1, batch), lambda batch: (2, batch, 1), lambda batch: ()])
WEIGHTS = [0.0, 0.3, 0.5, 1.0, -2.0, 3.0, 1e4, 1e30]


@given(st.data(), BATCHES, LEADS, WIDTHS, DTYPES, st.booleans(), st.sampled_from([1e-18, 1e-12, 1e-3, 1e18]))
@counted
def test_normalize_agrees_with_float64(
    fused: Place, data: Any, batch: int, lead: Any, width: int, dtype: torch.dtype, gradient: bool, eps: float
) -> None:
    shape = lead(batch)
    kinds, seed = data.draw(kinds_of(ROWS, math.prod(shape))), data.draw(SEEDS)
    x, _ = hostile.rows(ROWS, kinds, width, seed)
    x = LAYOUTS[data.draw(layouts(gradient))](x.to(fused.device, dtype).view(*shape, width))
    rows = exact(x).view(-1, width)
    g = hostile.upstream(data.draw(UPSTREAM), len(rows), width, seed + 2).to(fused.device, dtype)
    grad = LAYOUTS[data.draw(layouts(False))](g.view(x.shape))
    g = exact(grad).view(-1, width)
    own, of = x.detach().requires_grad_(gradient), {}
    out = ik.normalize(own, eps=eps)
    assert out.shape == x.shape
    if gradient:
        out.backward(grad)
    for kind, like in (("plain", dtype), ("double", torch.float64)):
        leaf = exact(rows, like).requires_grad_()
        with ik.use_backend("reference"):
            of[kind] = ik.normalize(leaf, eps=eps)
            of[kind].backward(g.to(like))
        of[f"{kind} gradient"] = leaf.grad
    beside = results.ordinary("mixup", width, dtype)
    assert_agrees("out", out.reshape(-1, width), of["plain"], of["double"], torch.ones(len(rows)), [beside["z"]])
    assert exact(out).view(-1, width)[results.overflows(rows, dtype)].isnan().all()
    if gradient:
        size = g.double().norm(dim=1) / rows.double().norm(dim=1).clamp(min=eps)
        grads = own.grad.reshape(-1, width), of["plain gradient"], of["double gradient"]
        assert_agrees("dx", *grads, size, [beside["dx"]])


@st.composite
def weights(draw: st.DrawFn, lead: tuple[int, ...], dtype: torch.dtype) -> float | Tensor:
    """A float, a 0-d tensor or a tensor of one weight per row, mostly in [0, 1], of any floating type."""
    form = draw(st.sampled_from(["float", "0-d", "rows"]))
    number = draw(st.sampled_from(WEIGHTS) | st.floats(0, 1))
    if form == "float":
        return number
    own = draw(st.sampled_from([arithmetic_dtype(dtype), torch.float64, torch.float16]))
    if form == "0-d":
        return torch.tensor(draw(st.sampled_from([number, math.nan, math.inf])), dtype=own)
    rows = math.prod(lead)
    several = draw(st.lists(st.floats(0, 1) | st.sampled_from([*WEIGHTS, math.nan, -math.inf]), min_size=rows, max_size=rows))
    return torch.tensor(several, dtype=own).view(lead)


@given(st.data(), BATCHES, LEADS, WIDTHS, DTYPES, st.tuples(*[st.booleans()] * 3))
@counted
def test_geodesic_mixup_agrees_with_float64(
    fused: Place, data: Any, batch: int, lead: Any, width: int, dtype: torch.dtype, needed: tuple[bool, bool, bool]
) -> None:
    shape = lead(batch)
    kinds, seed = data.draw(kinds_of(ROWS, math.prod(shape))), data.draw(SEEDS)
    pair = hostile.rows(ROWS, kinds, width, seed)
    x, y = (LAYOUTS[data.draw(layouts())](rows.to(fused.device, dtype).view(*shape, width)) for rows in pair)
    w, g = data.draw(weights(shape, dtype)), hostile.upstream(data.draw(UPSTREAM), len(kinds), width, seed + 2)
    w, g = w.to(fused.device) if isinstance(w, Tensor) else w, g.to(fused.device, dtype)
    grad = LAYOUTS[data.draw(layouts(False))](g.view(x.shape))
    g = exact(grad).view(-1, width)
    x_rows, y_rows = (exact(t).view(-1, width) for t in (x, y))
    w_rows = torch.as_tensor(w, dtype=torch.float64, device="cpu").to(arithmetic_dtype(dtype))
    each = w_rows.reshape(-1).expand(len(x_rows))

    leaves = {"x": x, "y": y, "w": w}
    leaves = {
        name: t.detach().requires_grad_(need) if isinstance(t, Tensor) else t
        for (name, t), need in zip(leaves.items(), needed, strict=True)
    }
    z = ik.geodesic_mixup(*leaves.values())
    assert z.shape == x.shape
    value = {"z": z.reshape(-1, width)}
    wanted = [name for name, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad]
    if wanted:
        z.backward(grad)
        value |= {f"d{name}": leaves[name].grad.reshape(-1, width) if name != "w" else leaves[name].grad for name in wanted}
    w_plain = exact(w).reshape(w_rows.shape if w_rows.dim() < 2 else -1) if isinstance(w, Tensor) else w_rows
    w_rows = w_rows.reshape(w_plain.shape)
    plain = truths.plain(truths.mixup_with_gradients, x_rows, y_rows, w_plain, g)
    double = truths.plain(truths.mixup_with_gradients, *(t.double() for t in (x_rows, y_rows, w_rows, g)))
    sizes = results.mixup_magnitudes(x_rows, y_rows, each, g)
    beside = results.ordinary("mixup", width, dtype)
    if w_rows.dim() == 0:
        sizes["dw"] = sizes["dw"].sum()[None]
    for name, found in value.items():
        of = plain[name]
        if name == "dw":
            assert found.dtype == of.dtype
            if of.dtype == torch.float64:  # results computed in float32 have only float32's digits
                found, of = found.to(arithmetic_dtype(dtype)), of.to(arithmetic_dtype(dtype))
            found = found.reshape(of.shape)
        assert_agrees(name, found, of, double[name], sizes[name], [beside[name]])
    broken = results.overflows(x_rows, dtype) | results.overflows(y_rows, dtype) | ~each.isfinite()
    z = exact(value["z"]).double()
    assert z[broken].isnan().all()
    inside = ~broken & (each >= 0) & (each <= 1)
    longest = 1 + 16 * torch.finfo(arithmetic_dtype(dtype)).eps + torch.finfo(dtype).eps
    assert (z[inside].norm(dim=1) <= longest).all()


@given(st.data(), BATCHES, CLASSES, DTYPES, st.sampled_from(["sum", "mean", "none"]), st.tuples(*[st.booleans()] * 2))
@counted
def test_batch_kl_agrees_with_float64(
    fused: Place, data: Any, batch: int, classes: int, dtype: torch.dtype, reduction: str, needed: tuple[bool, bool]
) -> None:
    kinds, seed = data.draw(kinds_of(LOGITS, batch)), data.draw(SEEDS)
    p, q = (LAYOUTS[data.draw(layouts())](rows.to(fused.device, dtype)) for rows in hostile.rows(LOGITS, kinds, classes, seed))
    wide = arithmetic_dtype(dtype)
    g = cases.randn(batch if reduction == "none" else 1, seed=seed + 2, dtype=wide)
    g = g if reduction == "none" else g[0]
    own = [t.detach().requires_grad_(need) for t, need in zip((p, q), needed, strict=True)]
    kl = ik.batch_kl(*own, reduction=reduction)
    value = {"kl": kl}
    if any(needed):
        kl.backward(LAYOUTS[data.draw(layouts(False))](g.to(fused.device)))
        value |= {name: t.grad for name, t, need in zip(("dp", "dq"), own, needed, strict=True) if need}

    def with_gradients(p: Tensor, q: Tensor, g: Tensor) -> dict[str, Tensor]:
        p, q = (t.detach().requires_grad_() for t in (p, q))
        kl = ik.batch_kl(p, q, reduction=reduction)
        kl.backward(g)
        return {"kl": kl.detach(), "dp": p.grad, "dq": q.grad}

    rows = (exact(p), exact(q), g)
    plain, double = truths.plain(with_gradients, *rows), truths.plain(with_gradients, *(t.double() for t in rows))
    share = g / batch if reduction == "mean" and batch else g
    sizes, beside = results.kl_magnitudes(*rows[:2], share.expand(batch)), results.ordinary("kl", classes, dtype)
    if reduction != "none":
        sizes["kl"] = sizes["kl"].sum()[None]
    for name, found in value.items():
        assert_agrees(name, found, plain[name], double[name], sizes[name], [beside[name]])
    lowest = exact(kl)[exact(kl).isfinite()]
    assert (lowest >= 0).all()


@given(
    st.data(),
    st.lists(st.sampled_from([0.0, 1e-40, 1e-38, 1e-3, 1.0, 7.0, 1e4, 1e38, math.inf, math.nan]), min_size=1, max_size=6),
    DTYPES,
)
@counted
def test_strength_weights_agree_with_float64(fused: Place, data: Any, kl: list[float], dtype: torch.dtype) -> None:
    values = LAYOUTS[data.draw(layouts())](torch.tensor(kl, dtype=torch.float64).to(fused.device, dtype))
    own = values.detach().requires_grad_()
    strength = ik.strength_weights(own)
    g = torch.linspace(1, 2, len(kl), dtype=dtype)
    strength.backward(g.to(fused.device))
    found: dict[str, Tensor] = {}
    for kind, like in (("plain", dtype), ("double", torch.float64)):
        leaf = exact(values, like).requires_grad_()
        with ik.use_backend("reference"):
            found[kind] = ik.strength_weights(leaf)
            found[kind].backward(g.to(like))
        found[f"{kind} gradient"] = leaf.grad
    # the tolerance of an element scales with its size; the smallest normal number replaces zero
    smallest = torch.finfo(arithmetic_dtype(dtype)).tiny / torch.finfo(arithmetic_dtype(dtype)).eps
    assert_agrees("strength", strength, found["plain"], found["double"], found["double"].double().clamp(min=smallest))
    if found["double"].isfinite().all():
        assert abs(exact(strength).double().sum() - 1) <= len(kl) * torch.finfo(dtype).eps


# refusals

#: Values that an argument accepts although they are not tensors, or not numbers.
TAKEN = {"bias": ("None",), "pairs": (None,), "group": (None,)}


@given(st.data(), st.sampled_from(sorted(calls(torch.float32))), DTYPES)
@counted
def test_what_cannot_be_an_argument_is_refused_by_its_name(data: Any, operator: str, dtype: torch.dtype) -> None:
    call = calls(dtype)[operator]
    call.run(call.arguments)
    name = data.draw(st.sampled_from(sorted(call.arguments)))
    valid = call.arguments[name]
    if not isinstance(valid, Tensor):
        value = data.draw(hostile.NUMBERS.filter(lambda value: value not in TAKEN.get(name, ())))
        results.assert_refused(call.with_argument(name, value), name)
        return
    wrong = hostile.NO_TENSOR | hostile.NOT_DENSE
    kind = data.draw(st.sampled_from(sorted(set(wrong) - set(TAKEN.get(name.split(" ")[-1], ())))))
    if name == "weight" and kind.startswith("float8"):  # accepted: a floating type
        call.with_argument(name, wrong[kind](valid))()
        return
    results.assert_refused(call.with_argument(name, wrong[kind](valid)), name)


@given(st.data(), st.sampled_from(sorted(calls(torch.float32))), DTYPES)
@counted
def test_what_does_not_fit_the_others_is_refused_or_served(data: Any, operator: str, dtype: torch.dtype) -> None:
    """Refused with the name of a misfit, or served if the change is valid, such as an extra dimension of all features."""
    call = calls(dtype)[operator]
    name = data.draw(st.sampled_from([name for name, value in call.arguments.items() if isinstance(value, Tensor)]))
    kind = data.draw(st.sampled_from(sorted(hostile.MISFITS)))
    value = hostile.MISFITS[kind](call.arguments[name])
    found = results.refused_or_none(call.with_argument(name, value), *call.names)
    alone = sum(isinstance(value, Tensor) for value in call.arguments.values()) == 1
    assert found is None or alone or name == "weight" or kind in ("a dimension less", "a number"), f"{name} {kind}"


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("operator", sorted(calls(torch.float32)))
def test_on_meta_shapes_and_types_are_those_of_the_cpu(operator: str, dtype: torch.dtype) -> None:
    call = calls(dtype)[operator]

    def moved(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    of = {name: moved(value) for name, value in call.arguments.items()}
    if operator == "probe_rebalance":
        of["head"] = lambda z: z.new_empty(of["logits_x"].shape)
    there, here = call.run(of), call.run(call.arguments)
    for value, wanted in zip(pytree.tree_leaves(there), pytree.tree_leaves(here), strict=True):
        assert (value.shape, value.dtype, value.device.type) == (wanted.shape, wanted.dtype, "meta")
