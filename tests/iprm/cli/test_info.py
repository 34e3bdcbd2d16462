"""The command `iprm info`: what serves each operator here, and why not the other backends."""

from __future__ import annotations

import inspect
import re
import sys

import pytest
import torch
from command import iprm
from iprm.cli.info import OPERATORS
from iprm.environment import chosen_backends

import iprm_kernels as ik


def section(out: str, title: str) -> dict[str, str]:
    """The rows below a title."""
    text = re.search(rf"^{re.escape(title)}\n(.*?)\n\n", out, re.MULTILINE | re.DOTALL)[1]
    return dict(line.split(maxsplit=1) for line in text.splitlines())


@pytest.fixture
def no_request(monkeypatch):
    monkeypatch.delenv("IPRM_KERNELS_BACKEND", raising=False)


def test_every_operator_is_listed_with_the_backend_that_serves_it(tmp_path, no_request):
    code, out, err = iprm(tmp_path, "info")
    assert (code, err) == (0, "")
    default = next(status.name for status in ik.backends().values() if "cpu" in status.default_for)
    assert section(out, "operators on cpu") == dict.fromkeys(OPERATORS, default)


def test_the_operators_are_the_public_functions_but_those_about_backends():
    functions = {name for name in ik.__all__ if inspect.isroutine(getattr(ik, name))}
    assert set(OPERATORS) == functions - {"backends", "build_info", "use_backend"}


def test_every_backend_says_what_it_serves_or_why_it_cannot(tmp_path, no_request):
    rows = section(iprm(tmp_path, "info").out, "backends")
    assert list(rows) == list(ik.backends())
    for name, status in ik.backends().items():
        assert rows[name].startswith("serves " if status.available else "unavailable (")
        assert status.reason in rows[name]


def test_versions_and_the_build_are_listed(tmp_path, no_request):
    out = iprm(tmp_path, "info").out
    assert section(out, "versions")["torch"] == torch.__version__
    assert section(out, "C++ extension")["extension"] == ik.build_info()["extension"]


@pytest.mark.parametrize(
    ("asked", "on_cpu"),
    [
        ("reference", "reference (IPRM_KERNELS_BACKEND)"),
        ("cuda", "none: IPRM_KERNELS_BACKEND asks for cuda, which does not serve cpu"),
        ("tpu", "none: IPRM_KERNELS_BACKEND asks for tpu, which does not serve cpu"),
    ],
)
def test_a_backend_that_the_environment_asks_for_is_used_or_none_is(monkeypatch, asked, on_cpu):
    monkeypatch.setenv("IPRM_KERNELS_BACKEND", asked)
    assert chosen_backends()["cpu"] == on_cpu


def test_a_backend_of_other_devices_does_not_serve_this_one(monkeypatch):
    monkeypatch.setattr(ik, "backends", lambda: {"triton": ik.BackendStatus("triton", True, ("cuda",), (), "")})
    monkeypatch.setenv("IPRM_KERNELS_BACKEND", "triton")
    assert chosen_backends()["cpu"] == "none: IPRM_KERNELS_BACKEND asks for triton, which does not serve cpu"


def test_it_needs_none_of_the_packages_for_training(tmp_path, monkeypatch):
    for name in ("lightning", "rich", "yaml", "jsonargparse", "torchmetrics", "sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("iprm.cli.info", "iprm.cli.parser", "iprm.environment"):
        monkeypatch.delitem(sys.modules, name)
    code, out, err = iprm(tmp_path, "info")
    assert (code, err) == (0, "")
    assert "linear_probe_rebalance" in out
