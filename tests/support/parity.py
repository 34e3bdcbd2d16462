"""Training with the head step, and with the released algorithm, from the same initial state on the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import heads
import torch
import torch.nn.functional as F
from released import released_slerp, released_strength
from torch import Tensor

STEPS, BATCH, WIDTH, CLASSES = 200, 16, 12, 5
LEARNED = ("weight_x", "bias_x", "weight_y", "bias_y", "weight_mix", "bias_mix")
#: The released sine has 1e-8 added, a relative change of 1e-8 / sin θ of every mixed feature.
BOUND = 1e-5


def fused(parameters: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """-> loss, ω"""
    step = heads.call(parameters)
    return step.loss, step.strength


def released(parameters: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Two passes with the released formula, differentiated by autograd.  -> loss, ω"""
    x, y, target = parameters["x"], parameters["y"], parameters["target"]
    own = {m: F.linear(parameters[m], parameters[f"weight_{m}"], parameters[f"bias_{m}"]) for m in "xy"}

    def mixed(weight: Any) -> Tensor:
        return F.linear(released_slerp(x, y, weight), parameters["weight_mix"], parameters["bias_mix"])

    with torch.no_grad():
        strength = released_strength(own["x"], own["y"], mixed(parameters["weight"]))
    losses = [F.cross_entropy(logits, target) for logits in (mixed(strength[0]), *own.values())]
    return sum(losses), strength


def run(step: Callable[[dict[str, Any]], tuple[Tensor, Tensor]], device: torch.device) -> list[tuple[float, float, float]]:
    """Loss, ω of x and λ of every step: gradient descent on the heads and on encoders before them, in float64."""
    torch.manual_seed(0)
    start = heads.inputs(BATCH, WIDTH, CLASSES, torch.float64)
    parameters = {name: start[name].to(device).requires_grad_() for name in LEARNED}
    encoders = {m: torch.randn(WIDTH, WIDTH, dtype=torch.float64).to(device).requires_grad_() for m in "xy"}
    batches = [(torch.randn(2, BATCH, WIDTH, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))) for _ in range(4)]
    weight, course = 0.5, []
    for at in range(STEPS):
        data, target = batches[at % len(batches)]
        features = {m: torch.tanh(matrix.to(device) @ encoders[m]) for m, matrix in zip("xy", data, strict=True)}
        loss, strength = step({**parameters, **features, "target": target.to(device), "weight": weight})
        leaves = [*parameters.values(), *encoders.values()]
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            leaf.data -= 0.1 * gradient
        course.append((loss.item(), float(strength[0]), weight))
        weight = 0.8 * weight + 0.2 * float(strength[0])
    return course


def furthest(course: list[tuple[float, ...]], other: list[tuple[float, ...]]) -> float:
    return max(abs(a - b) for mine, theirs in zip(course, other, strict=True) for a, b in zip(mine, theirs, strict=True))
