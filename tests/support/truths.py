"""The row operators with their gradients, and their true results for the ordinary inputs of `cases`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import cases
import numpy as np
import oracle
import torch
from error_budget import Truth
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels.convention import EPS
from iprm_kernels.dtypes import arithmetic_dtype


def mixup_with_gradients(x: Tensor, y: Tensor, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Results and gradients of the backend in use, through autograd."""
    x, y, w = (tensor.detach().requires_grad_() for tensor in (x, y, w))
    z = ik.geodesic_mixup(x, y, w, eps=EPS)
    z.backward(g)
    return {"z": z.detach(), "dx": x.grad, "dy": y.grad, "dw": w.grad}


def kl_with_gradients(p: Tensor, q: Tensor, g: Tensor) -> dict[str, Tensor]:
    p, q = (tensor.detach().requires_grad_() for tensor in (p, q))
    kl = ik.batch_kl(p, q, reduction="none")
    kl.backward(g)
    return {"kl": kl.detach(), "dp": p.grad, "dq": q.grad}


def plain(compute: Callable[..., dict[str, Tensor]], *inputs: Tensor) -> dict[str, Tensor]:
    with ik.use_backend("reference"):
        return {name: value.cpu() for name, value in compute(*inputs).items()}


def few_rows(tensors: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """Evenly spaced rows; 50 digits take some 50 µs per element."""
    picked = torch.linspace(0, len(tensors[0]) - 1, min(rows, len(tensors[0]))).long()
    return tuple(tensor[picked] for tensor in tensors)


@functools.cache
def mixup_truth(batch: int, width: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Truth]]:
    """Inputs on the CPU and their true results."""
    x, y = cases.feature_pairs(batch, width, dtype)
    w = torch.linspace(0, 1, batch, dtype=arithmetic_dtype(dtype))
    inputs = (x, y, w, cases.randn(batch, width, seed=6, dtype=dtype))
    if dtype != torch.float64:
        values = plain(mixup_with_gradients, *(tensor.double() for tensor in inputs))
        return inputs, {name: Truth.of(value) for name, value in values.items()}
    inputs = few_rows(inputs, 1 + 2000 // width)
    rows = [
        oracle.geodesic_mixup(oracle.row(x), oracle.row(y), oracle.row([w])[0], oracle.row(g))
        for x, y, w, g in zip(inputs[0], inputs[1], inputs[2].tolist(), inputs[3], strict=True)
    ]
    return inputs, {name: Truth.of_digits(np.array([getattr(row, name) for row in rows])) for name in ("z", "dx", "dy", "dw")}


@functools.cache
def kl_truth(batch: int, classes: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Truth]]:
    p, q = cases.logit_pairs(batch, classes, dtype)
    inputs = (p, q, 1 + cases.randn(batch, seed=7, dtype=arithmetic_dtype(dtype)).abs())
    if dtype != torch.float64:
        values = plain(kl_with_gradients, *(tensor.double() for tensor in inputs))
        return inputs, {name: Truth.of(value) for name, value in values.items()}
    inputs = few_rows(inputs, 1 + 2000 // classes)
    rows = [oracle.batch_kl(oracle.row(p), oracle.row(q)) for p, q in zip(*inputs[:2], strict=True)]
    kl, dp, dq = (np.array(column) for column in zip(*rows, strict=True))
    g = oracle.row(inputs[2])[:, None]
    return inputs, {"kl": Truth.of_digits(kl), "dp": Truth.of_digits(g * dp), "dq": Truth.of_digits(g * dq)}
