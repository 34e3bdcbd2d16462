"""Hostile inputs of fusion modules: refused with the name of the argument, or equal to the step in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import cases
import hostile
import hostile_results as results
import torch
from hostile import LAYOUTS, ROWS, SEEDS, kinds_of, layouts
from hostile_results import counted, exact
from hypothesis import given
from hypothesis import strategies as st
from iprm import ProbeRebalance
from iprm.fusion.module import FusionModule
from iprm.methods import METHODS, build
from torch import Tensor

import iprm_kernels as ik

D, C = 5, 3
NAMES = sorted({*METHODS, "unimodal-x"} - {"unimodal"})
MISFITS, INTEGERS = st.sampled_from(sorted(hostile.MISFITS)), st.sampled_from([torch.int64, torch.int32])
BATCHES = st.sampled_from([0, 1, 2, 5, 16])


def module(name: str, widths: Any = D, modalities: tuple[str, ...] = ("x", "y"), **options: Any) -> FusionModule:
    torch.manual_seed(0)
    return build(name, widths, C, modalities, **options).fusion


def in_double(fusion: FusionModule) -> FusionModule:
    return copy.deepcopy(fusion).double()


@given(st.data(), st.sampled_from(NAMES), BATCHES, SEEDS, st.booleans(), st.booleans(), st.sampled_from([D, {"x": 7, "y": D}]))
@counted
def test_a_method_agrees_with_float64(
    data: Any, name: str, batch: int, seed: int, training: bool, labelled: bool, widths: Any
) -> None:
    """Forward, backward and evaluation on rows of every kind. A batch with a NaN row does not change λ."""
    fusion = module(name, widths).train(training)
    kinds = data.draw(kinds_of(ROWS, batch))
    features = {}
    for modality, place in (("x", 0), ("y", 1)):
        width = widths if isinstance(widths, int) else widths[modality]
        rows = hostile.rows(ROWS, kinds, width, seed)[place].float()
        features[modality] = LAYOUTS[data.draw(layouts())](rows).detach().requires_grad_()
    target = torch.arange(batch) % C
    if batch and data.draw(st.booleans()):
        target[seed % batch] = -100
    double, plain = in_double(fusion), copy.deepcopy(fusion)
    before = {key: value.clone() for key, value in fusion.named_buffers()}
    with ik.use_backend("reference"):
        expected = [
            run(of, {key: exact(x, dtype).requires_grad_() for key, x in features.items()}, target if labelled else None)
            for of, dtype in ((plain, torch.float32), (double, torch.float64))
        ]
    found = run(fusion, features, target if labelled else None)
    assert found.keys() == expected[0].keys()
    tame = not ({"opposite", "nearly opposite", "beyond", "beyond both", "of all sizes", "long"} & set(kinds))
    for key, value in found.items():
        values = exact(value), exact(expected[0][key]), exact(expected[1][key])
        nowhere = ~values[1].isfinite() & ~values[2].isfinite()
        assert not values[0][nowhere].isfinite().any(), f"{key}: a number where there is none"
        somewhere = values[1].isfinite() & values[2].isfinite()
        if tame:
            assert values[0][somewhere].isfinite().all(), f"{key}: no number where there is one"
    if isinstance(fusion, ProbeRebalance):
        state = dict(fusion.named_buffers())
        assert all(value.isfinite().all() for value in state.values())
        assert 0 <= state["weight"] <= 1
        if not training:
            assert all(torch.equal(value, before[key]) for key, value in state.items())


def run(fusion: FusionModule, features: dict[str, Tensor], target: Tensor | None) -> dict[str, Tensor]:
    """Logits, and with labels the loss and all gradients."""
    out = fusion(features, target)
    found = {"logits": out.logits, **{f"logits_by {key}": value for key, value in out.logits_by.items()}}
    if target is None or out.loss is None:
        return found
    out.loss.backward()
    leaves = {**dict(fusion.named_parameters()), **features}
    return found | {"loss": out.loss} | {f"∂{key}": x.grad for key, x in leaves.items() if x.grad is not None}


FEATURES = hostile.NO_TENSOR | hostile.NOT_DENSE
#: Valid on their own: an integer dtype is valid for labels, and an extra row may be an extra row of all modalities.
LABELS = {kind: make for kind, make in FEATURES.items() if kind not in ("integers", "None", "float8 of exponents")}


@given(st.sampled_from(NAMES), st.booleans(), st.sampled_from(sorted(FEATURES)), st.sampled_from(sorted(LABELS)), st.booleans())
@counted
def test_wrong_features_and_labels_are_refused_by_name(
    name: str, training: bool, kind: str, label_kind: str, labels: bool
) -> None:
    fusion, x = module(name).train(training), cases.randn(4, D)
    target = torch.arange(4) % C
    if labels:
        wrong = LABELS[label_kind](target if label_kind in ("sparse", "a list", "an array", "a dict") else target.float())
        results.assert_refused(lambda: fusion({"x": x, "y": x}, wrong), "target")
    else:
        wrong = FEATURES[kind](x)
        results.assert_refused(lambda: fusion({"x": wrong, "y": x}, target), "features")


@given(
    st.sampled_from(NAMES), st.booleans(), st.sampled_from(sorted(hostile.MISFITS)), st.sampled_from(["x", "target", "mapping"])
)
@counted
def test_what_does_not_fit_is_refused_by_name(name: str, training: bool, kind: str, place: str) -> None:
    fusion, x = module(name).train(training), cases.randn(4, D)
    target = torch.arange(4) % C
    features: Any = {"x": x, "y": x}
    if place == "x":
        features["x"] = hostile.MISFITS[kind](x)
    elif place == "target":
        if kind in ("one column less", "no columns", "a dimension less", "of another type"):
            return
        target = hostile.MISFITS[kind](target)
    else:
        features = {"one row more": [x, x], "on meta": None, "a number": x, "no columns": {}}.get(kind, {"y": x, 3: x})
    results.assert_refused(lambda: fusion(features, target), "features", "target")


@given(
    st.sampled_from(NAMES),
    st.booleans(),
    st.sampled_from([-1, C, 2**31, -(2**31), 127]),
    st.sampled_from([torch.int64, torch.int32]),
)
@counted
def test_a_label_out_of_range_is_refused(name: str, training: bool, label: int, dtype: torch.dtype) -> None:
    fusion, x = module(name).train(training), cases.randn(4, D)
    target = torch.tensor([0, min(label, torch.iinfo(dtype).max), 1, -100], dtype=dtype)
    results.assert_refused(lambda: fusion({"x": x, "y": x}, target), "target")


WRONG_SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "feature_dim": st.sampled_from(
        [0, -1, 2.0, "5", None, True, [5], {"x": 5}, {"x": 5, "y": 0}, {}, math.nan, torch.tensor(5)]
    ),
    "num_classes": st.sampled_from([0, 1, -3, 2.0, "3", None, True, math.nan, [3], torch.tensor(3)]),
    "modalities": st.sampled_from(
        ["xy", (), ("x",), ("x", "x"), ("x", 1), ("x", ""), ("x", "a\n"), ("x", "mix"), None, 7, [None, "y"]]
    ),
    "alpha": st.sampled_from([-0.1, 1.1, math.nan, math.inf, "0.8", None, True, [0.5], 1j]),
    "pairs": st.sampled_from(["every", None, 1, True, ("all",), b"all", ["all"], {}]),
    "mixup": st.sampled_from(["slerp", None, 1, True, b"linear", {}]),
    "passes": st.sampled_from([0, 3, "2", None, True, math.nan, [2]]),
    "ema_start": st.sampled_from(["Paper", None, 0, True, {}]),
    "name": st.sampled_from(["iprn", "", None, 3, b"iprm", ["iprm"], "unimodal-z", "unimodal"]),
}


@given(st.data(), st.sampled_from(sorted(WRONG_SETTINGS)))
@counted
def test_a_wrong_setting_is_refused_by_name(data: Any, setting: str) -> None:
    value = data.draw(WRONG_SETTINGS[setting])
    given_ = {"name": "iprm", "feature_dim": D, "num_classes": C, "modalities": ("x", "y")} | {setting: value}
    results.assert_refused(lambda: build(**given_), setting, "method", "modality")
