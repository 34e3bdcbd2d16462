"""Peak memory of a step: its results and little else."""

from __future__ import annotations

import subprocess
import sys

import pytest

import iprm_kernels as ik

MIB = 2**20

#: Batch, width and classes of the head step.
HEAD = (65536, 512, 31)

# VmHWM is the peak resident memory of the process, counted by Linux for every allocator. A first small step loads libraries and
# starts threads; all pages of the inputs are touched before the measurement begins.
MEASURE = """
import torch, iprm_kernels as ik

def peak(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def mixup(rows):
    x, y, g = (torch.randn(rows, 1024) for _ in range(3))
    x.requires_grad_(), y.requires_grad_()

    def step():
        z = ik.geodesic_mixup(x, y, 0.3)
        return z, *torch.autograd.grad(z, (x, y), g)

    return step

def head(rows, width={width}, classes={classes}):
    leaves = [torch.randn(rows, width, requires_grad=True) for _ in range(2)]
    heads = [(torch.randn(classes, width, requires_grad=True), torch.randn(classes, requires_grad=True)) for _ in range(3)]
    target = torch.randint(classes, (rows,))
    return lambda: torch.autograd.grad(
        ik.linear_probe_rebalance(*leaves, *heads, target, 0.3).loss, [*leaves, *(p for head in heads for p in head)]
    )

torch.manual_seed(0)
with ik.use_backend("{backend}"):
    {what}(256)()
    step = {what}({rows})
    open("/proc/self/clear_refs", "w").write("5")  # the high water mark falls to what is resident now
    before = peak("VmRSS")
    results = step()
    print(peak("VmHWM") - before)
"""


def extra_bytes(backend: str, rows: int, what: str = "mixup") -> int:
    script = MEASURE.format(backend=backend, rows=rows, what=what, width=HEAD[1], classes=HEAD[2])
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
        # the three saved numbers per row are 0.75 MiB of the 1 MiB allowed
        assert results <= extra_bytes("cpp", 65536) <= results + MIB

    @pytest.mark.slow
    def test_cpp_head_step_needs_eight_times_its_logits_beside_its_gradients(self) -> None:
        if not ik.backends()["cpp"].available:
            pytest.skip(str(ik.backends()["cpp"]))
        rows, width, classes = HEAD
        gradients = (2 * rows * width + 3 * classes * (width + 1)) * 4
        assert gradients <= extra_bytes("cpp", rows, "head") <= gradients + 8 * rows * classes * 4 + 4 * MIB

    def test_the_measurement_sees_temporaries(self) -> None:
        """The measurement detects plain torch, which allocates many (B, D) temporaries."""
        assert extra_bytes("reference", 8192) > 5 * 8192 * 1024 * 4


REPEAT = """
import torch, iprm_kernels as ik

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

torch.set_num_threads(1)
x, y = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
heads, target = [(torch.randn(3, 6), torch.randn(3))] * 3, torch.zeros(4, dtype=torch.int64)
calls = {
    "geodesic_mixup": lambda: ik.geodesic_mixup(x, y, 0.3).sum(),
    "batch_kl": lambda: ik.batch_kl(x, y),
    "strength_weights": lambda: ik.strength_weights(x[0])[0],
    "linear_probe_rebalance": lambda: ik.linear_probe_rebalance(x, y, *heads, target, 0.3).loss,
    "linear_probe_rebalance_pairs": lambda: ik.linear_probe_rebalance_pairs([x, y, x], heads, heads, target, 0.3).loss,
}
for name, call in calls.items():
    for count in (6000, 5000):  # the first calls fill what the allocator keeps: 180 KB by 6,000 head steps, and nothing after
        before = resident()
        for _ in range(count):
            torch.autograd.grad(call(), x)
    print(name, (resident() - before) // count)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_calls_leave_nothing_behind() -> None:
    """Over 5,000 calls the leak is below 32 bytes per call; a string through the stable ABI leaked 48 bytes each way."""
    if not ik.backends()["cpp"].available:
        pytest.skip(str(ik.backends()["cpp"]))
    lines = subprocess.check_output([sys.executable, "-c", REPEAT], text=True).splitlines()
    assert len(lines) == 5
    assert not [line for line in lines if int(line.split()[1]) >= 32]
