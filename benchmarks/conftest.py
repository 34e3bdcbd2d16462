"""Fixtures of the benchmarks: they check, time and record versions of a computation, and print a table at the end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from context import context
from table import OURS, row_of, table
from timing import Compare, side_by_side, wait

COMPARED = pytest.StashKey[list[dict[str, Any]]]()
RECORDED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COMPARED], config.stash[RECORDED] = [], []


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(context())


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """`compare(group, shape, versions, close, tolerance, calls)`: times versions of one computation side by side.

    versions: name -> function that returns tensors. Ours are named "ours" or by their backend; pytest-benchmark records the
    first of them. close: names of the versions whose tensors must equal ours within `tolerance`, relative to the largest
    number; otherwise nothing is timed. calls: the number of computations in one run of a version.
    """

    def run(
        group: str,
        shape: tuple[Any, ...],
        versions: Mapping[str, Callable[[], Any]],
        close: tuple[str, ...] = (),
        tolerance: float = 1e-4,
        calls: int = 1,
    ) -> None:
        mine = [name for name in versions if name in OURS]
        for name, other in itertools.product(mine, close):
            for value, wanted in zip(versions[name](), versions[other](), strict=True):
                scale = max(float(wanted.abs().max()), 1e-30)
                torch.testing.assert_close(value.float() / scale, wanted.float() / scale, rtol=0, atol=tolerance)
        times = side_by_side(versions, calls=calls, seconds=0.8 if torch.cuda.is_available() else 4.0)
        keep(group, {"shape": shape, "times": {name: spread._asdict() for name, spread in times.items()}})
        request.config.stash[COMPARED].append(row_of(group, shape, times))
        benchmark.pedantic(finished, (versions[mine[0]],), rounds=11, warmup_rounds=1)  # to compare runs with

    def finished(version: Callable[[], Any]) -> None:
        version()
        wait()

    def keep(group: str, info: dict[str, Any]) -> None:
        benchmark.group = group
        benchmark.extra_info.update(info)

    return run


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(group, line, **figures)`: records figures that the benchmark has measured, and prints `line` at the end."""

    def run(group: str, line: str, **figures: Any) -> None:
        benchmark.group = group
        benchmark.extra_info.update(figures)
        request.config.stash[RECORDED].append(f"{group}: {line}")
        benchmark.pedantic(lambda: None, rounds=1)  # its file records only what has been timed

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in [*table(config.stash[COMPARED]), *config.stash[RECORDED]]:
        terminalreporter.write_line(line)
