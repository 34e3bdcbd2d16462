"""`average_strength`: kernel and launcher."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiling import on_device_of

#: Pairs per program: 7 modalities have 21.
AVERAGE_BLOCK = 32


@triton.jit
def is_finite(b):
    return tl.abs(b) < float("inf")


# ALPHA is a constant of the kernel: Triton passes float arguments as float32, even to a float64 kernel.
@triton.jit
def average_strength_kernel(
    p_strength,  # (P, 2)
    p_weight,  # (P,)
    p_eval_weight,  # (P,)
    p_last,  # (P, 2)
    p_steps,  # (P,)
    n_pairs,
    ALPHA: tl.constexpr,
    RELEASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = p_weight.dtype.element_ty
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_pairs
    first = tl.load(p_strength + 2 * o, mask=m, other=0.0)
    second = tl.load(p_strength + 2 * o + 1, mask=m, other=0.0)
    weight = tl.load(p_weight + o, mask=m, other=0.0)
    steps = tl.load(p_steps + o, mask=m, other=0)
    known = is_finite(first)
    alpha = tl.full((), ALPHA, DTYPE)
    if ALPHA < 0.5:  # from the nearer end, so that alpha = 0 and 1 give the ends exactly
        averaged = first + alpha * (weight - first)
    else:
        averaged = weight - (weight - first) * (1 - alpha)
    if not RELEASED:
        averaged = tl.where(steps == 0, first, averaged)
    averaged = tl.where(known, averaged, weight)
    tl.store(p_weight + o, averaged, mask=m)
    tl.store(p_eval_weight + o, weight if RELEASED else averaged, mask=m)
    tl.store(p_last + 2 * o, first, mask=m & known)
    tl.store(p_last + 2 * o + 1, second, mask=m & is_finite(second))
    tl.store(p_steps + o, steps + known.to(tl.int64), mask=m)


def average_strength(
    strength: Tensor, alpha: float, released: bool, weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor
) -> None:
    with on_device_of(weight):
        average_strength_kernel[(triton.cdiv(weight.numel(), AVERAGE_BLOCK),)](
            strength,
            weight,
            eval_weight,
            last,
            steps,
            weight.numel(),
            ALPHA=alpha,
            RELEASED=released,
            BLOCK=AVERAGE_BLOCK,
            num_warps=1,
        )
