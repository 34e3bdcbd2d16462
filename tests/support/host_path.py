"""The host path of the Triton operators, forward and backward, in a process whose driver is the stand-in of `stand_in`.

usage: python host_path.py FOLDER [launches | variants] '[[dtype, width, classes, [batch, ...]], ...]'   prints JSON
"""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stand_in
import torch
import triton_launches
from torch_operators import TorchOperators
from triton import knobs

import iprm_kernels as ik

Run = Callable[[], object]
#: Timed repetitions of an operator.
REPETITIONS = 30


def differentiated(function: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Run:
    """Forward and backward from an upstream gradient that is there already."""
    upstream = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def operators(dtype: torch.dtype, batch: int, width: int, classes: int) -> dict[str, Callable[[], Run]]:
    """By name, functions that make the inputs of an operator and return its forward and backward pass."""

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, dtype=dtype, requires_grad=True)

    def probe_rebalance() -> Run:
        p, q, weight = random(batch, classes), random(batch, classes), random(classes, width)

        def step(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return ik.probe_rebalance(x, y, p, q, lambda z: torch.nn.functional.linear(z, weight), probing).logits

        return differentiated(step, random(batch, width), random(batch, width), weight)

    def head_step(modalities: int) -> Run:
        pairs = modalities * (modalities - 1) // 2
        features = [random(batch, width) for _ in range(modalities)]
        heads = [(random(classes, width), random(classes)) for _ in range(modalities + pairs)]
        target = torch.arange(batch) % classes
        leaves = [*features, *itertools.chain(*heads)]

        def step(*_: torch.Tensor) -> torch.Tensor:
            own, mixing = heads[:modalities], heads[modalities:]
            return ik.linear_probe_rebalance_pairs(features, own, mixing, target, probing, label_smoothing=0.1).loss

        return differentiated(step, *leaves)

    def average_strength() -> Run:
        weight, weight_in_evaluation, steps = torch.full((1,), 0.5), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.int64)
        last, measured = torch.full((2,), 0.5), torch.full((2,), 0.5)
        return lambda: ik.average_strength(measured, 0.8, False, weight, weight_in_evaluation, last, steps)

    probing = torch.tensor(0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return {
        "normalize": lambda: differentiated(ik.normalize, random(batch, width)),
        "geodesic_mixup": lambda: differentiated(
            lambda x, y: ik.geodesic_mixup(x, y, probing), random(batch, width), random(batch, width)
        ),
        "batch_kl": lambda: differentiated(ik.batch_kl, random(batch, classes), random(batch, classes)),
        "strength_weights": lambda: differentiated(ik.strength_weights, random(2)),
        "average_strength": average_strength,
        "probe_rebalance": probe_rebalance,
        "head step, 2 modalities": lambda: head_step(2),
        "head step, 3 modalities": lambda: head_step(3),
    }


class _Patch:
    """What `triton_launches.recording` needs of pytest's monkeypatch."""

    def __init__(self) -> None:
        self.undo: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any) -> None:
        self.undo.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def restore(self) -> None:
        while self.undo:
            setattr(*self.undo.pop())


def launches(driver: stand_in.StandIn, run: Run) -> dict[str, Any]:
    """The launches of a run, as recorded without a driver and as the driver received them; torch's operators; host time."""
    patch = _Patch()
    recorded = triton_launches.recording(patch)
    run()
    patch.restore()
    driver.clear()
    run()
    received = driver.launches
    kernels = {launch.kernel for launch in recorded}
    compiled = {kernel.hash for own in kernels for kernel in own.device_caches[0][0].values()}
    ahead = [launch.compile(triton_launches.TARGETS["sm_90"]) for launch in recorded]
    registration = importlib.import_module("iprm_kernels.registration")
    patch.setattr(registration, "unobserved", lambda arguments: True)
    with TorchOperators() as torch_operators:
        run()
    patch.restore()
    times = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {
        "recorded": [(launch.name, launch.grid[0], 32 * launch.options.get("num_warps", 4)) for launch in recorded],
        "received": received,
        "compiled otherwise": [kernel.name for kernel in ahead if kernel.hash not in compiled],
        "torch": torch_operators.found,
        "host µs": 1e6 * statistics.median(times),
    }


class Variants:
    """A hook of Triton's JIT that counts the kernels it would compile, and compiles none."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()
        self.new = 0

    def __call__(self, key: Any, fn: Any, **_: Any) -> bool:
        variant = (fn.name, str(key))
        self.new += variant not in self.seen
        self.seen.add(variant)
        return True  # "compiled elsewhere": Triton then launches nothing


def main(folder: str, what: str, sizes: str) -> None:
    driver = stand_in.install(Path(folder))
    importlib.import_module("iprm_kernels.kernels.head").labels = lambda *_: None  # checked on CPUs alone
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, dict[str, Any]] = {}
    counter = Variants()
    if what == "variants":
        knobs.runtime.jit_cache_hook = counter
    with ik.use_backend("triton"):
        for dtype, width, classes, batches in json.loads(sizes):
            for batch in batches:
                for name, make in operators(getattr(torch, dtype), batch, width, classes).items():
                    counter.new = 0
                    run = make()
                    if what == "variants":
                        run()
                    case = f"{dtype} {width} {classes} {batch}"
                    found.setdefault(case, {})[name] = counter.new if what == "variants" else launches(driver, run)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
