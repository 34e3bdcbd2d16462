"""Heads of fusion modules: the plain ones, whose parameters an operator may read instead of calling them, and the calls of all
others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from iprm.errors import InputError

LinearParameters = tuple[Tensor, Tensor | None]

PLAIN_TENSORS = (nn.Parameter, Tensor)
_LINEAR_FORWARD = nn.Linear.forward


def plain_parameters(heads: Iterable[nn.Module], width: int, classes: int) -> list[LinearParameters] | None:
    """(weight (C, D), bias (C,) or None) of each head if calling it does no more than ``F.linear``; None if any does more.

    Subclasses of `nn.Linear`, parametrisations, hooks, a replaced ``forward``, weights that a hook computes (pruning, the older
    weight and spectral normalisation) and weights of a tensor subclass (quantised ones) all change what a call does.
    """
    if _has_any_global_hook() or nn.Linear.forward is not _LINEAR_FORWARD:
        return None
    found: list[LinearParameters] = []
    for head in heads:
        if type(head) is not nn.Linear or "forward" in head.__dict__:
            return None
        if head._forward_pre_hooks or head._forward_hooks or head._backward_pre_hooks or head._backward_hooks:
            return None
        parameters = head._parameters
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters or weight.shape != (classes, width):
            return None
        if type(weight) not in PLAIN_TENSORS and not torch.compiler.is_compiling():
            return None
        found.append((weight, parameters["bias"]))
    return found


def logits_of(name: str, head: nn.Module, x: Tensor, classes: int, training: bool) -> Tensor:
    """Calls a head, hooks included.  (B, D) -> (B, C)

    The logits have the dtype of the features. Under autocast they have that of autocast, unless the features are float64.

    Raises:
        InputError: no module, a linear head of another width, an output that is not (B, C) logits in the dtype of the features,
            or in training a quantised head, which would leave the features without its gradient; the message has the `name`.
    """
    if not isinstance(head, nn.Module):
        raise InputError(f"{name}: expected a module (B, {x.shape[1]}) -> (B, {classes}), got {head!r}")
    changed = type(head) is not nn.Linear or head._forward_pre_hooks or "forward" in head.__dict__
    if not changed and head.in_features != x.shape[1]:
        raise _refused(name, head, f"a head for features of width {x.shape[1]}, got one for {head.in_features}")
    if training and x.requires_grad and torch.is_grad_enabled() and _quantised(head):
        raise _refused(name, head, "a head with a gradient, got a quantised one, which is for evaluation alone")
    logits = head(x)
    expected = f"an output of shape {(*x.shape[:1], classes)}"
    if not isinstance(logits, Tensor):
        raise _refused(name, head, f"{expected}, got {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] != classes:
        raise _refused(name, head, f"{expected}, got {tuple(logits.shape)}")
    if logits.is_quantized or not logits.is_floating_point():
        raise _refused(name, head, f"floating logits, got {logits.dtype}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # whose layers return either type
        return logits.to(torch.get_autocast_dtype(x.device.type))
    if logits.dtype != x.dtype:
        raise _refused(name, head, f"logits of the dtype of the features, {x.dtype}, got {logits.dtype}")
    return logits


def _quantised(head: nn.Module) -> bool:
    return any(type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")) for module in head.modules())


def _refused(name: str, head: nn.Module, what: str) -> InputError:
    return InputError(f"{name} ({type(head).__name__}): expected {what}")
