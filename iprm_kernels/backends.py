"""Selects the backend of a call by operator, device, type and shape."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch

from . import verdict
from .convention import KERNELS, OPERATORS, Kernels
from .loading import NAMES, load
from .verdict import Case, Result


class Choice(NamedTuple):
    """A row of the table below: a backend that is tried for tensors on a device when the user has requested none."""

    device: str  #: a device type, or "any"
    backend: str
    measured: str  #: the measurement that justifies this row


#: Default backends where `python -m iprm_kernels verify` has not run, best first: a call is served by the first one that has
#: the kernel and accepts the shape. The verdict of a machine replaces them by the backends that passed there and were measured
#: faster than the reference; on a GPU no others serve.
TABLE = (
    Choice("cpu", "cpp", "head step forward + backward, two Zen 4 cores: 0.30 ms at (64, 512, 6) where the released code's two "
           "passes take 1.11, 23.6 at (256, 512, 1000) where they take 28.5 and the library's products with the rows in plain "
           "torch 55.7"),
    Choice("any", "reference", "correct on every device"),
)  # fmt: skip


class BackendUnavailableError(RuntimeError):
    """The requested backend cannot run here, or cannot run this operator; the message gives the reason."""


@dataclass(frozen=True)
class OperatorStatus:
    """The report of `backends` on one operator of one backend."""

    available: bool
    default_for: tuple[str, ...]  #: device types it serves here if no backend is requested, within its limits
    limits: str  #: the shapes it serves; empty if it serves all
    reason: str  #: why it is not available; empty if it is
    #: by device type, what `verify` found there, or that it has not run
    verified: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.available:
            return f"unavailable ({self.reason})"
        return f"available ({self.limits})" if self.limits else "available"


@dataclass(frozen=True)
class BackendStatus:
    """The report of `backends` on one backend."""

    name: str
    available: bool
    devices: tuple[str, ...]  #: device types it serves here; ("any",) for all of them
    default_for: tuple[str, ...]  #: device types for which it is the default of at least one operator
    reason: str  #: why it cannot run, or a remark if it can
    operators: Mapping[str, OperatorStatus]  #: by name

    def __str__(self) -> str:
        state = f"serves {', '.join(self.devices)}" if self.available else "unavailable"
        default = f", default for {', '.join(self.default_for)}" if self.default_for else ""
        return f"{self.name}: {state}{default}" + (f" ({self.reason})" if self.reason else "")


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


# Process-wide instead of thread-local, because autograd runs the backward passes of GPU tensors in its own threads. Each entry
# is a list, so that entries are removed by identity and two threads can request the same backend.
_requested: list[list[str]] = []
# Read once: a lookup in os.environ takes 4 µs, a tenth of a small forward pass.
_from_environment = os.environ.get("IPRM_KERNELS_BACKEND")


def requested() -> str | None:
    """The backend requested by `use_backend` or IPRM_KERNELS_BACKEND; None if the table decides."""
    return _requested[-1][0] if _requested else _from_environment


def _candidates(name: str | None, device_type: str) -> list[str]:
    return [_known(name)] if name else [row.backend for row in TABLE if row.device in (device_type, "any")]


@functools.cache
def _select(name: str | None, device: torch.device) -> SimpleNamespace:
    if name is None:
        results = verdict.read(device)
        return SimpleNamespace(**{kernel: _verified(kernel, device, results) for kernel in KERNELS})
    return SimpleNamespace(**{kernel: _serving(kernel, [_known(name)], device.type) for kernel in KERNELS})


def forget() -> None:
    """Makes the next call read the verdict anew."""
    _select.cache_clear()


def _verified(kernel: str, device: torch.device, results: Sequence[Result] | None) -> Callable[..., None]:
    """The kernel that serves by default; a function that selects one by type and size if they differ."""
    table = _candidates(None, device.type)
    unverified = _serving(kernel, table, device.type)
    others = any(not load(name).obstacle(kernel, device.type) for name in NAMES[1:])
    mine = [result.case for result in results or () if kernel in OPERATORS[result.case.operator]]
    if not others or (device.type == "cpu" and all(_order(kernel, case, device, results or ()) == table for case in mine)):
        return unverified
    of_head, place = kernel.startswith("head_"), int(kernel.endswith("_backward"))
    owner = next(operator for operator, names in OPERATORS.items() if kernel in names)
    serving: dict[tuple[Any, ...], Callable[..., None]] = {}

    def run(*arguments: Any) -> None:
        if of_head:
            step = arguments[0]
            x = step.features[0]
            operator = owner if len(step.pairs) == 2 else f"{owner}_pairs"
            size = verdict.size_class(x.numel() * len(step.weights[0]), True)
        else:
            x, operator = arguments[place], owner
            size = verdict.size_class(x.numel(), False)
        key = (operator, x.dtype, size)
        found = serving.get(key)
        if found is None:
            case = Case(operator, verdict.name_of(x.dtype), size)
            found = serving[key] = _serving(kernel, _order(kernel, case, device, results or ()), device.type)
            if device.type != "cpu" and case not in mine:
                _warn(device)
        return found(*arguments)

    return run


def _order(kernel: str, case: Case, device: torch.device, results: Sequence[Result]) -> list[str]:
    """The backends that serve a case by default, best first."""
    using = [operator for operator, names in OPERATORS.items() if kernel in names]
    operators = [case.operator] if kernel.startswith("head_") else using
    mine = [result for result in results if result.case.operator in operators and result.case[1:] == case[1:]]
    if not mine:
        return _candidates(None, device.type)
    return [*verdict.fastest(mine, case), "reference"]


@functools.cache
def _warn(device: torch.device) -> None:
    warnings.warn(
        f"iprm_kernels: plain torch serves {torch.cuda.get_device_name(device)}, whose kernels are not verified for this call; "
        "to verify and time them, once: python -m iprm_kernels verify",
        stacklevel=2,
    )


def _serving(kernel: str, candidates: Sequence[str], device_type: str) -> Callable[..., None]:
    """The kernel of the first candidate that serves the device, or a function that selects one by the arguments."""
    obstacles = {name: load(name).obstacle(kernel, device_type) for name in candidates}
    found = [(name, load(name).kernels[kernel]) for name, obstacle in obstacles.items() if not obstacle]
    if found and found[0][1].refuses is None:
        return found[0][1].run

    def choose(*arguments: Any) -> None:
        refusals = dict(obstacles)
        for name, (run, refuses, _) in found:
            refusals[name] = refuses(*arguments) if refuses else ""
            if not refusals[name]:
                return run(*arguments)
        operator = next((operator for operator, names in OPERATORS.items() if kernel in names), kernel)
        why = "; ".join(f"backend {name!r} cannot serve a tensor on {device_type!r}: {refusals[name]}" for name in candidates)
        raise BackendUnavailableError(f"{operator}: {why}")

    return choose


def kernels(device: torch.device) -> Kernels:
    """The kernels that serve tensors on `device` now.

    A kernel raises BackendUnavailableError if the requested backend cannot run it; no other backend silently takes its place.

    Raises:
        ValueError: IPRM_KERNELS_BACKEND asks for an unknown backend.
    """
    return cast(Kernels, _select(requested(), device))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager: one backend runs all operators called inside, on every thread of the process. Use it around a compiled
    function, not inside one: torch.compile cannot trace it.

    An operator that the backend lacks, or does not support for a shape or device, raises BackendUnavailableError when it is
    called; no other backend takes its place. `backends` lists missing operators and limits.

    Args:
        name: "reference", "cpp", "triton" or "cuda". The environment variable IPRM_KERNELS_BACKEND does the same for a whole
            run.

    Raises:
        ValueError: `name` is unknown.
        BackendUnavailableError: the backend cannot run here; the message says why.
    """
    loaded = load(_known(name))
    if not loaded.kernels:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {loaded.reason}")
    entry = [name]
    _requested.append(entry)
    try:
        yield
    finally:
        _requested[:] = [other for other in _requested if other is not entry]


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The inference operators in plain torch, so that an exported program needs only torch.

    >>> program = torch.export.export(model, inputs).run_decompositions(ik.decompositions())

    Returns:
        A dict from operator overload to function, for normalize, geodesic_mixup, batch_kl and strength_weights.
    """
    module = importlib.import_module(".reference.decompositions", __package__)
    names = ("normalize", "geodesic_mixup", "batch_kl", "strength_weights")
    return {getattr(torch.ops.iprm, name).default: getattr(module, name) for name in names}


def backends() -> dict[str, BackendStatus]:
    """Reports what can run here, and why the rest cannot: one status per backend, by name, with one status per operator.

    >>> ik.backends()["cpp"].operators["batch_kl"].default_for
    ('cpu',)
    """
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0))
    kept = {device: verdict.read(device) or [] for device in devices}
    return {name: _status(name, kept) for name in NAMES}


def _status(name: str, kept: Mapping[torch.device, Sequence[Result]]) -> BackendStatus:
    loaded = load(name)
    operators = {}
    for operator, names in OPERATORS.items():
        missing = [kernel for kernel in names if kernel not in loaded.kernels]
        if missing:
            reason = f"it has no kernel {' and '.join(missing)}" if loaded.kernels else loaded.reason
            operators[operator] = OperatorStatus(False, (), "", reason)
            continue
        limits = dict.fromkeys(loaded.kernels[kernel].limits for kernel in names)
        default_for, verified = [], {}
        for device, results in kept.items():
            mine = [result for result in results if result.case.operator == operator]
            if name in _firsts(operator, device, mine):
                default_for.append(device.type)
            own = [result for result in mine if result.backend == name]
            if device.type in loaded.devices and (own or device.type != "cpu"):  # cpp is a default without a verdict
                verified[device.type] = verdict.summary(own)
        operators[operator] = OperatorStatus(True, tuple(default_for), ", ".join(filter(None, limits)), "", verified)
    served = dict.fromkeys(device for status in operators.values() for device in status.default_for)
    return BackendStatus(name, bool(loaded.kernels), loaded.devices, tuple(served), loaded.reason, operators)


def _firsts(operator: str, device: torch.device, results: Sequence[Result]) -> set[str]:
    """The backends that serve an operator by default on a device: in at least one of the verified cases, if there are any."""
    names = OPERATORS[operator]
    orders = [[*verdict.fastest(results, result.case), "reference"] for result in results] or [_candidates(None, device.type)]
    serving = ([n for n in order if not any(load(n).obstacle(k, device.type) for k in names)] for order in orders)
    return {order[0] for order in serving if order}
