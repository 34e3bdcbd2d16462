"""The share of the bandwidth of a copy, measured in the same run, that the operators reach.

Bytes are counted: those that an operator must move. Inputs rotate through more memory than any cache holds. On a GPU the calls
of one rotation form one CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from timing import DEVICE, Version, graphed, ours, side_by_side

import iprm_kernels as ik
from iprm_kernels.backends import kernels

GPU = DEVICE == "cuda"
#: Bytes; more than twice the largest cache considered (384 MiB in an EPYC, 60 in an H200).
ROTATED = 2**30
SHAPES = [(1024, 512), (8192, 1024), (65536, 1024)] if GPU else [(1024, 512), (8192, 1024)]
DTYPES = [torch.float32, torch.bfloat16]


def rotation(bytes_each: int) -> int:
    return max(2, min(64, ROTATED // bytes_each + 1))


def copies(shape: tuple[int, int], dtype: torch.dtype) -> list[Version]:
    pairs = [[torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)] for _ in range(rotation(2 * _bytes(shape, dtype)))]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]


def forwards(shape: tuple[int, int], dtype: torch.dtype) -> list[Version]:
    """Calls of the kernel itself, with outputs allocated before."""
    weight = torch.full((1,), 0.3, device=DEVICE).expand(shape[0])

    def one() -> Version:
        x, y, z = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3))
        stats = torch.empty((3, shape[0]), device=DEVICE)
        return lambda: kernels(x.device).geodesic_mixup(x, y, weight, 1e-12, z, stats)

    return [one() for _ in range(rotation(3 * _bytes(shape, dtype)))]


def backwards(shape: tuple[int, int], dtype: torch.dtype) -> list[Version]:
    weight = torch.full((1,), 0.3, device=DEVICE).expand(shape[0])

    def one() -> Version:
        g, x, y, grad_x, grad_y = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(5))
        stats = torch.empty((3, shape[0]), device=DEVICE)
        kernels(x.device).geodesic_mixup(x, y, weight, 1e-12, grad_x, stats)
        return lambda: kernels(x.device).geodesic_mixup_backward(g, x, y, weight, stats, 1e-12, grad_x, grad_y, None)

    return [one() for _ in range(rotation(5 * _bytes(shape, dtype)))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "make", "matrices"), [("forward", forwards, 3), ("backward", backwards, 5)])
def test_geodesic_mixup(
    record: Callable[..., None],
    name: str,
    make: Callable[..., list[Version]],
    matrices: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    if GPU:
        # the backend in use when a graph is captured is the one that is replayed
        mine = {}
        for backend in ours(lambda: None):
            with ik.use_backend(backend):
                mine[backend] = once_around(make(shape, dtype))
    else:
        mine = {"ours": once_around(make(shape, dtype))}
    copy, copied = once_around(copies(shape, dtype)), 2 * _bytes(shape, dtype)
    times = side_by_side({"copy": copy[0], **{name: run for name, (run, _) in mine.items()}}, seconds=0.5 if GPU else 2.0)
    bandwidth = copied * copy[1] / times["copy"].p50 / 1e3  # GB/s
    moved = matrices * _bytes(shape, dtype)
    fractions = {name: moved * calls / times[name].p50 / 1e3 / bandwidth for name, (_, calls) in mine.items()}
    kind = "fp32" if dtype == torch.float32 else "bf16"
    line = f"{name} {shape} {kind}: { ({n: f'{f:.0%}' for n, f in fractions.items()}) } of the {bandwidth:.0f} GB/s of a copy"
    record("share of copy bandwidth", line, operator=f"geodesic_mixup {name}", shape=shape, dtype=kind,
           bandwidth=bandwidth, fractions=fractions)  # fmt: skip


def once_around(runs: list[Version]) -> tuple[Version, int]:
    """One call of each version in a rotation, and the number of calls."""

    def around() -> None:
        for run in runs:
            run()

    if GPU:
        return graphed(around, 1), len(runs)
    following = itertools.cycle(runs)
    return (lambda: next(following)()), 1


def _bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    return shape[0] * shape[1] * dtype.itemsize
