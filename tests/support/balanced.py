"""A small problem for training rules: convolutional encoders in float64, batches with ignored labels, a `Balancer` loop."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from forked import run_on_ranks
from iprm import Balancer
from iprm.distributed import rank, world_size
from torch import Tensor, nn

CLASSES, WIDTH = 4, 6
CHANNELS = {"audio": 2, "image": 1, "touch": 3}
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


class Convolution(nn.Sequential):
    """(B, channels, 5, 5) -> (B, WIDTH), by one convolution with a bias, and a linear layer."""

    def __init__(self, channels: int) -> None:
        mean, flat = nn.AdaptiveAvgPool2d(2), nn.Flatten()
        super().__init__(nn.Conv2d(channels, 3, 3), nn.Tanh(), mean, flat, nn.Linear(12, WIDTH), nn.Tanh())


def encoders(modalities: tuple[str, ...] = ("audio", "image"), dtype: torch.dtype = torch.float64) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {name: Convolution(CHANNELS[name]).to(dtype) for name in modalities}


def balancer(method: str, modalities: tuple[str, ...] = ("audio", "image"), dtype=torch.float64, **options: Any) -> Balancer:
    """In `dtype`, from the same initial weights for every method with the same heads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = encoders(modalities, dtype)
        return Balancer(made, WIDTH, CLASSES, method, **{"optimizer": SGD, **options})
    finally:
        torch.set_default_dtype(before)


def batches(
    count: int, rows: int = 12, modalities: tuple[str, ...] = ("audio", "image"), dtype=torch.float64, ignored: float = 0.2
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches that depend on their numbers alone; a fraction of about `ignored` of the labels is -100."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(100 + number)
        target = torch.randint(CLASSES, (rows,), generator=generator)
        inputs = {
            name: torch.randn(rows, CHANNELS[name], 5, 5, generator=generator, dtype=torch.float64) for name in modalities
        }
        inputs["audio"] = inputs["audio"] + target[:, None, None, None] / 2  # audio is ahead
        target[torch.rand(rows, generator=generator) < ignored] = -100
        made.append(({name: x.to(dtype) for name, x in inputs.items()}, target))
    return made


def state(b: Balancer) -> dict[str, Tensor]:
    """Every parameter and buffer of model and rule."""
    return {name: x.clone() for name, x in {**b.model.state_dict(), **b.rule.state_dict()}.items()}


def train(method: str, epochs: int = 2, steps: int = 3, **options: Any) -> list[dict[str, Tensor]]:
    """The state after every step on this process's part of a joint batch."""
    b = balancer(method, **options)
    course = []
    for epoch in range(epochs):
        b.start_epoch(epoch)
        for inputs, target in batches((epoch + 1) * steps)[epoch * steps :]:
            own = torch.arange(len(target)).tensor_split(world_size())[rank()]
            b.step({name: x[own] for name, x in inputs.items()}, target[own])
            course.append(state(b))
        b.end_epoch({"audio": 0.5 + epoch / 10, "image": 0.3 - epoch / 10})
    return course


def run_processes(folder: Path, processes: int, rules: dict[str, tuple[str, dict]]) -> list[dict[str, list[dict[str, Tensor]]]]:
    """Results of `train` on each of several real processes, by the name of the rule."""
    return run_on_ranks(folder, processes, _train, rules)


def _train(rules: dict[str, tuple[str, dict]]) -> dict[str, list[dict[str, Tensor]]]:
    return {name: train(method, **options) for name, (method, options) in rules.items()}
