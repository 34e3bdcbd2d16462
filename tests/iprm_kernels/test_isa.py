"""The C++ kernels on every instruction set that this machine has. All other tests use the widest."""

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

pytestmark = pytest.mark.skipif(not HAD or INTERPRETED, reason="tests the C++ extension, which is missing or not tested here")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with IPRM_KERNELS_ISA=name and this process's path, so that both load the same extension."""
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


def check_exactness(name: str, chosen: str, *files: str) -> None:
    """Runs the tests of exactness that `chosen` selects, in both tiers, on another instruction set."""
    chosen = f"cpp and not compile and {chosen}"
    done = run(name, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", chosen, *files)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", HAD[-2:-1])
def test_the_next_narrower_one_is_as_exact_in_float32(name: str) -> None:
    check_exactness(name, "float32 and not bfloat16 and not 20000", *EXACTNESS)


@pytest.mark.slow
@pytest.mark.parametrize("file", EXACTNESS)
@pytest.mark.parametrize("name", HAD[:-1])
def test_narrower_ones_are_as_exact(name: str, file: str) -> None:
    """Every edge case, and every type with rows that do not fill a vector."""
    check_exactness(name, "not 20000", file)
