"""The tiers of the tests: what plain `pytest` runs, and what the markers `grid` and `slow` leave to `make test-all`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).parents[2]
#: Tests with thousands of launches, which run in the default tier for other backends; and tests of repetition, which the
#: interpreter cannot affect.
SLOW_INTERPRETED = ("test_follows_the_algorithm_as_released_for_200_steps", "test_repeats_bitwise")


#: A module whose few cases all run in the default tier.
WHOLE_INTERPRETED = "test_triton_approximate"


def thin_interpreted(items: Sequence[pytest.Item]) -> None:
    """Marks items for the Triton interpreter, which takes tens of milliseconds per program.

    One case per test function and dtype stays in the default tier: the middle one, which is neither the smallest shape of a
    grid nor the longest. The others are marked `grid`.
    """
    cases: dict[tuple[object, ...], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if not isinstance(item, pytest.Function) or item.path.stem == WHOLE_INTERPRETED:
            continue
        if item.originalname in SLOW_INTERPRETED:
            item.add_marker(pytest.mark.slow)
        elif hasattr(item, "callspec"):
            types = (value for value in item.callspec.params.values() if isinstance(value, torch.dtype))
            cases[(item.function, *types)].append(item)
    for group in cases.values():
        for item in group:
            if item is not group[len(group) // 2]:
                item.add_marker(pytest.mark.grid)


def interpreter_obstacle(triton: str, numpy: str) -> str:
    """Why the interpreter of a version of Triton cannot run with a version of numpy; empty if it can.

    Up to Triton 3.6 it converts loop bounds, arrays of one element, by `int`, which numpy 2.5 refuses. Compiled kernels do not
    use numpy.
    """
    too_old, too_new = Version(triton) < Version("3.7"), Version(numpy) >= Version("2.5")
    return f"the interpreter of Triton {triton} needs numpy < 2.5, found {numpy}" if too_old and too_new else ""


def collected(path: str | Path, *options: str, **environment: str) -> list[str]:
    """The node ids that `pytest PATH OPTIONS` runs: without options, those of the default tier."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(path), *options],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@functools.cache  # two tests of a file ask for the same
def default_tier(file: str | Path) -> tuple[str, ...]:
    return tuple(collected(file))


def default_parameters(file: str | Path, test: str) -> set[str]:
    """The ids of the parameters with which plain `pytest FILE` runs a test."""
    found = (node.partition(f"::{test}[") for node in default_tier(file))
    return {parameters.removesuffix("]") for _, test, parameters in found if test}
