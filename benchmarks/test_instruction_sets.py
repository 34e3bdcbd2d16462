"""Times the head step of the C++ kernels on every instruction set of this machine, against the reference in plain torch.

Each instruction set takes a process of its own, because IPRM_KERNELS_ISA is read once. On a Zen 3 all were 3 to 10 times as
fast as the reference; a build whose vectors were wider than the registers was slower than it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timing import by, side_by_side

import iprm_kernels as ik

SHAPE = (256, 256, 31)


def measure() -> dict[str, list[float]]:
    """Percentiles of a step, forward and backward on one thread, in microseconds by backend."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, width, classes = SHAPE
    x, y = (torch.randn(batch, width, requires_grad=True) for _ in range(2))
    heads = [(torch.randn(classes, width), torch.randn(classes)) for _ in range(3)]
    target = torch.randint(classes, (batch,))

    def step() -> list[torch.Tensor]:
        loss = ik.linear_probe_rebalance(x, y, *heads, target, 0.3).loss
        return [loss.detach(), *torch.autograd.grad(loss, (x, y))]

    versions = {name: by(name, step) for name in ("reference", "cpp")}
    torch.testing.assert_close(versions["cpp"](), versions["reference"](), rtol=1e-3, atol=1e-4)
    return {name: list(spread) for name, spread in side_by_side(versions, seconds=2.0).items()}


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_head_step(record: Callable[..., None], name: str) -> None:
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "IPRM_KERNELS_ISA": name, "PYTHONPATH": here}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if "IPRM_KERNELS_ISA: expected" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    times = json.loads(done.stdout)
    ratio = times["reference"][1] / times["cpp"][1]
    line = f"{name} {SHAPE}: {ratio:.2f} times as fast as the reference, {times['cpp'][1]:.0f} µs"
    record("head step by instruction set", line, instruction_set=name, shape=SHAPE, times=times, ratio=ratio)


if __name__ == "__main__":
    print(json.dumps(measure()))
