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


#: All but those of accuracy, whose 50 digits take minutes.
MOST = "test_[!a]*[!y].py"


@pytest.mark.parametrize("files", ["test_hostile*.py", pytest.param(MOST, marks=pytest.mark.slow)])
def test_no_test_of_the_gpu_passes_a_cpu_tensor(files: str) -> None:
    paths = [str(path) for path in HERE.glob(files) if path != Path(__file__)]
    options = [
        "-p",
        "pretended_gpu",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile",
        "one example",
        "-m",
        "gpu",
        "--tb=no",
        "-q",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *paths], cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )
    assert " passed" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("MISPLACED")]
    assert not found, "\n".join(found)
