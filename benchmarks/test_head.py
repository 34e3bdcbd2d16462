"""The linear head step, forward and backward in float32, against sum fusion and the two-pass step as released."""

from __future__ import annotations

import baselines
import pytest
import torch
from timing import Compare, gradients_of
from torch import Tensor

import iprm_kernels as ik


def ours(*arguments: Tensor) -> Tensor:
    return ik.linear_probe_rebalance(*arguments).loss


@pytest.mark.parametrize("shape", [(64, 512, 6), (64, 512, 31), (1024, 512, 31), (8192, 1024, 31)], ids=str)
def test_head_step(compare: Compare, shape: tuple[int, int, int]) -> None:
    batch, width, classes = shape
    x, y = (torch.randn(batch, width, requires_grad=True) for _ in range(2))
    heads = [torch.nn.Linear(width, classes) for _ in range(3)]
    head_x, head_y, head_mix = ((head.weight, head.bias) for head in heads)
    arguments = (x, y, head_x, head_y, head_mix, torch.randint(classes, (batch,)), torch.tensor(0.5))
    leaves = [x, y, *head_x, *head_y]
    compiled = torch.compile(baselines.released)
    versions = {
        "naive": gradients_of(baselines.naive, leaves, *arguments),
        "released": gradients_of(baselines.released, [*leaves, *head_mix], *arguments),
        "compiled": gradients_of(compiled, [*leaves, *head_mix], *arguments),
        "ours": gradients_of(ours, [*leaves, *head_mix], *arguments),
    }
    compare("head step", shape, versions, ("released", "compiled"))
