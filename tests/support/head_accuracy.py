"""The linear head step held to the error budget: all outputs and all gradients of one shape and type."""

from __future__ import annotations

import functools
from collections.abc import Callable

import error_budget
import head_oracle
import heads
import pytest
import torch
from error_budget import Truth
from heads import LEAVES, Step
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels import reference


def step_of(inputs: dict, call: Callable[..., ik.StepResult] = heads.call) -> Step:
    return heads.run(inputs, call=call, label_smoothing=0.1, through=("loss", "logits_mix"))


@functools.cache
def truth_of(batch: int, width: int, classes: int, dtype: torch.dtype) -> tuple[dict, dict[str, Truth]]:
    """Inputs on the CPU, and what must come of them."""
    inputs = heads.inputs(batch, width, classes, dtype)
    return inputs, head_oracle.linear_probe_rebalance(inputs, 0.1, heads.weights((batch, classes), dtype).double().numpy())


def magnitudes(inputs: dict, truth: dict[str, Truth]) -> dict[str, Tensor]:
    """The size of the terms that each row of each result is made of: what rounding errors are proportional to.

    Losses are made of their logits; a KL moves by Σ|∂KL/∂logits| of them, and log ω by as much as log KL.
    """
    i = {name: t.double() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    logits = {m: truth[f"logits_{m}"].high for m in ("mix", "x", "y")}
    batch, classes = logits["mix"].shape
    norms = {m: i[m].norm(dim=1) for m in "xy"}
    cosine = sum((i["x"] / norms["x"][:, None] * i["y"] / norms["y"][:, None]).T)
    unit = sum(
        reference.slerp_weight(truth["strength"].high[k].expand(batch), cosine)[:, None] * i[m].abs() / norms[m][:, None]
        for k, m in enumerate("xy")
    )
    terms = {m: i[m].abs() @ i[f"weight_{m}"].abs().T + i[f"bias_{m}"].abs() for m in "xy"}
    terms["mix"] = unit @ i["weight_mix"].abs().T + i["bias_mix"].abs()
    rows = {m: value.amax(1) for m, value in terms.items()}

    # |∂/∂logits| by element: a softmax and a label over the batch, and what came to the logits themselves
    label = torch.nn.functional.one_hot(inputs["target"], classes)
    grads = {m: (value.softmax(1) + label) / batch for m, value in logits.items()}
    grads["mix"] = grads["mix"] + heads.weights((batch, classes), torch.float64)
    kl = truth["kl"].high[:, 0]
    kl_terms = torch.stack([(kl[k] / batch).sqrt() * (rows[m] + rows["mix"]).sum() + kl[k] for k, m in enumerate("xy")])
    strength = truth["strength"].high[:, 0]
    means = torch.stack([rows[m].mean() for m in ("mix", "x", "y")])
    return {
        **{f"logits_{m}": value for m, value in rows.items()},
        "loss": means.sum()[None],
        "losses": means,
        "kl": kl_terms,
        "strength": (strength.prod() * (kl_terms / kl).sum() + strength),
        **{m: grads["mix"].norm(dim=1) * i["weight_mix"].norm() / norms[m] + (grads[m] @ i[f"weight_{m}"].abs()).amax(1)
           for m in "xy"},
        **{f"weight_{m}": (grads[m].T @ i[m].abs()).amax(1) for m in "xy"},
        "weight_mix": (grads["mix"].T @ unit).amax(1),
        **{f"bias_{m}": grads[m].sum(0) for m in ("mix", "x", "y")},
    }  # fmt: skip


def assert_within_budget(batch: int, width: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
    """By the backend in use, against plain torch in two passes and an oracle that knows more digits."""
    if dtype == torch.float64 and not head_oracle.EXTENDED:
        pytest.skip("long double is double here, and no truth for float64")
    inputs, truth = truth_of(batch, width, classes, dtype)
    baseline = step_of(inputs, heads.two_pass)
    step = step_of({name: t.to(device) if isinstance(t, Tensor) else t for name, t in inputs.items()})
    for name, magnitude in magnitudes(inputs, truth).items():
        kind = "gradients" if name in LEAVES else "outputs"
        value, plain = (getattr(s, kind)[name].reshape(len(magnitude), -1) for s in (step, baseline))
        error_budget.assert_within_budget(name, value, plain, truth[name], magnitude)
