"""Unit vectors and their mixture along a great circle: `normalize`, `geodesic_mixup`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import arguments, autocast
from .backends import kernels
from .convention import EPS
from .dtypes import arithmetic_dtype
from .registration import register


def normalize(x: Tensor, *, eps: float = EPS) -> Tensor:
    r"""Rows scaled to unit length: ``x / max(‖x‖, eps)``.

    Equal to ``torch.nn.functional.normalize(x, dim=-1, eps=eps)``, except that a row with ``‖x‖ <= eps`` receives a zero
    gradient instead of ``g / eps``.

    Args:
        x: (..., D) features; float16 and bfloat16 are computed in float32.
        eps: the smallest length divided by; at least 1e-18, for float64 at least 1e-150.

    Returns:
        (..., D), the dtype of `x`. A row that is not finite, or whose squared length overflows, is NaN throughout.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` has no last dimension of at least 1, or `eps` is out of range.
    """
    arguments.rows("x", x)
    unit, _ = _normalize(_as_rows(x), arguments.epsilon(eps, x))
    return unit if x.dim() == 2 else unit.view(x.shape)


def geodesic_mixup(x: Tensor, y: Tensor, weight: float | Tensor, *, eps: float = EPS) -> Tensor:
    r"""The point of the great circle from ŷ (weight 0) to x̂ (weight 1)::

        x̂, ŷ = normalize(x), normalize(y);   θ = arccos ⟨x̂, ŷ⟩
        z = sin(wθ)/sin θ · x̂ + sin((1-w)θ)/sin θ · ŷ

    Also called slerp. Value and gradient are exact down to identical vectors (``z = x̂``), where the quotient is
    evaluated as an analytic function. Opposite vectors have no unique geodesic: ⟨x̂, ŷ⟩ is clamped to at least -1 + 1e-6
    (1e-12 in float64), which keeps z finite and no longer than 1, with no gradient through the clamp. The clamp begins at an
    angle of 179.92° (179.9999° in float64). Before it, z has the rounding error of a difference of vectors of length 1/(π - θ):
    some ulps of that length.

    Args:
        x: (..., D) features; float16 and bfloat16 are computed in float32.
        y: (..., D) features of the same shape, dtype and device. Under autocast the dtypes may differ; both are cast to the
            widest.
        weight: w, the weight of `x`: a float, a 0-d tensor, or a tensor of shape (...) with one weight per row; on the device
            of `x`. Values outside [0, 1] continue the circle beyond x̂ or ŷ. A tensor receives a gradient if it requires one.
        eps: the smallest length divided by, as in :func:`normalize`.

    Returns:
        (..., D), the dtype of `x`, under autocast the widest. A row that is not finite, or whose squared length overflows, is
        NaN throughout and affects no other row; a row with ``‖x‖ <= eps`` receives a zero gradient.

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: shapes or devices differ, `weight` has the wrong shape or is not finite, or `eps` is out of range.

    Source: Oh et al., "Geodesic Multi-Modal Mixup for Robust Fine-Tuning", NeurIPS 2023; the gradient is this project's.
    """
    casting = isinstance(x, Tensor) and autocast.enabled(x)
    arguments.rows("x", x)
    arguments.rows("y", y)
    arguments.alike("y", y, "x", x, autocast=casting)
    weight = arguments.mixing_weight(weight, x, x.shape[:-1])
    if casting:
        x, y = autocast.widest(x, y)
    z, _ = _geodesic_mixup(_as_rows(x), _as_rows(y), weight, arguments.epsilon(eps, x))
    return z if x.dim() == 2 else z.view(x.shape)


def _as_rows(features: Tensor) -> Tensor:
    """(..., D) -> (B, D). A matrix is returned unchanged: a view would add a node to the autograd graph."""
    return features if features.dim() == 2 else features.reshape(-1, features.shape[-1])


# normalize: (B, D) -> (B, D), norm (B,)


def _normalize_kernel(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # (B, D)
    norm = torch.empty(x.shape[:1], dtype=arithmetic_dtype(x.dtype), device=x.device)  # (B,)
    kernels(x.device).normalize(x, eps, out, norm)
    return out, norm


def _normalize_fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=arithmetic_dtype(x.dtype))


def _normalize_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.eps = inputs[1]
    ctx.save_for_backward(inputs[0], output[1])


def _normalize_autograd(ctx: Any, saved: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    x, norm = saved
    return _normalize_backward(grad, x, norm, ctx.eps), None


def _normalize_backward_kernel(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # (B, D)
    kernels(x.device).normalize_backward(grad, x, norm, eps, grad_x)
    return grad_x


def _normalize_backward_fake(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


_normalize = register(
    "normalize(Tensor x, float eps) -> (Tensor, Tensor)",
    _normalize_kernel,
    _normalize_fake,
    setup_context=_normalize_setup,
    backward=_normalize_autograd,
)
_normalize_backward = register(
    "normalize_backward(Tensor grad, Tensor x, Tensor norm, float eps) -> Tensor",
    _normalize_backward_kernel,
    _normalize_backward_fake,
)


# geodesic_mixup: (B, D) x2, weight () or (B,) -> (B, D), stats (3, B) holding ‖x‖, ‖y‖, ⟨x̂, ŷ⟩ (see SAVED_BELOW)


def _row_weight(x: Tensor, weight: Tensor) -> Tensor:
    """The weight in the arithmetic type, one value per row; a 0-d weight is expanded with stride 0.  -> (B,)"""
    return weight.to(arithmetic_dtype(x.dtype)).expand(x.shape[0])


def _geodesic_mixup_kernel(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # (B, D)
    stats = torch.empty((3, x.shape[0]), dtype=arithmetic_dtype(x.dtype), device=x.device)  # (3, B)
    kernels(x.device).geodesic_mixup(x, y, _row_weight(x, weight), eps, z, stats)
    return z, stats


def _geodesic_mixup_fake(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((3, x.shape[0]), dtype=arithmetic_dtype(x.dtype))


def _geodesic_mixup_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, y, weight, output[1])


def _geodesic_mixup_autograd(ctx: Any, saved: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    needed = ctx.needs_input_grad[:3]
    x, y, weight, stats = saved
    grad_x, grad_y, grad_w = _geodesic_mixup_backward(grad, x, y, weight, stats, ctx.eps, needed)
    return grad_x if needed[0] else None, grad_y if needed[1] else None, grad_w if needed[2] else None, None


def _geodesic_mixup_backward_kernel(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # gradients that are not required are returned as empty placeholders, because an operator must return a tensor
    grad_x = torch.empty(x.shape if needed[0] else (0,), dtype=x.dtype, device=x.device)  # (B, D)
    grad_y = torch.empty(y.shape if needed[1] else (0,), dtype=y.dtype, device=y.device)  # (B, D)
    grad_w = torch.empty(x.shape[:1] if needed[2] else (0,), dtype=stats.dtype, device=x.device)  # (B,)
    kernels(x.device).geodesic_mixup_backward(
        grad,
        x,
        y,
        _row_weight(x, weight),
        stats,
        eps,
        grad_x if needed[0] else None,
        grad_y if needed[1] else None,
        grad_w if needed[2] else None,
    )
    if needed[2]:
        grad_w = (grad_w if weight.dim() else grad_w.sum()).to(weight.dtype)
    return grad_x, grad_y, grad_w


def _geodesic_mixup_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needed[0] else (0,)),
        y.new_empty(y.shape if needed[1] else (0,)),
        weight.new_empty(weight.shape) if needed[2] else stats.new_empty((0,)),
    )


_geodesic_mixup = register(
    "geodesic_mixup(Tensor x, Tensor y, Tensor weight, float eps) -> (Tensor, Tensor)",
    _geodesic_mixup_kernel,
    _geodesic_mixup_fake,
    setup_context=_geodesic_mixup_setup,
    backward=_geodesic_mixup_autograd,
)
_geodesic_mixup_backward = register(
    "geodesic_mixup_backward(Tensor grad, Tensor x, Tensor y, Tensor weight, Tensor stats, float eps, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)",
    _geodesic_mixup_backward_kernel,
    _geodesic_mixup_backward_fake,
)


# geodesic_remix: geodesic_mixup from the statistics of an earlier mixture of the same features


def _geodesic_remix_kernel(x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float) -> Tensor:
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # (B, D)
    kernels(x.device).geodesic_remix(x, y, _row_weight(x, weight), stats, eps, z)
    return z


def _geodesic_remix_fake(x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _geodesic_remix_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *saved, ctx.eps = inputs
    ctx.save_for_backward(*saved)


def _geodesic_remix_autograd(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *grads, _ = _geodesic_mixup_autograd(ctx, saved, grad, None)
    return *grads, None, None


_geodesic_remix = register(
    "geodesic_remix(Tensor x, Tensor y, Tensor weight, Tensor stats, float eps) -> Tensor",
    _geodesic_remix_kernel,
    _geodesic_remix_fake,
    setup_context=_geodesic_remix_setup,
    backward=_geodesic_remix_autograd,
)


def mixed_twice(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`geodesic_mixup` of two matrices of one dtype, without gradient, and a function that mixes them again by another weight,
    with gradient, from the same norms and inner products."""
    z, stats = _geodesic_mixup(x.detach(), y.detach(), weight, EPS)
    return z, lambda other: _geodesic_remix(x, y, other, stats, EPS)
