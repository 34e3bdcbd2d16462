"""The row operators held to the error budget: results and gradients of the backend in use, of one shape and type."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from error_budget import Truth, assert_within_budget
from torch import Tensor
from truths import EPS, kl_truth, kl_with_gradients, mixup_truth, mixup_with_gradients, plain

import iprm_kernels as ik


def assert_mixup_within_budget(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, truth = mixup_truth(batch, width, dtype)
    values = mixup_with_gradients(*(tensor.to(device) for tensor in inputs))
    baseline = plain(mixup_with_gradients, *inputs)
    x_norm, y_norm, g_norm = (tensor.double().norm(dim=1) for tensor in (inputs[0], inputs[1], inputs[3]))
    magnitude = {"z": torch.ones_like(g_norm), "dx": g_norm / x_norm, "dy": g_norm / y_norm, "dw": g_norm}
    for name, value in values.items():
        assert_within_budget(name, value, baseline[name], truth[name], magnitude[name])


def assert_normalize_within_budget(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    (x, _, _, g), _ = mixup_truth(batch, width, dtype)

    def with_gradient(x: Tensor, g: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        out = ik.normalize(x, eps=EPS)
        out.backward(g)
        return {"out": out.detach(), "dx": x.grad}

    if dtype == torch.float64:  # normalize(x) is the mixture of x with itself by the weight 1
        rows = [oracle.geodesic_mixup(oracle.row(x), oracle.row(x), 1, oracle.row(g)) for x, g in zip(x, g, strict=True)]
        truth = {
            "out": Truth.of_digits(np.array([row.z for row in rows])),
            "dx": Truth.of_digits(np.array([row.dx for row in rows])),
        }
    else:
        truth = {name: Truth.of(value) for name, value in plain(with_gradient, x.double(), g.double()).items()}
    values, baseline = with_gradient(x.to(device), g.to(device)), plain(with_gradient, x, g)
    magnitude = {"out": torch.ones(len(x)), "dx": g.double().norm(dim=1) / x.double().norm(dim=1)}
    for name, value in values.items():
        assert_within_budget(name, value, baseline[name], truth[name], magnitude[name])


def assert_kl_within_budget(batch: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs, truth = kl_truth(batch, classes, dtype)
    values = kl_with_gradients(*(tensor.to(device) for tensor in inputs))
    baseline = plain(kl_with_gradients, *inputs)
    # the tolerance of a row scales with its KL: near-equal distributions lose no digits. The smallest normal number replaces
    # zero.
    smallest = torch.finfo(torch.float32).tiny
    for name, value in values.items():
        magnitude = truth[name].high.abs().reshape(len(inputs[0]), -1).amax(1).clamp(min=smallest)
        assert_within_budget(name, value, baseline[name], truth[name], magnitude)
