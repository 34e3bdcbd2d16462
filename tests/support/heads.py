"""Inputs and runs of the linear head step, for the tests of `linear_probe_rebalance`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels.dtypes import arithmetic_dtype
from iprm_kernels.verify.inputs import step

#: The differentiable inputs of a step, in the order of the operator's arguments.
LEAVES = ("x", "y", "weight_x", "bias_x", "weight_y", "bias_y", "weight_mix", "bias_mix")


inputs = step  # features, heads, labels and λ by name


class Step(NamedTuple):
    """A step that was run: inputs, options, outputs and gradients, by name."""

    inputs: dict[str, Any]
    options: dict[str, Any]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def call(arguments: dict[str, Any], **options: Any) -> ik.StepResult:
    """`linear_probe_rebalance` of inputs by name."""
    named = [(arguments[f"weight_{m}"], arguments[f"bias_{m}"]) for m in ("x", "y", "mix")]
    return ik.linear_probe_rebalance(
        arguments["x"], arguments["y"], *named, arguments["target"], arguments["weight"], **options
    )


def any_head(arguments: dict[str, Any], **options: Any) -> ik.StepResult:
    """The same step by `probe_rebalance` of the backend and plain torch: two passes through the mixed head, and autograd."""
    x, y, target = arguments["x"], arguments["y"], arguments["target"]
    own = {m: F.linear(arguments[m], arguments[f"weight_{m}"], arguments[f"bias_{m}"]) for m in "xy"}
    mixed = ik.probe_rebalance(
        x, y, own["x"], own["y"],
        lambda z: F.linear(z, arguments["weight_mix"], arguments["bias_mix"]), arguments["weight"],
    )  # fmt: skip
    wide = arithmetic_dtype(x.dtype)
    losses = torch.stack([F.cross_entropy(z.to(wide), target, **options) for z in (mixed.logits, own["x"], own["y"])])
    return ik.StepResult(losses.sum(), losses, mixed.logits, own["x"], own["y"], mixed.strength, mixed.kl)


def two_pass(arguments: dict[str, Any], **options: Any) -> ik.StepResult:
    """The same step in plain torch, straight from its definition."""
    with ik.use_backend("reference"):
        return any_head(arguments, **options)


def run(
    arguments: dict[str, Any],
    *,
    needed: tuple[str, ...] = LEAVES,
    through: tuple[str, ...] = ("loss",),
    call: Callable[..., ik.StepResult] = call,
    **options: Any,
) -> Step:
    """Forward, and backward from the named outputs, weighted by fixed numbers, to the named leaves."""
    leaves = {
        name: t.detach().requires_grad_(name in needed) if name in LEAVES and t is not None else t
        for name, t in arguments.items()
    }
    # for the plain step both passes, with any backend
    with ik.use_backend("reference") if call is two_pass else contextlib.nullcontext():
        result = call(leaves, **options)
        sum(_weighed(getattr(result, name)) for name in through).backward()
    gradients = {name: _gradient(leaves[name]) for name in LEAVES}
    outputs = {name: value.detach() for name, value in result._asdict().items()}
    return Step(arguments, {**options, "needed": needed, "through": through}, outputs, gradients)


def _weighed(output: Tensor) -> Tensor:
    """A weighted sum in which all elements have different weights.  (...) -> ()"""
    return (output * weights(output.shape, output.dtype, output.device)).sum()


def weights(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Weights from 1 to 2 of the elements of an output in the differentiated sum; computed on the device."""
    return torch.linspace(1, 2, math.prod(shape), dtype=torch.float64, device=device).to(dtype).view(shape)


def _gradient(leaf: Tensor | None) -> Tensor | None:
    """The gradient of a leaf: zeros if it requires one but was not reached, None if it requires none."""
    if leaf is None or not leaf.requires_grad:
        return None
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
