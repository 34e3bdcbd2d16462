"""The linear head step, forward and backward, against sum fusion and the two-pass step as released, plain and compiled.

On a GPU also as CUDA graphs, in bfloat16, its launches, and its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import baselines
import pytest
import torch
from timing import DEVICE, Compare, Version, gradients_of, graphed, ours
from torch import Tensor

import iprm_kernels as ik

GPU = DEVICE == "cuda"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
SMALL = [(64, 512, 6), (64, 512, 31)]
SHAPES = [*SMALL, (1024, 512, 31), (8192, 1024, 31)]
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
GRAPH_REPLAYS = 20
#: What is due to rounding, relative to the largest number; in bfloat16 that of the baselines, which round at every step.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def fused(*arguments: Tensor) -> Tensor:
    return ik.linear_probe_rebalance(*arguments).loss


def versions_of(shape: tuple[int, int, int], dtype: torch.dtype, compiled: dict[str, str]) -> dict[str, Version]:
    """Value and gradients by sum fusion, by the released step as it is and as compiled, and by ours.

    compiled: name -> mode of torch.compile.
    """
    batch, width, classes = shape
    options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
    x, y = (torch.randn(batch, width, requires_grad=True, **options) for _ in range(2))
    heads = [torch.nn.Linear(width, classes, **options) for _ in range(3)]
    head_x, head_y, head_mix = ((head.weight, head.bias) for head in heads)
    target = torch.randint(classes, (batch,), device=DEVICE)
    arguments = (x, y, head_x, head_y, head_mix, target, torch.tensor(0.5, device=DEVICE))
    leaves = [x, y, *head_x, *head_y]
    step: Callable[..., Version] = gradients_of
    torch.compiler.reset()
    return {
        "naive": step(baselines.naive, leaves, *arguments),
        "released": step(baselines.released, [*leaves, *head_mix], *arguments),
        **{
            name: step(torch.compile(baselines.released, mode=mode), [*leaves, *head_mix], *arguments)
            for name, mode in compiled.items()
        },
        **ours(step(fused, [*leaves, *head_mix], *arguments)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_step(compare: Compare, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    modes = {"compiled": "default"}
    if GPU:  # where every compilation takes seconds of few: of the sizes that have a bar
        modes = {**modes, "reduce-overhead": "reduce-overhead"} if shape in SMALL else {}
    close = ("released", *(name for name in modes if name == "compiled"))
    compare("head step", (*shape, _short(dtype)), versions_of(shape, dtype, modes), close, TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [2, 16, 64, 256, 1024, 4096])
def test_head_step_by_batch(compare: Compare, batch: int) -> None:
    compare(
        "head step by batch", (batch, 512, 31, "fp32"), versions_of((batch, 512, 31), torch.float32, {}), ("released",), 1e-3
    )


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, (65536, 1024, 31), (8192, 4096, 1000)], ids=str)
def test_head_step_in_a_graph(compare: Compare, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    replays = GRAPH_REPLAYS if shape in SMALL else 1
    versions = versions_of(shape, dtype, {"compiled": "default"} if shape in SMALL else {})
    if shape[2] > 31 and dtype == torch.float32:  # its loops of multiply-adds, by count 0.1 s per step
        versions.pop("cuda", None)
    graphs = {name: graphed(run, replays) for name, run in versions.items()}
    compare("head step, CUDA graph", (*shape, _short(dtype)), graphs, ("released",), TOLERANCE[dtype], replays)


@needs_gpu
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_launches(record: Callable[..., None], shape: tuple[int, int, int]) -> None:
    """Kernels on the GPU in one step, as the profiler counts them: copies and fills too."""
    counts = {name: _launches(run) for name, run in versions_of(shape, torch.float32, {}).items()}
    record("launches a step", f"{shape} {counts}", shape=shape, launches=counts)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 512, 6), (8192, 1024, 31), (65536, 1024, 31), (65536, 512, 6), (4096, 1024, 1000)], ids=str
)
def test_memory(record: Callable[..., None], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The most memory a step holds beyond inputs, gradients and heads, over 8BC floats."""
    found = {name: _extra_bytes(run) for name, run in versions_of(shape, dtype, {}).items()}
    allowed = 8 * shape[0] * shape[2] * 4 + 4 * 2**20
    sizes = {name: f"{size / 2**20:.1f} MiB" for name, size in found.items()}
    line = f"{shape} {_short(dtype)} {sizes}, bar {allowed / 2**20:.1f} MiB"
    record("memory beyond gradients", line, shape=shape, dtype=_short(dtype), bytes=found, allowed=allowed)


def _launches(run: Version) -> int:
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def _extra_bytes(run: Callable[[], Any]) -> int:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
