"""Times steps of gloo processes on this machine, with the all-reduce of IPRM's sums and without, and that all-reduce alone.

python gloo_run.py RANK PROCESSES STORE       rank 0 writes STORE.json: name -> microseconds of each step or call
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import iprm_kernels as ik
from iprm_kernels.collectives import all_reduce_sum, joint_sums

BATCH, WIDTH, CLASSES = 64, 512, 31
STEPS, WARM_UP = 150, 15


class Model(nn.Module):
    """Two encoders of two layers, and the head step, its sums added over processes or not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(256, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in "xy")
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor, target: Tensor, joint: bool) -> Tensor:
        x, y = self.encoders[0](x), self.encoders[1](y)
        heads = [(head.weight, head.bias) for head in self.heads]
        group = dist.group.WORLD if joint else None
        return ik.linear_probe_rebalance(x, y, *heads, target, 0.5, group=group).loss


def measure(seed: int) -> dict[str, list[float]]:
    """Interleaved; every timing begins when all processes have arrived."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(seed)
    x, y = torch.randn(2, BATCH, 256)
    target, sums = torch.randint(CLASSES, (BATCH,)), torch.zeros(3)

    def step(joint: bool) -> None:
        optimiser.zero_grad()
        model(x, y, target, joint).backward()
        optimiser.step()

    timed: dict[str, Callable[[], Any]] = {
        "step without": lambda: step(False),
        "step with": lambda: step(True),
        "all-reduce": lambda: all_reduce_sum(sums, dist.group.WORLD),
        "all-reduce, count and share": lambda: joint_sums(sums[:2], target, -100, dist.group.WORLD),
    }
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(STEPS + WARM_UP):
        for name, run in timed.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            taken[name].append(1e6 * (time.perf_counter() - began))
    return {name: times[WARM_UP:] for name, times in taken.items()}


def run_processes(processes: int) -> dict[str, Any]:
    """Medians and 20th and 80th percentiles of rank 0, and of the ratio of a step with to the step without beside it."""
    with tempfile.TemporaryDirectory(prefix="iprm-") as folder:
        store = Path(folder) / "store"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        workers = [
            subprocess.Popen([*command, str(rank), str(processes), str(store)], env=environment) for rank in range(processes)
        ]
        codes = [worker.wait(timeout=300) for worker in workers]
        if any(codes):
            raise RuntimeError(f"expected {processes} processes to end with 0, got {codes}")
        taken = json.loads(store.with_suffix(".json").read_text())
    taken["ratio"] = [one / other for one, other in zip(taken["step with"], taken["step without"], strict=True)]
    return {name: _spread(times) for name, times in taken.items()}


def _spread(times: list[float]) -> list[float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return [deciles[1], statistics.median(times), deciles[7]]


def _main(rank: int, processes: int, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    taken = measure(rank)
    if rank == 0:
        store.with_suffix(".json").write_text(json.dumps(taken))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # results are written; gloo threads may abort an ordinary interpreter exit


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
