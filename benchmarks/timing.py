"""Times versions of one computation side by side: interleaved in one process, so that a noisy machine is noisy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Version = Callable[[], object]
Compare = Callable[..., None]  # the fixture of conftest.py


class Spread(NamedTuple):
    """Percentiles of a version's times, in microseconds."""

    p20: float
    p50: float
    p80: float


def side_by_side(versions: Mapping[str, Version], *, seconds: float = 3.0, most: int = 400) -> dict[str, Spread]:
    """Runs all versions in turn for about `seconds`, at least 11 times each, after three turns that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in versions}
    last = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        _one_turn(versions, taken)
        last = time.perf_counter() - begin
    turns = min(most, max(11, int(seconds / last)))
    taken = {name: [] for name in versions}
    for _ in range(turns):
        _one_turn(versions, taken)
    return {name: Spread(*(1e6 * value for value in _percentiles(times))) for name, times in taken.items()}


def _one_turn(versions: Mapping[str, Version], taken: dict[str, list[float]]) -> None:
    for name, run in versions.items():
        _wait()
        begin = time.perf_counter()
        run()
        _wait()
        taken[name].append(time.perf_counter() - begin)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[1], statistics.median(times), deciles[7]


def gradients_of(function: Callable[..., Tensor], leaves: list[Tensor], *arguments: Any) -> Callable[[], list[Tensor]]:
    """Forward and backward: the value and the gradients of the leaves."""

    def run() -> list[Tensor]:
        value = function(*arguments)
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    return run
