"""benchmarks/gpu_check.sh, with a Python that only records its arguments: the tests it runs, and those it reports as left
out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The import of lightning exits with $LIGHTNING, any other command with 0.
PYTHON = """#!/usr/bin/env bash
if [[ $* == "-c import lightning" ]]; then exit "$LIGHTNING"; fi
echo "$*" >> "$ASKED"
"""


def check(folder: Path, lightning: bool) -> tuple[str, list[str]]:
    """The output of the script, and its Python commands, in a run that passed."""
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        (folder / name).write_text(PYTHON)
        (folder / name).chmod(0o755)
    asked = folder / "asked"
    told = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"), "ASKED": str(asked)}
    environment = {**os.environ, **told, "LIGHTNING": "0" if lightning else "1"}
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), str(folder / "results")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, asked.read_text().splitlines()


@pytest.mark.parametrize("lightning", [True, False])
def test_gpu_tests_of_the_trainer_run_where_lightning_is_and_are_named_where_it_is_not(tmp_path, lightning):
    said, asked = check(tmp_path, lightning)
    tests = [command for command in asked if "-m gpu" in command]
    assert tests[0].endswith(" tests/iprm_kernels")
    *_, left_out, outcome = said.splitlines()
    assert outcome == "all that ran passed"
    of_trainer = tests[1] if lightning else left_out
    assert of_trainer.endswith(
        " tests/iprm/profile/test_profile.py tests/iprm/training/test_cuda_graphs.py tests/iprm/training/test_finite.py"
    )
    assert left_out.startswith("left out, for ") != lightning
    assert len(tests) == (2 if lightning else 1)
