"""The public operators as functions of named inputs to named results and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..average import average_strength
from ..divergence import batch_kl, strength_weights
from ..dtypes import FLOATING, arithmetic_dtype
from ..geodesic import geodesic_mixup, normalize
from ..head import linear_probe_rebalance, linear_probe_rebalance_pairs
from ..probe_rebalance import probe_rebalance
from .inputs import feature_pairs, logit_pairs, randn, step

Inputs = dict[str, Any]
Values = dict[str, Tensor]
Shape = tuple[int, ...]
Make = Callable[[Shape, torch.dtype, torch.device], Inputs]


class Operator(NamedTuple):
    """How an operator is verified."""

    inputs: Make  #: shape (rows, width) or (rows, width, classes), type and device -> inputs by name
    call: Callable[[Mapping[str, Any]], Values]  #: inputs -> results by name; gradients flow from those that require one
    #: Results whose rounding errors are proportional to the results themselves, not to the terms of the sums in them.
    relative: Sequence[str] = ()
    dtypes: Sequence[torch.dtype] = FLOATING
    labels: bool = False  #: whether it takes labels, as `target`


def differentiable(inputs: Inputs) -> list[str]:
    """The names of the floating tensors among inputs."""
    return [name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]


def runner(operator: Operator, inputs: Inputs) -> Callable[[], Values]:
    """A function that runs the operator forward and backward and returns results, and gradients as "d NAME".

    All results that require gradients are differentiated at once, weighted by numbers that every type represents.
    """
    names = differentiable(inputs) if operator.call is not _average else []
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    given = {**inputs, **leaves}
    upstream: dict[str, Tensor] = {}

    def run() -> Values:
        values = operator.call(given)
        roots = [name for name, value in values.items() if value.requires_grad]
        for name in roots:
            if name not in upstream:
                upstream[name] = _weights(values[name])
        results = {name: value.detach() for name, value in values.items()}
        if roots:
            grads = torch.autograd.grad(
                [values[name] for name in roots], list(leaves.values()), [upstream[name] for name in roots], allow_unused=True
            )
            results |= {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        return results

    return run


def _weights(value: Tensor) -> Tensor:
    """Upstream gradients from -1 to 2 in steps of 1/8, which every type represents."""
    count = torch.arange(value.numel(), device=value.device)
    return ((count * 7 % 25 - 8) / 8).to(value.dtype).view(value.shape)


def _features(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    x, y = feature_pairs(shape[0], shape[1], dtype, device)
    x[-1] = 0 if len(x) > 2 else x[-1]  # a dead row, which has no gradient
    weights = torch.linspace(0, 1, len(x), dtype=arithmetic_dtype(dtype), device=device)
    return {"x": x, "y": y, "weight": weights}


def _logits(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return dict(zip("pq", logit_pairs(shape[0], shape[1], dtype, device), strict=True))


def _batch_kl(i: Mapping[str, Any]) -> Values:
    return {"kl": batch_kl(i["p"], i["q"], reduction="none"), "mean": batch_kl(i["p"], i["q"], reduction="mean")}


def _divergences(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {"kl": torch.linspace(0.25, 3, shape[0], dtype=torch.float64).to(device, dtype)}


def _averages(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    first = torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)
    return {"strength": torch.stack([first, 1 - first], 1).to(device, dtype)}


def _average(i: Mapping[str, Any]) -> Values:
    """Three updates, the first of which has no average yet."""
    strength = i["strength"]
    weight, last = torch.full_like(strength[:, 0], 0.5), torch.zeros_like(strength)
    eval_weight, steps = weight.clone(), torch.zeros(len(strength), dtype=torch.int64, device=strength.device)
    for released in (False, False, True):
        average_strength(strength, 0.8, released, weight, eval_weight, last, steps)
        strength = strength.flip(0)
    return {"weight": weight, "eval_weight": eval_weight, "last": last, "steps": steps}


def _probe(i: Mapping[str, Any]) -> Values:
    x, y = (F.linear(i[m], i[f"weight_{m}"], i[f"bias_{m}"]).detach() for m in "xy")
    head = functools.partial(F.linear, weight=i["weight_mix"], bias=i["bias_mix"])
    return probe_rebalance(i["x"], i["y"], x, y, head, i["weight"])._asdict()


def _step(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, width, classes = shape
    made = step(batch, width, classes, dtype, device=device)
    made["target"][1:2] = -100  # a row that counts in no loss
    return made


def _linear(i: Mapping[str, Any]) -> Values:
    head_x, head_y, head_mix = ((i[f"weight_{m}"], i[f"bias_{m}"]) for m in ("x", "y", "mix"))
    result = linear_probe_rebalance(i["x"], i["y"], head_x, head_y, head_mix, i["target"], i["weight"], label_smoothing=0.1)
    return result._asdict()


def _three(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A third modality and the mixture heads of its pairs, in addition to the inputs of a step of two."""
    made = _step(shape, dtype, device)
    made |= {"z": randn(*shape[:2], seed=20, dtype=dtype, device=device), "weight_z": -made["weight_y"].flip(0)}
    for k in (1, 2):
        made |= {f"weight_mix{k}": made["weight_mix"].roll(k, 0), f"bias_mix{k}": made["bias_mix"].roll(k, 0)}
    return made | {"bias_z": made["bias_x"].flip(0)}


def _pairs(i: Mapping[str, Any]) -> Values:
    heads, mixed = ([(i[f"weight_{m}"], i[f"bias_{m}"]) for m in names] for names in ("xyz", ("mix", "mix1", "mix2")))
    result = linear_probe_rebalance_pairs([i[m] for m in "xyz"], heads, mixed, i["target"], i["weight"], label_smoothing=0.1)
    values = {"loss": result.loss, "losses": result.losses, "mix_losses": result.mix_losses}
    values |= {f"logits {k}": logits for k, logits in enumerate((*result.logits, *result.mix_logits))}
    return {**values, "strength": result.strength, "kl": result.kl}


WIDE = (torch.float32, torch.float64)
OPERATORS = {
    "normalize": Operator(_features, lambda i: {"out": normalize(i["x"])}),
    "geodesic_mixup": Operator(_features, lambda i: {"z": geodesic_mixup(i["x"], i["y"], i["weight"])}),
    "batch_kl": Operator(_logits, _batch_kl, relative=("kl",)),
    "strength_weights": Operator(_divergences, lambda i: {"strength": strength_weights(i["kl"])}),
    "average_strength": Operator(_averages, _average, dtypes=WIDE),
    "probe_rebalance": Operator(_step, _probe),
    "linear_probe_rebalance": Operator(_step, _linear, labels=True),
    "linear_probe_rebalance_pairs": Operator(_three, _pairs, labels=True),
}
