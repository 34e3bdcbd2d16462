"""The C++ extension: its build information, and its kernels in the calling convention of `convention`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .convention import KERNELS, REDUCTIONS, HeadBackwardInputs, HeadGradients, HeadInputs, HeadOutputs, Kernel


def load() -> Any:
    """The extension module.

    Raises:
        ImportError: the extension is missing or cannot be loaded; the message says what to do.
    """
    try:
        return importlib.import_module("._C", __package__)
    except ImportError as error:
        raise ImportError(
            f"the C++ extension cannot be imported: {error}; reinstall iprm-kernels where a C++20 compiler is on the PATH, "
            "with IPRM_KERNELS_BUILD=cpu to make a failed build an error"
        ) from error


def build_info() -> dict[str, Any]:
    """Build information of the C++ extension: compiler, flags, CUDA version and architectures, torch.

    Returns:
        A dict whose "extension" is "cpu" or "cuda". Without the extension, "extension" is "none" and "reason" says why.
    """
    try:
        extension = load()
    except ImportError as error:
        return {"extension": "none", "reason": str(error)}
    return dict(extension.build_info())


def kernels(dispatch_key: str) -> dict[str, Callable[..., None]]:
    """The kernels that the loaded extension has registered for "CPU" or "CUDA", by name."""
    found: dict[str, Callable[..., None]] = {}
    for name in KERNELS:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if hasattr(torch.ops.iprm_cpp, name) and has_kernel(f"iprm_cpp::{name}", dispatch_key):
            operator = getattr(torch.ops.iprm_cpp, name).default
            found[name] = ADAPTERS[name](operator) if name in ADAPTERS else operator
    return found


def _batch_kl(operator: Callable[..., None]) -> Callable[..., None]:
    def batch_kl(p_logits: Tensor, q_logits: Tensor, reduction: str, value: Tensor, stats: Tensor) -> None:
        operator(p_logits, q_logits, REDUCTIONS.index(reduction), value, stats)

    return batch_kl


def _batch_kl_backward(operator: Callable[..., None]) -> Callable[..., None]:
    def batch_kl_backward(
        grad: Tensor, p_logits: Tensor, q_logits: Tensor, stats: Tensor, reduction: str, *gradients: Tensor | None
    ) -> None:
        operator(grad, p_logits, q_logits, stats, REDUCTIONS.index(reduction), *gradients)

    return batch_kl_backward


def _head_forward(operator: Callable[..., None]) -> Callable[..., None]:
    def head_forward(inputs: HeadInputs, parts: int, outputs: HeadOutputs) -> None:
        operator(*inputs, parts, *outputs)

    return head_forward


def _head_backward(operator: Callable[..., None]) -> Callable[..., None]:
    def head_backward(inputs: HeadBackwardInputs, gradients: HeadGradients) -> None:
        operator(*inputs, *gradients)

    return head_backward


#: Kernels whose C++ operator takes its arguments in another form: strings leak in the stable ABI, and schemas have no named
#: tuples.
ADAPTERS = {
    "batch_kl": _batch_kl,
    "batch_kl_backward": _batch_kl_backward,
    "head_forward": _head_forward,
    "head_backward": _head_backward,
}


def cpu_kernels() -> dict[str, Kernel]:
    return {name: Kernel(run) for name, run in kernels("CPU").items()}


def cuda_kernels() -> dict[str, Kernel]:
    return {
        name: Kernel(run, _more_than_one_pair, "one pair of two modalities") if name.startswith("head_") else Kernel(run)
        for name, run in kernels("CUDA").items()
    }


def _more_than_one_pair(step: HeadInputs | HeadBackwardInputs, *_: Any) -> str:
    if len(step.features) == 2 and list(step.pairs) == [0, 1]:
        return ""
    return f"its kernels take one pair of two modalities, got {len(step.features)} modalities in {len(step.pairs) // 2} pairs"
