"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version

# Read when torch loads OpenMP. By default, threads spin while they wait for work, and so take the cores from the other worker
# of pytest-xdist: on two busy cores a test of 400 small steps on two threads took 31.7 s, and 2.1 s with this setting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Which backend serves by default depends on the verdict in the user's cache folder: tests have none.
os.environ["IPRM_KERNELS_CACHE"] = os.path.join(tempfile.gettempdir(), f"iprm-kernels-tests-{os.getpid()}")

import gpu_arithmetic
import hypothesis
import places
import pytest
import tiers
import torch
from places import INTERPRETED, Place

import iprm_kernels as ik
from iprm_kernels.verify import poison

# The scratch memory of csrc/cuda/head.cu, which no patch of Python reaches, is filled with NaN. Read at the first step.
os.environ["IPRM_KERNELS_POISON"] = "1"

if INTERPRETED:
    gpu_arithmetic.fuse_multiply_add()

# Inductor's graph caches do not depend on this package's version, so tests could run code from before a change.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,  # the same examples in every run
    database=None,
    deadline=None,
    max_examples=12 if INTERPRETED else 100,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # fixtures outlive an example by design
)
# On a GPU each example of another shape or type compiles up to seven kernels, at about one second each.
for name, count in {"fuzz": 600, "weekly": 2400, "gpu": 5}.items():  # make fuzz, make fuzz FUZZ=weekly
    hypothesis.settings.register_profile(name, hypothesis.settings.get_profile("repeatable"), max_examples=count)
hypothesis.settings.load_profile("gpu" if torch.cuda.is_available() else "repeatable")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED:
        tiers.thin_interpreted(items)
        if obstacle := tiers.interpreter_obstacle(version("triton"), version("numpy")):
            for item in items:
                item.add_marker(pytest.mark.skip(reason=obstacle))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


def _at(place: Place) -> Iterator[Place]:
    status = ik.backends()[place.backend]
    if not status.available:
        pytest.skip(str(status))
    with ik.use_backend(place.backend):
        yield place


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture in {"place", "fused", "gpu"} & set(metafunc.fixturenames):
        metafunc.parametrize(fixture, places.of(fixture, metafunc.module.__name__), indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Runs the test once per backend, which is in use during the test."""
    yield from _at(request.param)


@pytest.fixture
def fused(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Runs the test once per backend except the reference, which results are compared with."""
    yield from _at(request.param)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Runs the test once per backend that has GPU kernels."""
    yield from _at(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poison.poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", poison.poisoned_empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", poison.poisoned_new_empty)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads on every machine; restores the number of threads if a test changes it."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
