"""A run verifies the kernels that it calls at its first use of a GPU, and never on a CPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from command import iprm
from iprm.cli import fit
from iprm.training import verification
from iprm.training.classifier import FusionClassifier

import iprm_kernels as ik
from iprm_kernels.convention import OPERATORS
from iprm_kernels.verdict import Case
from iprm_kernels.verify.plan import Check
from iprm_kernels.verify.run import Outcome, Verification

backends = sys.modules["iprm_kernels.backends"]  # in the package, the function of this name hides the module


def model(method, modalities=2):
    return FusionClassifier({name: [5] for name in "xyz"[:modalities]}, 4, method, feature_dim=16)


@pytest.fixture
def asked(monkeypatch):
    """What `verify_backends` was called with; it reports one check that passed and one that failed."""
    calls = []
    check = Check(Case("normalize", "float32", "small"), ((2, 3),))

    def verify_backends(device, *, progress, **options):
        calls.append({"device": device, **options})
        if progress:
            progress(0, 2, "triton starts")
            progress(1, 2, "triton normalize float32 small")
        return Verification([Outcome("triton", check, "", {}), Outcome("triton", check, "not finite", {})], "/file")

    monkeypatch.setattr(ik, "verify_backends", verify_backends)
    monkeypatch.setattr(verification, "device_name", lambda device: "cuda: a GPU")
    monkeypatch.delenv("IPRM_KERNELS_BACKEND", raising=False)
    return calls


def trainer(device, precision="32-true", rank=0):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), precision=precision, local_rank=rank)


def test_a_run_verifies_its_operators_types_and_size(asked, capsys):
    verification.verify_kernels(trainer("cuda:0", "bf16-mixed"), model("iprm"), 64)
    assert asked == [
        {
            "device": torch.device("cuda:0"),
            "operators": ("linear_probe_rebalance", "average_strength", "geodesic_mixup"),
            "dtypes": (torch.bfloat16, torch.float32),
            "step": (64, 16, 4),
        }
    ]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "verifying the kernels on cuda: a GPU, once, in less than a minute",
        "  0/2 triton starts",
        "  1/2 triton normalize float32 small",
        "kernels: 1 checks passed, 1 failed; verdict: /file",
        "  triton normalize float32 small: not finite",
    ]


def test_three_modalities_use_the_step_of_pairs(asked):
    verification.verify_kernels(trainer("cuda:0"), model("iprm", 3), 64)
    assert asked[0]["operators"][0] == "linear_probe_rebalance_pairs"


@pytest.mark.parametrize(
    ("device", "method", "precision", "backend"),
    [
        ("cpu", "iprm", "32-true", ""),
        ("cuda:0", "sum", "32-true", ""),  # no operator
        ("cuda:0", "iprm", "transformer-engine", ""),
        ("cuda:0", "iprm", "32-true", "reference"),  # asked for
    ],
)
def test_other_runs_verify_nothing(asked, device, method, precision, backend, monkeypatch):
    if backend:
        monkeypatch.setenv("IPRM_KERNELS_BACKEND", backend)
    verification.verify_kernels(trainer(device, precision), model(method), 64)
    assert asked == []


def test_one_process_prints(asked, capsys):
    verification.verify_kernels(trainer("cuda:1", rank=1), model("iprm"), 64)
    assert len(asked) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["iprm", "iprm-linear", "iprm-one-pass", "iprm-no-ema"])
@pytest.mark.parametrize("modalities", [2, 3])
def test_the_operators_of_a_method_are_those_it_calls(method, modalities, monkeypatch):
    """Forward pass in training and evaluation; kernels by name of those that the listed operators call."""
    fusion, called, select = model(method, modalities).fusion, set(), backends._select
    monkeypatch.setattr(backends, "_select", lambda *given: Counting(select(*given), called))
    features = {name: torch.randn(5, 16, requires_grad=True) for name in "xyz"[:modalities]}
    fusion(features, torch.arange(5) % 4).loss.backward()
    fusion.eval()(features)
    assert called <= {kernel for operator in fusion.operators for kernel in OPERATORS[operator]}
    assert all(called & set(OPERATORS[operator]) for operator in fusion.operators)


class Counting:
    def __init__(self, kernels, called):
        self._kernels, self._called = kernels, called

    def __getattr__(self, name):
        self._called.add(name)
        return getattr(self._kernels, name)


def test_fit_and_compare_ask_before_they_train(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fit, "verify_kernels", lambda trainer, model, rows: asked.append((trainer.current_epoch, rows)))
    short = ("--data.batch_size", "50", "--model.feature_dim", "4", "--trainer.max_epochs", "1")
    assert iprm(tmp_path, "fit", "--data", "digits", *short).code == 0
    short = ("--methods", "iprm", "--seeds", "1", "--epochs", "1", "--jobs", "1", "--data.batch_size=40")
    assert iprm(tmp_path, "compare", "--data", "digits", *short, "--model.feature_dim=4").code == 0
    assert asked == [(0, 50), (0, 40)]
