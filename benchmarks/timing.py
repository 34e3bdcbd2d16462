"""Times versions of one computation side by side, interleaved in one process: noise of the machine reaches all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import iprm_kernels as ik

Version = Callable[[], object]
Compare = Callable[..., None]  # the fixture of conftest.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


#: In each turn a version runs for SETTLE seconds before BURST runs are timed: the OpenMP threads of the previous version spin
#: for about one millisecond after their work, and the caches hold its data.
SETTLE, BURST = 0.002, 5


class Spread(NamedTuple):
    """Percentiles of a version's times, in microseconds."""

    p20: float
    p50: float
    p80: float


def side_by_side(versions: Mapping[str, Version], *, seconds: float = 4.0, most: int = 60, calls: int = 1) -> dict[str, Spread]:
    """Runs bursts of all versions in turn for about `seconds`, at least 5 times each, after two turns of warm-up.

    calls: the number of computations in one run of a version; the times are those of one computation.
    """
    taken: dict[str, list[float]] = {name: [] for name in versions}
    last = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        _one_turn(versions, taken)
        last = time.perf_counter() - begin
    taken = {name: [] for name in versions}
    for _ in range(min(most, max(5, int(seconds / last)))):
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


def by(backend: str, run: Version) -> Version:
    """`run` with the operators of one backend."""

    def inside() -> object:
        with ik.use_backend(backend):
            return run()

    return inside


def ours(run: Version) -> dict[str, Version]:
    """Our versions on this machine: the default on a CPU; on a GPU every backend that has kernels, verified or not."""
    if not torch.cuda.is_available():
        return {"ours": run}
    return {name: by(name, run) for name in ("triton", "cuda") if _serves(name, run)}


def _serves(backend: str, run: Version) -> bool:
    try:
        by(backend, run)()
    except ik.BackendUnavailableError:
        return False
    return True


def graphed(run: Version, replays: int) -> Version:
    """`run` as a CUDA graph, replayed `replays` times, which excludes the time of Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        for _ in range(replays):
            graph.replay()
        return kept

    return replay


def gradients_of(function: Callable[..., Tensor], leaves: list[Tensor], *arguments: Any) -> Callable[[], list[Tensor]]:
    """A forward and backward pass of a loss (), which returns the loss and the gradients of the leaves.

    The upstream gradient is allocated once, in the first run: a fill per step and a sum of the loss would be launches of torch
    among those of the step.
    """
    upstream: list[Tensor] = []

    def run() -> list[Tensor]:
        loss = function(*arguments)
        if not upstream:
            upstream.append(torch.ones((), dtype=loss.dtype, device=loss.device))
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    return run
