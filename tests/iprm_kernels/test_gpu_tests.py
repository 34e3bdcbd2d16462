"""The tests of the GPU pass their tensors on the GPU: a test that does not fails there, whatever the kernels do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="about GPUs")
HERE = Path(__file__).parent


#: Their 50 digits take minutes, and they are not needed here.
EXACT = ("test_accuracy.py", "test_antipode.py", "test_head_accuracy.py", Path(__file__).name)


@pytest.mark.parametrize("files", ["test_hostile*.py", pytest.param("test_*.py", marks=pytest.mark.slow)])
def test_no_test_of_the_gpu_passes_a_cpu_tensor(files: str) -> None:
    paths = [str(path) for path in HERE.glob(files) if path.name not in EXACT]
    options = [
        "-q",
        "-m",
        "gpu",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "pretended_gpu",
        "--hypothesis-profile=one example",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *paths], cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )
    assert " passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("MISPLACED")]
    assert not found, "\n".join(found)
