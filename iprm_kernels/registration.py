"""Registration of the operators of namespace `iprm`: schema, kernel, fake kernel and autograd in one call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch._C import DispatchKey, DispatchKeySet

P = ParamSpec("P")
R = TypeVar("R")


def _keys(*names: str) -> DispatchKeySet:
    return functools.reduce(operator.or_, (DispatchKeySet(getattr(DispatchKey, name)) for name in names))


#: A kernel in plain torch also runs below these, because it computes in the types of its arguments and autocast would narrow
#: them.
AUTOCAST = _keys(*(name for name in dir(DispatchKey) if name.startswith("Autocast")))
AUTOGRAD = _keys("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")

LIBRARY = torch.library.Library("iprm", "DEF")


def below(keys: DispatchKeySet) -> Any:
    """A context in which calls are dispatched to the kernels below `keys`."""
    return torch._C._ExcludeDispatchKeyGuard(keys)


#: Tensor types without a dispatch of their own. The dispatch of any other subclass must see the operator.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def unobserved(arguments: Sequence[Any]) -> bool:
    """Whether only autograd needs to see a call with these `flattened` arguments: no tracing or compiling, no
    `__torch_dispatch__` or `__torch_function__` mode, no transform, profiler or tensor subclass."""
    if torch.compiler.is_compiling():  # first, because torch.compile cannot trace the other checks
        return False
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    return _all_plain(arguments)


def _all_plain(arguments: Sequence[Any]) -> bool:
    for argument in arguments:
        if type(argument) in PLAIN:
            if argument.is_meta:
                return False
        elif isinstance(argument, torch.Tensor):
            return False
    return True


def flattened(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments with lists replaced by their elements: autograd does not see tensors inside a list."""
    flat = []
    for argument in arguments:
        if type(argument) is list:
            flat += argument
        else:
            flat.append(argument)
    return flat


def register(
    schema: str,
    kernel: Callable[P, R],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[P, R]:
    """Defines `iprm::<schema>` and returns the function that calls it.

    `kernel` runs below autograd, on every device; it selects the backend itself. `setup_context(ctx, inputs,
    outputs)` saves tensors, and `backward(ctx, saved, *grads)` receives them unpacked. If an operator takes lists, gradients
    and `ctx.needs_input_grad` follow the order of the tensors, list after list. An operator without a `backward` (every
    `*_backward` operator) cannot be differentiated: it raises. All operators raise under forward mode and torch.func's
    transforms, rather than return silently wrong derivatives.

    Where nothing observes the call (`unobserved`), the returned function bypasses PyTorch's dispatcher and runs the same
    kernel, setup and backward, with the same results. Forward and backward with the dispatcher and without it, medians on one
    core of a Xeon with AVX-512: batch_kl at (64, 31) 134 and 114 µs, the head step at (64, 512, 6) 469 and 420 µs.
    """
    name = schema.split("(")[0]
    run: Callable[..., Any] = kernel

    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"iprm::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.iprm, name).default

    def through_dispatcher(*arguments: Any) -> Any:
        with below(AUTOGRAD):
            return overload(*arguments)

    takes, returns = schema.split("->")
    lists, returns_list = "[]" in takes, "[]" in returns
    registered = _function(name, through_dispatcher, setup_context, backward, lists)
    direct = _function(name, kernel, setup_context, backward, lists)

    def applied(function: Any, flat: Sequence[Any], arguments: Sequence[Any]) -> Any:
        output = function.apply(*flat, arguments) if lists else function.apply(*flat)
        return list(output) if returns_list else output

    def autograd(*arguments: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            registered.jvp()
        flat = flattened(arguments) if lists else arguments
        if _differentiated(flat) or forward_ad._current_level >= 0:
            return applied(registered, flat, arguments)
        return through_dispatcher(*arguments)

    LIBRARY.impl(name, autograd, "Autograd")

    def call(*arguments: Any) -> Any:
        flat = flattened(arguments) if lists else arguments
        if not unobserved(flat):
            return overload(*arguments)
        if not _differentiated(flat):
            return run(*arguments)
        return applied(direct, flat, arguments)

    return cast("Callable[P, R]", call)


def _differentiated(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)


def _function(
    name: str,
    run: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
    lists: bool,
) -> Any:
    """The autograd function of an operator. If the operator takes lists, the function takes the `flattened` arguments, followed
    by the original ones.

    It does what `torch.library.register_autograd` does, without the bookkeeping for keyword-only and default arguments, which
    no schema here has: geodesic_mixup forward and backward at (64, 512) take 178 µs with register_autograd, of which 26 in
    kernels, and 101 µs with this function (one core, medians).
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        if lists:
            arguments = arguments[-1]
        output = run(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return tuple(output) if type(output) is list else output

    def run_backward(ctx: Any, *grads: Any) -> Any:
        if backward is None:
            raise RuntimeError(
                f"iprm::{name} is not differentiable: second derivatives are not provided; call .backward() without "
                "create_graph, or differentiate the formula in plain torch"
            )
        # activation checkpointing recomputes the saved tensors here; that needs autograd, so it happens outside any guard
        found = backward(ctx, ctx.saved_tensors, *grads)
        return (*found, None) if lists else found

    def refuse_forward_mode(*_: Any) -> Any:
        raise RuntimeError(
            f"iprm::{name} has no forward-mode derivative, nor derivatives under torch.func; differentiate it by .backward() "
            "or torch.autograd.grad, or the formula in plain torch"
        )

    methods = {"forward": forward, "backward": run_backward, "jvp": refuse_forward_mode}
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
