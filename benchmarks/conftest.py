"""Fixtures of the benchmarks: a comparison that checks, times and keeps; a table of them at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from context import context
from table import row_of, table
from timing import Compare, side_by_side

COMPARED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COMPARED] = []


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(context())


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """`compare(group, shape, versions, close)`: times versions of one computation side by side.

    versions: name -> a function that returns tensors. Each of `close` must return what "ours" does, or nothing is timed.
    """

    def run(group: str, shape: tuple[int, ...], versions: Mapping[str, Callable[[], Any]], close: tuple[str, ...]) -> None:
        wanted = versions["ours"]()
        for name in close:
            for value, other in zip(wanted, versions[name](), strict=True):
                scale = max(float(value.abs().max()), 1e-30)
                torch.testing.assert_close(other / scale, value / scale, rtol=0, atol=1e-4)
        times = side_by_side(versions)
        benchmark.group = group
        benchmark.extra_info.update(shape=shape, times={name: spread._asdict() for name, spread in times.items()})
        request.config.stash[COMPARED].append(row_of(group, shape, times))
        benchmark.pedantic(versions["ours"], rounds=11, warmup_rounds=1)  # pytest-benchmark's own record, to compare runs by

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in table(config.stash[COMPARED]):
        terminalreporter.write_line(line)
