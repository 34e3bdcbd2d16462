"""Times geodesic_mixup and batch_kl, forward and backward, beside their formulas in eager and compiled torch."""

from __future__ import annotations

from collections.abc import Callable

import baselines
import pytest
import torch
from timing import DEVICE, Compare, Version, gradients_of, ours

import iprm_kernels as ik


@pytest.mark.parametrize("shape", [(64, 512), (1024, 512), (8192, 1024)], ids=str)
def test_geodesic_mixup(compare: Compare, shape: tuple[int, int]) -> None:
    x, y, grad = (torch.randn(shape, device=DEVICE) for _ in range(3))
    x.requires_grad_(), y.requires_grad_()
    torch.compiler.reset()  # otherwise sizes are dynamic from the second shape on
    compiled = torch.compile(baselines.geodesic_mixup)

    def step(function: Callable[..., torch.Tensor]) -> Version:
        def run() -> list[torch.Tensor]:
            z = function(x, y, 0.3)
            return [z.detach(), *torch.autograd.grad(z, (x, y), grad)]

        return run

    versions = {"eager": step(baselines.geodesic_mixup), "compiled": step(compiled), **ours(step(ik.geodesic_mixup))}
    compare("geodesic_mixup", shape, versions, ("eager", "compiled"))


@pytest.mark.parametrize("shape", [(64, 31), (8192, 31), (8192, 1000)], ids=str)
def test_batch_kl(compare: Compare, shape: tuple[int, int]) -> None:
    p, q = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    torch.compiler.reset()
    plain = {"eager": baselines.batch_kl, "compiled": torch.compile(baselines.batch_kl)}
    versions = {name: gradients_of(function, [p, q], p, q) for name, function in plain.items()}
    compare("batch_kl", shape, {**versions, **ours(gradients_of(ik.batch_kl, [p, q], p, q))}, ("eager", "compiled"))
