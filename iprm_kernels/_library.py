"""Registration of the operators of namespace `iprm`: schema, kernel, fake kernel and autograd in one call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch._C import DispatchKey, DispatchKeySet


def _keys(*names: str) -> DispatchKeySet:
    return functools.reduce(operator.or_, (DispatchKeySet(getattr(DispatchKey, name)) for name in names))


#: A kernel computes in the types it was given: autocast would narrow the matrix products of one in plain torch.
AUTOCAST = _keys(*(name for name in dir(DispatchKey) if name.startswith("Autocast")))
AUTOGRAD = _keys("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")

LIBRARY = torch.library.Library("iprm", "DEF")


def below(keys: DispatchKeySet) -> Any:
    """A context in which calls go to the kernels below `keys`."""
    return torch._C._ExcludeDispatchKeyGuard(keys)


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Defines `iprm::<schema>` and returns its overload, ready to call.

    `kernel` runs below autograd and autocast, on every device; it selects the backend itself. `setup_context(ctx, inputs,
    outputs)` saves tensors, which come to `backward(ctx, saved, *grads)` unpacked. An operator without a `backward` (every
    `*_backward` operator) refuses to be differentiated, and all refuse forward mode and torch.func's transforms, rather than
    returning silently wrong derivatives.

    The autograd kernel is `torch.library.register_autograd`'s without its bookkeeping for keyword-only and default
    arguments, which no schema here has: geodesic_mixup forward and backward at (64, 512) take 178 µs with that, of which
    26 in kernels, and 101 µs with this (one core, medians).
    """
    name = schema.split("(")[0]

    def run(*arguments: Any) -> Any:
        with below(AUTOCAST):
            return kernel(*arguments)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"iprm::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.iprm, name).default

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"iprm::{name} is not differentiable: second derivatives are not provided; call .backward() without "
            "create_graph, or differentiate the formula in plain torch"
        )

    def forward(ctx: Any, *arguments: Any) -> Any:
        with below(AUTOGRAD):
            output = overload(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    def run_backward(ctx: Any, *grads: Any) -> Any:
        if backward is None:
            return refuse()
        saved = ctx.saved_tensors  # activation checkpointing computes them again here: with autograd, so not below it
        # grad mode is on in a backward pass only under create_graph: otherwise operators called there need no autograd kernel
        if torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with below(AUTOGRAD):
            return backward(ctx, saved, *grads)

    def refuse_forward_mode(*_: Any) -> Any:
        raise RuntimeError(
            f"iprm::{name} has no forward-mode derivative, nor derivatives under torch.func; differentiate it by .backward() "
            "or torch.autograd.grad, or the formula in plain torch"
        )

    function = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(run_backward),
            "jvp": staticmethod(refuse_forward_mode),
        },
    )

    def autograd(*arguments: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            refuse_forward_mode()
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if wanted or forward_ad._current_level >= 0:
            return function.apply(*arguments)  # type: ignore[attr-defined]
        with below(AUTOGRAD):
            return overload(*arguments)

    LIBRARY.impl(name, autograd, "Autograd")
    return overload
