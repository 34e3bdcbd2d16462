"""The command `iprm info`: the backend that serves each operator here, and the reasons against the others."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import version

import pytest
from command import iprm
from iprm.environment import backends_by_operator, chosen_backends

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
    statuses = ik.backends()
    wanted = {
        operator: next(name for name in statuses if "cpu" in statuses[name].operators[operator].default_for)
        for operator in statuses["reference"].operators
    }
    assert section(out, "operators on cpu") == wanted


def test_the_operators_are_the_public_functions_but_those_about_backends():
    functions = {name for name in ik.__all__ if inspect.isroutine(getattr(ik, name))}
    assert set(backends_by_operator()["cpu"]) == functions - {
        "backends",
        "build_info",
        "decompositions",
        "use_backend",
        "verify_backends",
    }


def statuses_of(**operators):
    """A backend "triton" for the CPU with these operator statuses, beside a reference that has all operators."""
    whole = {name: ik.OperatorStatus(True, (), "", "") for name in operators}
    reference = ik.BackendStatus("reference", True, ("any",), ("cpu",), "", whole)
    return lambda: {"triton": ik.BackendStatus("triton", True, ("cpu",), ("cpu",), "", operators), "reference": reference}


def test_each_operator_is_told_by_itself(monkeypatch, no_request):
    """A backend that lacks an operator, or supports it only for some shapes."""
    lacking = ik.OperatorStatus(False, (), "", "it has no kernel normalize")
    statuses = statuses_of(normalize=lacking, linear_probe_rebalance=ik.OperatorStatus(True, ("cpu",), "one pair", ""))
    monkeypatch.setattr(ik, "backends", statuses)
    monkeypatch.setenv("IPRM_KERNELS_BACKEND", "triton")
    assert backends_by_operator()["cpu"] == {
        "normalize": "none: IPRM_KERNELS_BACKEND asks for triton: it has no kernel normalize",
        "linear_probe_rebalance": "triton (IPRM_KERNELS_BACKEND, one pair)",
    }


def test_the_choice_in_a_line_names_the_operators_that_differ(monkeypatch, no_request):
    chosen = {"cpu": {"normalize": "cpp", "batch_kl": "cpp", "average_strength": "reference"}}
    monkeypatch.setattr("iprm.environment.backends_by_operator", lambda: chosen)
    assert chosen_backends() == {"cpu": "cpp (average_strength: reference)"}


def test_every_backend_says_what_it_serves_or_why_it_cannot(tmp_path, no_request):
    rows = section(iprm(tmp_path, "info").out, "backends")
    assert list(rows) == list(ik.backends())
    for name, status in ik.backends().items():
        assert rows[name].startswith("serves " if status.available else "unavailable (")
        assert status.reason in rows[name]


def test_versions_and_the_build_are_listed(tmp_path, no_request):
    out = iprm(tmp_path, "info").out
    assert section(out, "versions")["torch"] == version("torch")
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
    monkeypatch.setattr(
        ik, "backends", lambda: {"triton": ik.BackendStatus("triton", True, ("cuda",), (), "", {"normalize": None})}
    )
    monkeypatch.setenv("IPRM_KERNELS_BACKEND", "triton")
    assert chosen_backends()["cpu"] == "none: IPRM_KERNELS_BACKEND asks for triton, which does not serve cpu"


def test_it_needs_none_of_the_packages_for_training(tmp_path, monkeypatch):
    for name in ("lightning", "rich", "yaml", "jsonargparse", "torchmetrics", "sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("iprm.cli.info", "iprm.cli.parser", "iprm.environment"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    code, out, err = iprm(tmp_path, "info")
    assert (code, err) == (0, "")
    assert "linear_probe_rebalance" in out
