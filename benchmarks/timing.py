"""Versions of one computation for the benchmarks: by backend, as a CUDA graph, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels.verify.timing import Spread, Version, side_by_side, wait

__all__ = ["DEVICE", "Compare", "Spread", "Version", "by", "gradients_of", "graphed", "ours", "side_by_side", "wait"]

Compare = Callable[..., None]  # the fixture of conftest.py

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
