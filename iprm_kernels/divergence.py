"""Divergence of each modality from the mixture, and the strength weights computed from it: `batch_kl`, `strength_weights`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, autocast
from .backends import kernels
from .convention import REDUCTIONS
from .dtypes import arithmetic_dtype
from .registration import register


def batch_kl(p_logits: Tensor, q_logits: Tensor, *, reduction: str = "sum") -> Tensor:
    r"""Kullback-Leibler divergence KL(P ‖ Q) of two batches of predictions, from their logits::

        P, Q = softmax(p_logits), softmax(q_logits)
        KL_i = Σ_k P_ik (log P_ik - log Q_ik)

    Computed as ``Σ P φ(d)`` with ``d = log P - log Q`` and ``φ(d) = d + exp(-d) - 1 >= 0``, which is the same number without
    cancellation: never negative, never NaN for finite logits, zero for equal rows, accurate to the last digits for close
    rows, and unchanged by a constant added to the logits of a row.
    No softmax is written to memory. Differentiable in both arguments.

    Args:
        p_logits: (B, C) logits of P; a class with ``-inf`` has probability zero.
        q_logits: (B, C) logits of Q, same dtype and device. Under autocast the dtypes may differ; both are cast to the widest.
        reduction: "sum" over the batch, "mean" over the batch, or "none".

    Returns:
        () in nats, or (B,) for "none"; float64 for float64 logits, otherwise float32. Infinite where Q is zero and P is not.

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: shapes or devices differ, or `reduction` is unknown.
    """
    casting = isinstance(p_logits, Tensor) and autocast.enabled(p_logits)
    arguments.matrix("p_logits", p_logits, "(B, C)")
    arguments.matrix("q_logits", q_logits, "(B, C)")
    arguments.alike("q_logits", q_logits, "p_logits", p_logits, autocast=casting)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if casting:
        p_logits, q_logits = autocast.widest(p_logits, q_logits)
    return _batch_kl(p_logits, q_logits, reduction)[0]


def strength_weights(kl: Tensor) -> Tensor:
    r"""The strength weights ω of M modalities from their batch KL::

        ω_m = (1 / KL_m) / Σ_j (1 / KL_j)            two modalities: ω_0 = KL_1 / (KL_0 + KL_1)

    The modality whose prediction is closer to the mixture is the stronger one and gets the larger weight. Computed on the
    device without a synchronisation. Where ω has no derivative (several KL zero, or one infinite) the gradient is zero. A NaN
    in `kl` makes all weights NaN.

    Args:
        kl: (M,) divergences, none negative.

    Returns:
        (M,), the dtype of `kl`, summing to one. If any KL are zero, those modalities share the weight equally; an infinite KL
        gets 0; equal KL give uniform weights.

    Raises:
        TypeError: `kl` is not a floating tensor.
        ValueError: `kl` is not of shape (M,) with M at least 1.

    Source: Yang, Wu, Jiang, "Instantaneous Probe-and-Rebalance Multimodal Learning", IJCAI 2025.
    """
    arguments.rows("kl", kl, "(M,)")
    if kl.dim() != 1:
        raise ValueError(f"kl: expected shape (M,), got {tuple(kl.shape)}")
    return _strength_weights(kl)


# batch_kl: (B, C) x2 -> () or (B,), stats (5, B) holding max p, Σ exp(p - max p), the same two for q, and KL


def _batch_kl_kernel(p_logits: Tensor, q_logits: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    batch, dtype, device = p_logits.shape[0], arithmetic_dtype(p_logits.dtype), p_logits.device
    value = torch.empty((batch,) if reduction == "none" else (), dtype=dtype, device=device)
    stats = torch.empty((5, batch), dtype=dtype, device=device)
    kernels(device).batch_kl(p_logits, q_logits, reduction, value, stats)
    return value, stats


def _batch_kl_fake(p_logits: Tensor, q_logits: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    batch, dtype = p_logits.shape[0], arithmetic_dtype(p_logits.dtype)
    shape = (batch,) if reduction == "none" else ()
    return p_logits.new_empty(shape, dtype=dtype), p_logits.new_empty((5, batch), dtype=dtype)


def _batch_kl_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.reduction = inputs[2]
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _batch_kl_autograd(ctx: Any, saved: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    needed = ctx.needs_input_grad[:2]
    p_logits, q_logits, stats = saved
    grad_p, grad_q = _batch_kl_backward(grad, p_logits, q_logits, stats, ctx.reduction, needed)
    return grad_p if needed[0] else None, grad_q if needed[1] else None, None


def _batch_kl_backward_kernel(
    grad: Tensor, p_logits: Tensor, q_logits: Tensor, stats: Tensor, reduction: str, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    # gradients that are not required are returned as empty placeholders, because an operator must return a tensor
    grad_p = torch.empty(p_logits.shape if needed[0] else (0,), dtype=p_logits.dtype, device=p_logits.device)
    grad_q = torch.empty(q_logits.shape if needed[1] else (0,), dtype=q_logits.dtype, device=q_logits.device)
    kernels(p_logits.device).batch_kl_backward(
        grad, p_logits, q_logits, stats, reduction, grad_p if needed[0] else None, grad_q if needed[1] else None
    )
    return grad_p, grad_q


def _batch_kl_backward_fake(
    grad: Tensor, p_logits: Tensor, q_logits: Tensor, stats: Tensor, reduction: str, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    return (
        p_logits.new_empty(p_logits.shape if needed[0] else (0,)),
        q_logits.new_empty(q_logits.shape if needed[1] else (0,)),
    )


_batch_kl = register(
    "batch_kl(Tensor p_logits, Tensor q_logits, str reduction) -> (Tensor, Tensor)",
    _batch_kl_kernel,
    _batch_kl_fake,
    setup_context=_batch_kl_setup,
    backward=_batch_kl_autograd,
)
_batch_kl_backward = register(
    "batch_kl_backward(Tensor grad, Tensor p_logits, Tensor q_logits, Tensor stats, str reduction, bool[] needed) "
    "-> (Tensor, Tensor)",
    _batch_kl_backward_kernel,
    _batch_kl_backward_fake,
)


# batch_kl_pair: KL sums of two predictions from a third, without gradient: (B, C) x3 -> (2,)


def _batch_kl_pair_kernel(p_logits: Tensor, other_logits: Tensor, q_logits: Tensor) -> Tensor:
    kl = torch.empty((2,), dtype=arithmetic_dtype(q_logits.dtype), device=q_logits.device)
    kernels(q_logits.device).batch_kl_pair(p_logits, other_logits, q_logits, kl)
    return kl


def _batch_kl_pair_fake(p_logits: Tensor, other_logits: Tensor, q_logits: Tensor) -> Tensor:
    return q_logits.new_empty((2,), dtype=arithmetic_dtype(q_logits.dtype))


batch_kl_pair = register(
    "batch_kl_pair(Tensor p_logits, Tensor other_logits, Tensor q_logits) -> Tensor",
    _batch_kl_pair_kernel,
    _batch_kl_pair_fake,
)


# strength_weights: (M,) -> (M,)


def _strength_weights_kernel(kl: Tensor) -> Tensor:
    wide = kl.to(arithmetic_dtype(kl.dtype))
    strength = torch.empty(kl.shape, dtype=wide.dtype, device=kl.device)  # (M,)
    kernels(kl.device).strength_weights(wide, strength)
    return strength.to(kl.dtype)


def _strength_weights_fake(kl: Tensor) -> Tensor:
    return kl.new_empty(kl.shape)


def _strength_weights_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _strength_weights_autograd(ctx: Any, saved: Any, grad: Tensor) -> Tensor:
    return _strength_weights_backward(grad, *saved)


def _strength_weights_backward_kernel(grad: Tensor, kl: Tensor) -> Tensor:
    dtype = arithmetic_dtype(kl.dtype)
    grad_kl = torch.empty(kl.shape, dtype=dtype, device=kl.device)  # (M,)
    kernels(kl.device).strength_weights_backward(grad.to(dtype), kl.to(dtype), grad_kl)
    return grad_kl.to(kl.dtype)


def _strength_weights_backward_fake(grad: Tensor, kl: Tensor) -> Tensor:
    return kl.new_empty(kl.shape)


_strength_weights = register(
    "strength_weights(Tensor kl) -> Tensor",
    _strength_weights_kernel,
    _strength_weights_fake,
    setup_context=_strength_weights_setup,
    backward=_strength_weights_autograd,
)
_strength_weights_backward = register(
    "strength_weights_backward(Tensor grad, Tensor kl) -> Tensor",
    _strength_weights_backward_kernel,
    _strength_weights_backward_fake,
)
