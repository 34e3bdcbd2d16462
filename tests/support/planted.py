"""A backend of faulty kernels on the CPU, one fault per operator, in the place of "triton".

`main` is the child process of `python -m iprm_kernels verify` with these kernels.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iprm_kernels.convention import Kernel
from iprm_kernels.loading import Loaded
from iprm_kernels.reference import kernels as reference
from iprm_kernels.verify import child

choice = importlib.import_module("iprm_kernels.backends")
whole = {name: kernel.run for name, kernel in reference.SERVES.items()}
calls = itertools.count()


def wrong(x: Tensor, eps: float, out: Tensor, norm: Tensor) -> None:
    whole["normalize"](x, eps, out, norm)
    out[0] *= 1 + 1e-5


def crashing(*arguments: Any) -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # also where a sanitizer handles it
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(*arguments: Any) -> None:
    time.sleep(1000)


def unwritten(kl: Tensor, strength: Tensor) -> None:
    written = torch.zeros_like(strength)
    whole["strength_weights"](kl, written)
    strength[:-1] = written[:-1]


def changing(strength: Tensor, *arguments: Any) -> None:
    whole["average_strength"](strength, *arguments)
    arguments[2].mul_(1 + next(calls) % 2 * torch.finfo(strength.dtype).eps)


def slow(*arguments: Any) -> None:
    time.sleep(0.01)
    whole["head_forward"](*arguments)


#: Operator -> its fault.
FAULTS: dict[str, Callable[..., None]] = {
    "normalize": wrong,
    "geodesic_mixup": crashing,
    "batch_kl": hanging,
    "strength_weights": unwritten,
    "average_strength": changing,
    "head_forward": slow,
}


def serves() -> dict[str, Kernel]:
    """All kernels by name, those of `FAULTS` with their faults."""
    return {name: Kernel(FAULTS.get(name, run)) for name, run in whole.items()}


def install(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Puts the planted backend in the place of "triton"."""
    load = choice.load
    planted = Loaded(serves(), ("cpu",), "planted, for tests")
    replace(choice, "load", lambda name: planted if name == "triton" else load(name))


def main() -> None:
    """The child process."""
    install()
    child.main()
