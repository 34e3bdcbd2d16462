"""What benchmarks/timing.py runs beside the computation that it times."""

from __future__ import annotations

import importlib

import pytest
import timing
import torch
from torch_operators import TorchOperators

import iprm_kernels as ik


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: filling memory is an operator too."""


def test_a_timed_step_computes_nothing_but_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a sum of the loss and the gradient that autograd fills are two launches beside our three to seven."""
    x, y, weight = (torch.randn(shape, requires_grad=True) for shape in ((8, 5), (8, 5), (3, 5)))
    bias, target, probing = torch.randn(3, requires_grad=True), torch.arange(8) % 3, torch.tensor(0.5)
    heads = [(weight, bias), (weight.detach(), None), (weight.detach(), None)]
    step = timing.gradients_of(lambda: ik.linear_probe_rebalance(x, y, *heads, target, probing).loss, [x, y, weight, bias])
    first = step()
    monkeypatch.setattr(importlib.import_module("iprm_kernels.registration"), "unobserved", lambda arguments: True)
    with TorchOperators() as operators:
        second = step()
    assert not operators.found
    for value, again in zip(first, second, strict=True):
        assert torch.equal(value, again)
