"""Times versions of one computation side by side, interleaved in one process: noise of the machine reaches all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Version = Callable[[], object]

#: In each turn a version runs for SETTLE seconds before BURST runs are timed: the OpenMP threads of the previous version spin
#: for about one millisecond after their work, and the caches hold its data.
SETTLE, BURST = 0.002, 5


class Spread(NamedTuple):
    """Percentiles of a version's times, in microseconds."""

    p20: float
    p50: float
    p80: float


def side_by_side(
    versions: Mapping[str, Version], *, seconds: float = 4.0, least: int = 5, most: int = 60, calls: int = 1
) -> dict[str, Spread]:
    """Runs bursts of all versions in turn for about `seconds`, after two turns of warm-up.

    least, most: limits of the number of turns.
    calls: the number of computations in one run of a version; the times are those of one computation.
    """
    taken: dict[str, list[float]] = {name: [] for name in versions}
    last = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        _one_turn(versions, taken)
        last = time.perf_counter() - begin
    taken = {name: [] for name in versions}
    for _ in range(min(most, max(least, int(seconds / last)))):
        _one_turn(versions, taken)
    return {name: Spread(*(1e6 * value / calls for value in _percentiles(times))) for name, times in taken.items()}


def _one_turn(versions: Mapping[str, Version], taken: dict[str, list[float]]) -> None:
    for name, run in versions.items():
        settled = time.perf_counter() + SETTLE
        while True:
            first = _timed(run)
            if time.perf_counter() >= settled:
                break
        taken[name] += [first] if first > SETTLE else [_timed(run) for _ in range(BURST)]


def _timed(run: Version) -> float:
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def wait() -> None:
    """Waits until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[1], statistics.median(times), deciles[7]
