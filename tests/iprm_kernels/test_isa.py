"""The C++ kernels by every instruction set that this machine has: the widest is what all other tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import INTERPRETED

import iprm_kernels as ik

NAMES = ("baseline", "avx2", "avx512")
WIDEST = ik.build_info().get("instruction_set", "none")
HAD = NAMES[: NAMES.index(WIDEST) + 1] if WIDEST in NAMES else ()
HERE = Path(__file__).parent
EXACTNESS = ("test_accuracy.py", "test_divergence.py", "test_geodesic.py", "test_head.py")

pytestmark = pytest.mark.skipif(not HAD or INTERPRETED, reason="tests the C++ extension, which is not there or not tested here")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the arguments, by that instruction set; and not where the package's sources hide a sanitized one."""
    environment = {**os.environ, "IPRM_KERNELS_ISA": name, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, *arguments], cwd=HERE, env=environment, capture_output=True, text=True, timeout=600)


SAID = "import iprm_kernels as ik; print(ik.build_info()['instruction_set'])"


@pytest.mark.parametrize("name", HAD)
def test_the_environment_chooses(name: str) -> None:
    assert run(name, "-c", SAID).stdout.strip() == name


@pytest.mark.parametrize("name", ["sse", *NAMES[len(HAD) :]])
def test_what_the_machine_lacks_is_refused(name: str) -> None:
    message = f"IPRM_KERNELS_ISA: expected baseline, avx2 or avx512, at most {WIDEST} on this machine, got {name}"
    assert message in run(name, "-c", SAID).stderr
    told = run(name, "-m", "iprm", "info")
    assert (told.returncode, told.stdout, told.stderr.count("\n"), message in told.stderr) == (2, "", 1, True)


@pytest.mark.parametrize("name", HAD[:-1])
def test_narrower_ones_are_as_exact(name: str) -> None:
    """All tests at the edges, and of every type the rows that a vector does not fill."""
    done = run(name, "-m", "pytest", "-q", "-p", "no:cacheprovider", *EXACTNESS, "-k", "cpp and not compile and not 20000")
    assert done.returncode == 0, done.stdout


SPEED = """
import time, torch, iprm_kernels as ik
torch.set_num_threads(1)
x, y = (torch.randn(256, 256, requires_grad=True) for _ in range(2))
heads = [(torch.randn(31, 256), torch.randn(31)) for _ in range(3)]
target = torch.randint(31, (256,))

def best(name):
    times = []
    with ik.use_backend(name):
        for _ in range(9):
            began = time.perf_counter()
            ik.linear_probe_rebalance(x, y, *heads, target, 0.3).loss.backward()
            times.append(time.perf_counter() - began)
    return min(times)

print(best("reference") / best("cpp"))
"""


@pytest.mark.skipif("-fsanitize" in ik.build_info().get("flags", ""), reason="sanitizers take the time that is measured")
@pytest.mark.parametrize("name", HAD)
def test_faster_than_plain_torch(name: str) -> None:
    """Three to ten times on a Zen 3; once, where vectors were wider than a register and gcc took them apart."""
    assert float(run(name, "-c", SPEED).stdout) > 2
