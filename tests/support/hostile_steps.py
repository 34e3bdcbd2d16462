"""The linear head step on hostile inputs: results in plain torch and float64, and where their digits are reliable."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import head_accuracy
import head_oracle
import heads
import torch
from error_budget import Truth
from heads import LEAVES, Step
from hostile_results import assert_agrees, exact
from torch import Tensor

import iprm_kernels as ik

#: For the inputs of head_accuracy.py, rounding moves log ω by up to 24 ulps; beyond, results that depend on ω are not compared.
MOST_OF_STRENGTH = 30.0
#: Kinds for which c has nearly no reliable digit: see `cases.feature_pairs`.
LEAST_COSINE = -0.9
THROUGH = ("loss", "logits_mix")

StepCall = Callable[..., ik.StepResult]


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: exact(t, torch.float64 if t.is_floating_point() else None) if isinstance(t, Tensor) else t
            for name, t in inputs.items()}  # fmt: skip


def by_reference(inputs: dict[str, Any], call: StepCall, **options: Any) -> Step:
    with ik.use_backend("reference"):
        return heads.run(inputs, call=call, through=THROUGH, **options)


def results_of(step: Step) -> dict[str, Tensor]:
    found = step.outputs | {name: t for name, t in step.gradients.items() if t is not None}
    return {name: exact(t).reshape(len(t) if t.dim() else 1, math.prod(t.shape[1:])) for name, t in found.items()}


def magnitudes_of(inputs: dict[str, Any], truth: dict[str, Truth], ignore_index: int) -> dict[str, Tensor]:
    """Magnitudes as in head_accuracy.py, whose means are over all rows, for means over the rows that count. The error of a
    softmax is proportional to the size of its logits, so gradients have larger errors with the large logits of hostile
    heads."""
    target = inputs["target"]
    counted = target != ignore_index
    place = torch.where(counted, target, 0)
    biases = {name: torch.zeros(len(inputs["weight_x"])) for name in ("bias_x", "bias_y", "bias_mix") if inputs[name] is None}
    sizes = head_accuracy.magnitudes(inputs | biases | {"target": place}, truth)
    share = len(target) / max(1, int(counted.sum()))
    logits = 1 + max(float(sizes[f"logits_{m}"].max()) for m in ("mix", "x", "y"))
    factors = dict.fromkeys(LEAVES, share * logits) | {"loss": share, "losses": share}
    return {name: size * factors.get(name, 1.0) for name, size in sizes.items()}


def truth_of(inputs: dict[str, Any], double: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Truth]:
    """The truth: for float64 the step in long double, for narrower types `double`, the reference in float64."""
    if dtype != torch.float64:
        return {name: Truth.of(t) for name, t in double.items()}
    upstream = heads.weights((len(inputs["x"]), len(inputs["weight_x"])), dtype).numpy()
    return head_oracle.linear_probe_rebalance(inputs, options["label_smoothing"], upstream, options.get("ignore_index", -100))


@functools.cache
def ordinary(width: int, classes: int, dtype: torch.dtype, call: StepCall) -> dict[str, tuple[Tensor, Truth, Tensor]]:
    """For the ordinary inputs of `heads`, the results of plain torch, the true results, and magnitudes, by result."""
    inputs, options = heads.inputs(17, width, classes, dtype), {"label_smoothing": 0.1}
    truth = truth_of(inputs, results_of(by_reference(in_double(inputs), call, **options)), dtype, **options)
    values = results_of(by_reference(inputs, call, **options))
    sizes = magnitudes_of(inputs, truth, ignore_index=-100)
    return {name: (value, truth[name], sizes[name]) for name, value in values.items()}


def cosines(inputs: dict[str, Any]) -> Tensor:
    x, y = (torch.nn.functional.normalize(exact(inputs[m], torch.float64), dim=1) for m in "xy")
    return (x * y).sum(1)


def assert_step_agrees(step: Step, call: StepCall, dtype: torch.dtype) -> bool:
    """Outputs and gradients of a step within the budget, if the digits of its ω are reliable.  -> whether they are"""
    inputs = {name: exact(t) if isinstance(t, Tensor) else t for name, t in step.inputs.items()}
    options = {name: value for name, value in step.options.items() if name not in ("through", "needed")}
    plain = results_of(by_reference(inputs, call, **options))
    double = results_of(by_reference(in_double(inputs), call, **options))
    strength = exact(step.outputs["strength"]).double()
    whole = all(t.isfinite().all() for t in double.values()) and all(t.isfinite().all() for t in plain.values())
    if whole:
        assert ((strength >= 0) & (strength <= 1)).all()
        assert abs(strength.sum() - 1) <= 4 * torch.finfo(strength.dtype if dtype == torch.float64 else torch.float32).eps
    sizes: dict[str, Tensor] = {}
    truth: dict[str, Truth] = {}
    known = whole and bool((cosines(inputs) >= LEAST_COSINE).all()) and (dtype != torch.float64 or head_oracle.EXTENDED)
    if known:
        truth = truth_of(inputs, double, dtype, **options)
        sizes = magnitudes_of(inputs, truth, options.get("ignore_index", -100))
        known = bool((sizes["strength"] <= MOST_OF_STRENGTH).all())
    classes, width = inputs["weight_x"].shape
    for name, value in results_of(step).items():
        if known:
            beside = [ordinary(width, classes, dtype, call)[name]]
            assert_agrees(name, value, plain[name], double[name], sizes[name], beside, truth[name])
        else:
            nowhere = ~double[name].isfinite() & ~plain[name].isfinite()
            assert not value[nowhere].isfinite().any(), f"{name}: a finite number where none is expected"
    return known
