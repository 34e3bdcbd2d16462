"""Every backend, dtype and kind of shape within the error budget of the reference, forward and all gradients."""

from __future__ import annotations

import cases
import numpy as np
import oracle
import pytest
import torch
from error_budget import Truth, assert_within_budget
from places import INTERPRETED, Place
from torch import Tensor
from truths import EPS, kl_truth, kl_with_gradients, mixup_truth, mixup_with_gradients, plain

import iprm_kernels as ik

WIDEST = 20_000

# (B, D), with the reason for each
FEATURE_SHAPES = [
    (5, 1),  # one column: x̂ = ±1
    (129, 2),  # narrower than a vector register; more rows than a block, not a multiple
    (1000, 3),
    (64, 7),
    (129, 16),  # one AVX-512 register of float32, no tail
    (1, 31),  # one row; register and tail
    (2, 64),
    (5, 100),  # padded to a power of two in a Triton block
    (64, 512),  # the size of IPRM's features
    (2, 1000),
    (5, 1024),
    (1000, 100),  # enough rows for every thread
    (2, WIDEST),  # rows longer than a Triton block, so the kernel loops; long sums
]
LOGIT_SHAPES = [
    (1, 2),  # two classes, one row
    (1000, 2),
    (5, 6),  # the classes of CREMA-D
    (129, 31),
    (64, 31),
    (5, 1000),  # looped in registers by cpp, one block in Triton
    (1, 1),  # KL is zero
    (2, WIDEST),  # longer than a Triton block
]
if INTERPRETED:  # each kind of shape with few rows
    FEATURE_SHAPES = [(5, 1), (9, 2), (33, 7), (1, 31), (5, 100), (3, 1024), (2, WIDEST)]
    LOGIT_SHAPES = [(1, 2), (33, 6), (5, 31), (3, 1000), (1, 1), (2, WIDEST)]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), FEATURE_SHAPES)
def test_geodesic_mixup(fused: Place, batch: int, width: int, dtype: torch.dtype) -> None:
    inputs, truth = mixup_truth(batch, width, dtype)
    values = mixup_with_gradients(*(tensor.to(fused.device) for tensor in inputs))
    baseline = plain(mixup_with_gradients, *inputs)
    x_norm, y_norm, g_norm = (tensor.double().norm(dim=1) for tensor in (inputs[0], inputs[1], inputs[3]))
    magnitude = {"z": torch.ones_like(g_norm), "dx": g_norm / x_norm, "dy": g_norm / y_norm, "dw": g_norm}
    for name, value in values.items():
        assert_within_budget(name, value, baseline[name], truth[name], magnitude[name])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), FEATURE_SHAPES)
def test_normalize(fused: Place, batch: int, width: int, dtype: torch.dtype) -> None:
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
    values, baseline = with_gradient(x.to(fused.device), g.to(fused.device)), plain(with_gradient, x, g)
    magnitude = {"out": torch.ones(len(x)), "dx": g.double().norm(dim=1) / x.double().norm(dim=1)}
    for name, value in values.items():
        assert_within_budget(name, value, baseline[name], truth[name], magnitude[name])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "classes"), LOGIT_SHAPES)
def test_batch_kl(fused: Place, batch: int, classes: int, dtype: torch.dtype) -> None:
    inputs, truth = kl_truth(batch, classes, dtype)
    values = kl_with_gradients(*(tensor.to(fused.device) for tensor in inputs))
    baseline = plain(kl_with_gradients, *inputs)
    # the tolerance of a row scales with its KL: near-equal distributions lose no digits. The smallest normal number replaces
    # zero.
    smallest = torch.finfo(torch.float32).tiny
    for name, value in values.items():
        magnitude = truth[name].high.abs().reshape(len(inputs[0]), -1).amax(1).clamp(min=smallest)
        assert_within_budget(name, value, baseline[name], truth[name], magnitude)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [7, 100, 1024])
def test_half_precision_rounds_once(fused: Place, dtype: torch.dtype, width: int) -> None:
    """A 16-bit result is the float32 result rounded once: no intermediate value was stored in 16 bits."""
    x, y = cases.feature_pairs(5, width, dtype, fused.device)
    g, w = cases.randn(5, width, seed=6, dtype=dtype, device=fused.device), torch.full((), 0.3, device=fused.device)
    half = mixup_with_gradients(x, y, w, g)
    single = mixup_with_gradients(x.float(), y.float(), w, g.float())
    kl_half = kl_with_gradients(x, y, w.expand(5))
    kl_single = kl_with_gradients(x.float(), y.float(), w.expand(5))
    for name, value in {**half, **kl_half}.items():
        wanted = {**single, **kl_single}[name]
        # half an ulp of the stored type (below the normal range, half its smallest step), plus the summation order of float32
        step = torch.finfo(dtype).eps * wanted.abs().clamp(min=torch.finfo(dtype).tiny) if value.dtype == dtype else 0.0
        order = 4 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert ((value.float() - wanted).abs() <= step / 2 + order).all(), name
