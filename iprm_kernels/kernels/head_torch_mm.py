"""The head step's products by torch.mm, for heads of many classes, float64, and sizes whose tiles would spill registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..convention import HeadState
from ..registration import AUTOCAST, below
from .head_matmul import head_features_kernel
from .tiling import TILE, scratch


def project(
    features: Sequence[Tensor], heads: tuple[Tensor, ...], pairs: tuple[tuple[int, int], ...], state: HeadState
) -> None:
    """Writes all projections of the features, without biases, into the state."""
    with below(AUTOCAST):
        for k, pair in enumerate(pairs):
            for side, m in enumerate(pair):
                multiply(features[m], heads[k].T, state.projected[k, side])
        for m, x in enumerate(features):
            multiply(x, heads[len(pairs) + m].T, state.unimodal[m])


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, summed and stored in out's type, which may be wider than theirs."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def library_gradients(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    shape: dict[str, Any],
    factors: Tensor,
    of_logits: Tensor,
    grad_features: Sequence[Tensor | None],
    grad_weights: Sequence[Tensor | None],
    grad_biases: Sequence[Tensor | None],
    *,
    add: bool,
) -> None:
    """Computes feature and head gradients from logit gradients with torch.mm, in the output memory. With `add`, head gradients
    accumulate over row chunks."""
    pairs, (batch, width) = shape["PAIRS"], features[0].shape
    block_d = min(triton.next_power_of_2(width), TILE[factors.element_size()])
    block_b = TILE[factors.element_size()] // block_d
    grid = (triton.cdiv(batch, block_b) * triton.cdiv(width, block_d),)
    written: set[int] = set()

    def through_mixture(k: int, g: Tensor | None, outputs: Sequence[Tensor | None], mixture: Tensor | None = None) -> None:
        x, y = (features[m] for m in pairs[k])
        add_x, add_y = (m in written for m in pairs[k])
        if batch:
            head_features_kernel[grid](
                g, x, y, factors[k], *outputs, mixture, *x.stride(), *y.stride(), batch, width, ADD_X=add_x,
                ADD_Y=add_y, BLOCK_B=block_b, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip

    with below(AUTOCAST):
        spare = next((t for t in grad_features if t is not None), None)
        for k, grad_weight in enumerate(grad_weights[: len(pairs)]):
            if grad_weight is not None:
                spare = scratch(features[0], batch, width) if spare is None else spare
                through_mixture(k, None, [None, None], spare)
                torch.addmm(grad_weight, of_logits[k].T, spare, beta=int(add), out=grad_weight)
        for k, pair in enumerate(pairs):
            wanted = {m: grad_features[m] for m in pair if grad_features[m] is not None}
            fresh: Tensor | None = next((t for m, t in wanted.items() if m not in written), None)
            if fresh is not None:
                torch.mm(of_logits[k], weights[k], out=fresh)
            else:  # no unwritten gradient is left whose memory could hold dZ W
                for side, m in enumerate(pair):
                    if (grad := wanted.get(m)) is not None:
                        by_row = factors[k, 2 + side, :, None]
                        grad.addmm_(torch.where(by_row == 0, 0, of_logits[k] * by_row).to(grad.dtype), weights[k])
            if wanted:
                through_mixture(k, fresh, [grad_features[m] for m in pair])
                written.update(wanted)
        for m, x in enumerate(features):
            grad, weight, grad_features_m = of_logits[len(pairs) + m], weights[len(pairs) + m], grad_features[m]
            if grad_features_m is not None:
                torch.addmm(grad_features_m, grad, weight, beta=int(m in written), out=grad_features_m)
            if (grad_weight := grad_weights[len(pairs) + m]) is not None:
                torch.addmm(grad_weight, grad.T, x, beta=int(add), out=grad_weight)
        for grad, grad_bias in zip(of_logits, grad_biases, strict=True):
            if grad_bias is not None:
                torch.add(grad.sum(0), grad_bias, out=grad_bias) if add else torch.sum(grad, 0, out=grad_bias)
