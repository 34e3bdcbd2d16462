"""Compares one operator of a backend with the float64 reference on one shape: errors, repeats, unwritten memory, bad labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import use_backend
from .error_budget import excess
from .operators import OPERATORS, Inputs, Operator, Shape, Values, differentiable, runner
from .poison import poisoned

#: Relative change of inputs that measures the size of the terms in a result.
NUDGE = 2.0**-20
#: Such changes, with different signs, that are added: the effects of one alone may cancel.
NUDGES = 3
#: Runs whose results must be bit-identical.
RUNS = 3


def check(backend: str, name: str, dtype: torch.dtype, shape: Shape, device: torch.device) -> str:
    """A sentence on what is wrong with an operator of a backend; empty if nothing is.

    Raises:
        Exception: whatever the operator raises.
    """
    operator = OPERATORS[name]
    inputs, given = (operator.inputs(shape, dtype, device) for _ in range(2))
    with poisoned(), use_backend(backend):
        run = runner(operator, given)
        values, *repeats = (run() for _ in range(RUNS))
    for result, value in values.items():
        if not value.isfinite().all():
            return f"{result}: not finite, or not written"
    for argument, value in inputs.items():
        if isinstance(value, Tensor) and not torch.equal(value, given[argument]):
            return f"it changes its input {argument}"
    truth, baseline, terms = _expected(operator, inputs, dtype)
    for result, value in values.items():
        if value.shape != truth[result].shape:
            return f"{result}: shape {tuple(value.shape)}, expected {tuple(truth[result].shape)}"
        relative = result in operator.relative
        if found := _compared(result, value, truth[result], baseline[result], terms[result], shape, relative):
            return found
        if not all(torch.equal(value, repeat[result]) for repeat in repeats):
            return f"{result}: {RUNS} runs with the same inputs differ"
    return _bad_label(backend, operator, inputs) if operator.labels else ""


def _reference(operator: Operator, inputs: Inputs) -> Values:
    with use_backend("reference"):
        return runner(operator, inputs)()


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if name in differentiable({name: value}) else value for name, value in inputs.items()}


def _expected(operator: Operator, inputs: Inputs, dtype: torch.dtype) -> tuple[Values, Values, Values]:
    """By result: the truth in float64, the errors of plain torch, and the size of the terms that it is a sum of."""
    wide = _cast(inputs, torch.float64)
    truth = _reference(operator, wide)
    if dtype == torch.float64:
        # the errors of plain torch in float32, as much smaller as the type is finer
        narrow = _cast(inputs, torch.float32)
        single, exact = _reference(operator, narrow), _reference(operator, _cast(narrow, torch.float64))
        finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        errors = {name: (single[name].double() - value) * finer for name, value in exact.items()}
    else:
        errors = {name: value.double() - truth[name] for name, value in _reference(operator, inputs).items()}
    terms = {name: value.abs() for name, value in truth.items()}
    for turn in range(NUDGES):
        nudged = _reference(operator, {name: _nudged(v, place + 10 * turn) for place, (name, v) in enumerate(wide.items())})
        terms = {name: size + (nudged[name] - truth[name]).abs() / NUDGE for name, size in terms.items()}
    return truth, errors, terms


def _nudged(value: Any, place: int) -> Any:
    """A floating tensor with NUDGE added or subtracted, relative to each element; by other signs at each place."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    count = torch.arange(value.numel(), device=value.device)
    signs = ((count + place) * (5 + 2 * place) % 101 % 2 * 2 - 1).view(value.shape)
    return value * (1 + NUDGE * signs)


def _compared(name: str, value: Tensor, truth: Tensor, errors: Tensor, terms: Tensor, shape: Shape, relative: bool) -> str:
    batch, rows = shape[0], len(value) if value.dim() else 1
    size = (truth.abs() if relative else terms).double().reshape(rows, -1)
    # nudges of both signs add up to √n of n terms in a sum, and rounding errors to at most n
    if rows != batch:
        size = size.amax(1) * batch**0.5
    elif size.shape[1] == 1 and not relative:
        size = size[:, 0] * (shape[1] if len(shape) > 1 else 1) ** 0.5
    else:
        size = size.norm(dim=1)
    error, errors = (difference.reshape(rows, -1) for difference in (value.double() - truth, errors))
    zero = size == 0  # such as the gradient of a dead row
    if (error[zero] != 0).any():
        return f"{name}: {value.reshape(rows, -1)[zero].abs().max().item():.3g} where the reference has 0"
    if zero.all():
        return ""
    return excess(name, value.dtype if value.is_floating_point() else torch.float64, error[~zero], errors[~zero], size[~zero])


def _bad_label(backend: str, operator: Operator, inputs: Inputs) -> str:
    """On the CPU a label out of range raises ValueError; on a GPU its loss and the gradients of its row are NaN."""
    target = inputs["target"].clone()
    target[0] = 10**9
    with poisoned(), use_backend(backend):
        run = runner(operator, {**inputs, "target": target})
        if target.device.type == "cpu":
            try:
                run()
            except ValueError:
                return ""
            return "a label out of range raises no ValueError"
        values = run()
    if not values["losses"].isnan().all() or not values["d x"][0].isnan().all():
        return "a label out of range does not make its loss and gradients NaN"
    if not values["strength"].isfinite().all():
        return "a label out of range changes ω"
    return ""
