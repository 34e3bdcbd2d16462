"""Launches of the head step's Triton kernels, recorded by `triton_launches`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from triton_launches import Launch, empty

from iprm_kernels import kernels
from iprm_kernels.convention import PROBE, REBALANCE, HeadBackwardInputs, HeadGradients, HeadInputs
from iprm_kernels.dtypes import arithmetic_dtype
from iprm_kernels.head_step import new_outputs


def forward(
    dtype: torch.dtype,
    batch: int,
    width: int,
    classes: int,
    modalities: int = 2,
    parts: int = PROBE | REBALANCE,
    new: Callable[..., torch.Tensor] = empty,
) -> dict[str, Any]:
    """The launches of a forward pass, and its tensors by name. new: allocates an input of a shape and dtype."""
    pairs = list(itertools.chain(*itertools.combinations(range(modalities), 2)))
    heads = modalities + len(pairs) // 2
    features = [new(batch, width, dtype=dtype) for _ in range(modalities)]
    weights = [new(classes, width, dtype=dtype) for _ in range(heads)]
    biases = [new(classes, dtype=dtype) for _ in range(heads)]
    target, probing = new(batch, dtype=torch.int64), new(len(pairs) // 2, dtype=arithmetic_dtype(dtype))
    outputs = new_outputs(features[0], classes, modalities, len(pairs) // 2)
    inputs = HeadInputs(features, weights, biases, pairs, target, probing, 0.1, -100)
    kernels.head_forward(inputs, parts, outputs)
    return {"inputs": inputs, **outputs._asdict()}


def backward(of: dict[str, Any], needed: Callable[[str, int], bool] = lambda what, place: True) -> None:
    """needed: takes "features", "weights" or "biases" and an index."""
    features, weights, biases, pairs, target, *_ = of["inputs"]
    grads = [
        [t if needed(what, place) else None for place, t in enumerate(tensors)]
        for what, tensors in (("features", features), ("weights", weights), ("biases", biases))
    ]
    unimodal = of["logits"][-len(features) :]
    saved = (features, weights, biases, pairs, target, of["state"], unimodal, of["strength"], 0.1, -100)
    kernels.head_backward(HeadBackwardInputs(of["loss"], of["losses"], of["logits"], *saved), HeadGradients(*grads))


def by_name(launches: list[Launch]) -> dict[str, Launch]:
    return {launch.name.removeprefix("head_").removesuffix("_kernel"): launch for launch in launches}
