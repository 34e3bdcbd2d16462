"""Peak memory of a step: what it must return, and nothing beside it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import iprm_kernels as ik

MIB = 2**20

# VmHWM, the most memory the process ever had resident, is the kernel's own count and misses no allocator. A first small
# step loads libraries and starts threads; all pages of the inputs are touched before the count begins.
MEASURE = """
import torch, iprm_kernels as ik

def peak(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def step(x, y, g):
    z = ik.geodesic_mixup(x, y, 0.3)
    return z, *torch.autograd.grad(z, (x, y), g)

torch.manual_seed(0)
with ik.use_backend("{backend}"):
    step(*(torch.randn(256, 1024, requires_grad=True) for _ in range(3)))
    x, y, g = (torch.randn({rows}, 1024) for _ in range(3))
    x.requires_grad_(), y.requires_grad_()
    open("/proc/self/clear_refs", "w").write("5")  # the high water mark falls to what is resident now
    before = peak("VmRSS")
    results = step(x, y, g)
    print(peak("VmHWM") - before)
"""


def extra_bytes(backend: str, rows: int) -> int:
    script = MEASURE.format(backend=backend, rows=rows)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def proc_counts_peaks() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not proc_counts_peaks(), reason="needs Linux's /proc/self/clear_refs to reset the peak")
class TestPeak:
    def test_cpp_needs_the_results_alone(self) -> None:
        if not ik.backends()["cpp"].available:
            pytest.skip(str(ik.backends()["cpp"]))
        results = 3 * 65536 * 1024 * 4  # z, ∂x, ∂y
        # the three numbers a row that are saved are 0.75 MiB of the one allowed
        assert results <= extra_bytes("cpp", 65536) <= results + MIB

    def test_the_measurement_sees_temporaries(self) -> None:
        """Plain torch, which makes many (B, D) temporaries, is caught by the same measurement."""
        assert extra_bytes("reference", 8192) > 5 * 8192 * 1024 * 4
