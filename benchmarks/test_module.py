"""`iprm.ProbeRebalance` against the operator inside it: what a module adds to a training step, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import iprm
import pytest
import torch
from timing import DEVICE, Version, gradients_of, side_by_side
from torch import Tensor

import iprm_kernels as ik


def versions_of(batch: int, width: int, classes: int) -> dict[str, Version]:
    """Loss and all gradients by the operator and by the module, of the same features, heads and labels.

    Two sets of features alternate: the module takes a pass over the same tensors for a repetition, which is cheaper.
    """
    torch.manual_seed(0)
    module = iprm.ProbeRebalance(width, classes, alpha=1.0).to(DEVICE)
    module.steps.fill_(1)  # with alpha = 1 and a step behind it λ stays 1/2, so that both compute the same at every call
    features = [[torch.randn(batch, width, device=DEVICE, requires_grad=True) for _ in range(2)] for _ in range(2)]
    target = torch.randint(classes, (batch,), device=DEVICE)
    heads = [(head.weight, head.bias) for head in (*module.heads.values(), *module.mix_heads.values())]
    parameters = [tensor for head in heads for tensor in head]
    weight = torch.tensor(0.5, device=DEVICE)

    def operator(x: Tensor, y: Tensor) -> Tensor:
        return ik.linear_probe_rebalance(x, y, *heads, target, weight).loss

    def step(x: Tensor, y: Tensor) -> Tensor:
        return module({"x": x, "y": y}, target).loss

    def alternating(function: Callable[..., Tensor]) -> Version:
        turns = itertools.cycle([gradients_of(function, [*pair, *parameters], *pair) for pair in features])
        return lambda: next(turns)()

    return {"operator": alternating(operator), "module": alternating(step)}


@pytest.mark.parametrize("shape", [(64, 512, 6), (64, 512, 31), (1024, 512, 31)], ids=str)
def test_module_beside_its_operator(record: Callable[..., None], shape: tuple[int, int, int]) -> None:
    versions = versions_of(*shape)
    for of_module, of_operator in zip(versions["module"](), versions["operator"](), strict=True):
        assert torch.equal(of_module, of_operator)
    times = side_by_side(versions)
    ratio = times["module"].p50 / times["operator"].p50
    line = f"{shape} operator {times['operator'].p50:.0f} µs, module {times['module'].p50:.0f} µs, ratio {ratio:.2f}"
    record("module", line, shape=shape, times={name: spread._asdict() for name, spread in times.items()}, ratio=ratio)
