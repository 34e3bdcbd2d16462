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


#: A version runs for so many seconds before its times count in a turn: OpenMP's threads spin for about one millisecond after
#: their work beside whoever comes next, and caches hold what the last one left. Then BURST runs count.
SETTLE, BURST = 0.002, 5


class Spread(NamedTuple):
    """Percentiles of a version's times, in microseconds."""

    p20: float
    p50: float
    p80: float


def side_by_side(versions: Mapping[str, Version], *, seconds: float = 4.0, most: int = 60) -> dict[str, Spread]:
    """Runs bursts of all versions in turn for about `seconds`, at least 5 times each, after two turns that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in versions}
    last = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        _one_turn(versions, taken)
        last = time.perf_counter() - begin
    taken = {name: [] for name in versions}
    for _ in range(min(most, max(5, int(seconds / last)))):
        _one_turn(versions, taken)
    return {name: Spread(*(1e6 * value for value in _percentiles(times))) for name, times in taken.items()}


def _one_turn(versions: Mapping[str, Version], taken: dict[str, list[float]]) -> None:
    for name, run in versions.items():
        settled = time.perf_counter() + SETTLE
        while True:
            first = _timed(run)
            if time.perf_counter() >= settled:
                break
        taken[name] += [first] if first > SETTLE else [_timed(run) for _ in range(BURST)]


def _timed(run: Version) -> float:
    _wait()
    begin = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - begin


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
