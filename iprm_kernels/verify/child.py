"""The process in which the kernels of one backend run: `python -m iprm_kernels verify` starts it and reads what it reports.

A job comes as one line of JSON on the standard input, which stays open as long as the parent lives. An empty list is printed
when the process is ready; for each check [number, null] before it begins, and [number, reason, {version: microseconds}] when it
has ended. The process ends after the first exception, because a failed CUDA kernel makes all later ones fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ..backends import BackendUnavailableError, use_backend
from . import formulas
from .checks import check
from .operators import OPERATORS, Inputs, Shape, runner
from .plan import REFUSED
from .timing import Version, side_by_side

#: Seconds of measurement per check.
SECONDS = 0.3


def main() -> None:
    """Runs the checks of the job on the standard input."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no report
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = torch.device(job["device"])
    print("[]", file=report)
    for number, (operator, dtype, shapes, compiled) in enumerate(job["checks"]):
        print(json.dumps([number, None]), file=report)
        times: dict[str, float] = {}
        try:
            reason = _checked(job["backend"], operator, getattr(torch, dtype), [tuple(shape) for shape in shapes], device)
            if not reason:
                times = _timed(job["backend"], operator, getattr(torch, dtype), tuple(shapes[0]), device, compiled)
        except BackendUnavailableError as error:
            reason = f"{REFUSED}{error}"
        except Exception as error:
            print(json.dumps([number, _line(error), {}, True]), file=report)
            traceback.print_exc()
            return
        print(json.dumps([number, reason, times]), file=report)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]


def _checked(backend: str, operator: str, dtype: torch.dtype, shapes: list[Shape], device: torch.device) -> str:
    for shape in shapes:
        if reason := check(backend, operator, dtype, shape, device):
            return f"{' x '.join(map(str, shape))}: {reason}"
    return ""


def _timed(
    backend: str, operator: str, dtype: torch.dtype, shape: Shape, device: torch.device, compiled: bool
) -> dict[str, float]:
    """Medians of forward and backward pass in microseconds, by version."""
    inputs = OPERATORS[operator].inputs(shape, dtype, device)
    run = runner(OPERATORS[operator], inputs)

    def by(name: str) -> Version:
        def inside() -> object:
            with use_backend(name):
                return run()

        return inside

    versions = {name: by(name) for name in (backend, "reference")}
    if compiled and operator in FORMULAS:
        with contextlib.suppress(Exception):  # without a compiler, for example: no fault of the backend
            versions["torch.compile"] = _compiled(operator, inputs)
    return {name: spread.p50 for name, spread in side_by_side(versions, seconds=SECONDS, least=3).items()}


def _compiled(operator: str, inputs: Inputs) -> Version:
    """The operator's formula by torch.compile, forward and backward."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if torch.is_tensor(t) and t.is_floating_point()}
    if "weight" in leaves and operator == "geodesic_mixup":
        leaves["weight"] = leaves["weight"][:, None].detach().requires_grad_()
    function = torch.compile(FORMULAS[operator])
    given: dict[str, Any] = {**inputs, **leaves}
    upstream = torch.ones_like(function(given))
    wanted = [leaf for name, leaf in leaves.items() if not (operator == "normalize" and name != "x")]
    return lambda: torch.autograd.grad(function(given), wanted, upstream)


def _released(i: Inputs) -> torch.Tensor:
    head_x, head_y, head_mix = ((i[f"weight_{m}"], i[f"bias_{m}"]) for m in ("x", "y", "mix"))
    return formulas.released(i["x"], i["y"], head_x, head_y, head_mix, i["target"], i["weight"])


#: Operator -> its formula in plain torch, for torch.compile.
FORMULAS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    "normalize": lambda i: torch.nn.functional.normalize(i["x"], dim=-1),
    "geodesic_mixup": lambda i: formulas.geodesic_mixup(i["x"], i["y"], i["weight"]),
    "batch_kl": lambda i: formulas.batch_kl(i["p"], i["q"]),
    "linear_probe_rebalance": _released,
}
