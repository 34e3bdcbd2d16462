"""Selects the backend of a call by operator, device type and shape. No other file loads a backend."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from . import extension
from .convention import KERNELS, OPERATORS, Kernel, Kernels

if TYPE_CHECKING:
    from . import kernels as triton_kernels
    from .reference import kernels as reference_kernels

    _CHECKED: tuple[Kernels, ...] = (reference_kernels, triton_kernels)  # for mypy, which compares every signature

NAMES = ("reference", "cpp", "triton", "cuda")


class Choice(NamedTuple):
    """A row of the table below: a backend that is tried for tensors on a device when the user has requested none."""

    device: str  #: a device type, or "any"
    backend: str
    measured: str  #: the measurement that justifies this row


#: Default backends, best first: a call is served by the first one that has the kernel and accepts the shape. A kernel that has
#: never run on a GPU is no default: rows for "cuda", by size of the step, are added after `make gpu-check` has passed and
#: measured them on a GPU.
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


@dataclass(frozen=True)
class _Loaded:
    kernels: dict[str, Kernel]  #: empty if the backend cannot run
    devices: tuple[str, ...]
    reason: str

    def obstacle(self, kernel: str, device_type: str) -> str:
        """Why a kernel cannot serve tensors of a device type; empty if it serves at least some shapes."""
        if not self.kernels:
            return self.reason
        if "any" not in self.devices and device_type not in self.devices:
            return f"it serves {' and '.join(self.devices)} tensors"
        return "" if kernel in self.kernels else "it has no kernel for this operator"


def _load_reference() -> _Loaded:
    return _Loaded(importlib.import_module(".reference.kernels", __package__).SERVES, ("any",), "")


def _load_cpp() -> _Loaded:
    try:
        extension.load()
    except ImportError as error:
        return _Loaded({}, (), str(error))
    return _Loaded(extension.cpu_kernels(), ("cpu",), "")


def _load_triton() -> _Loaded:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return _Loaded({}, (), f"Triton cannot be imported: {error}; pip install triton (Linux)")
    if triton.knobs.runtime.interpret:
        reason = "interpreted, for tests: TRITON_INTERPRET is set"
    elif torch.cuda.is_available():
        reason = "not yet verified on a GPU"
    else:
        return _Loaded({}, (), "no GPU is visible; TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests")
    devices = ("cpu", "cuda") if triton.knobs.runtime.interpret else ("cuda",)
    return _Loaded(importlib.import_module(".kernels", __package__).SERVES, devices, reason)


def _load_cuda() -> _Loaded:
    built = extension.build_info()
    if built["extension"] != "cuda":
        found = "holds no CUDA kernels" if built["extension"] == "cpu" else f"cannot be loaded ({built['reason']})"
        return _Loaded({}, (), f"the C++ extension {found}: reinstall with IPRM_KERNELS_BUILD=cuda, nvcc and a CUDA torch")
    if not torch.cuda.is_available() or torch.version.hip:
        return _Loaded({}, (), "no NVIDIA GPU is visible")
    return _Loaded(extension.cuda_kernels(), ("cuda",), "serves only the head step; not yet verified on a GPU")


@functools.cache
def _load(name: str) -> _Loaded:
    loaders = {"reference": _load_reference, "cpp": _load_cpp, "triton": _load_triton, "cuda": _load_cuda}
    return loaders[name]()


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
def _select(name: str | None, device_type: str) -> SimpleNamespace:
    candidates = _candidates(name, device_type)
    return SimpleNamespace(**{kernel: _serving(kernel, candidates, device_type) for kernel in KERNELS})


def _serving(kernel: str, candidates: Sequence[str], device_type: str) -> Callable[..., None]:
    """The kernel of the first candidate that serves the device, or a function that selects one by the arguments."""
    obstacles = {name: _load(name).obstacle(kernel, device_type) for name in candidates}
    found = [(name, _load(name).kernels[kernel]) for name, obstacle in obstacles.items() if not obstacle]
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
    return cast(Kernels, _select(requested(), device.type))


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
    loaded = _load(_known(name))
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
    return {name: _status(name) for name in NAMES}


def _status(name: str) -> BackendStatus:
    loaded = _load(name)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    operators = {}
    for operator, names in OPERATORS.items():
        missing = [kernel for kernel in names if kernel not in loaded.kernels]
        if missing:
            reason = f"it has no kernel {' and '.join(missing)}" if loaded.kernels else loaded.reason
            operators[operator] = OperatorStatus(False, (), "", reason)
        else:
            limits = dict.fromkeys(loaded.kernels[kernel].limits for kernel in names)
            default_for = tuple(device for device in devices if _first(names, device) == name)
            operators[operator] = OperatorStatus(True, default_for, ", ".join(filter(None, limits)), "")
    default_for = tuple(device for device in devices if any(device in status.default_for for status in operators.values()))
    return BackendStatus(name, bool(loaded.kernels), loaded.devices, default_for, loaded.reason, operators)


def _first(names: Sequence[str], device_type: str) -> str | None:
    """The first backend in the table that serves all `names` on a device."""
    candidates = _candidates(None, device_type)
    return next((name for name in candidates if not any(_load(name).obstacle(kernel, device_type) for kernel in names)), None)
