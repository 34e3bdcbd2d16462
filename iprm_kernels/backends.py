"""Which implementation serves a call: the one place that imports a backend.

A backend is a namespace of kernels that all share one calling convention, inputs first, then the outputs to fill, which
the operator has allocated (None for a gradient that nobody asked for)::

    normalize(x, eps, out, norm)
    normalize_backward(grad, x, norm, eps, grad_x)
    geodesic_mixup(x, y, weight, eps, z, stats)
    geodesic_mixup_backward(grad, x, y, weight, stats, eps, grad_x, grad_y, grad_w)
    geodesic_remix(x, y, weight, stats, eps, z)
    batch_kl(p_logits, q_logits, reduction, value, stats)
    batch_kl_backward(grad, p_logits, q_logits, stats, reduction, grad_p, grad_q)
    batch_kl_pair(p_logits, other_logits, q_logits, kl)
    strength_weights(kl, strength)
    strength_weights_backward(grad, kl, grad_kl)
    average_strength(strength, alpha, released, weight, eval_weight, last, steps)
    head_forward(x, y, weight_mix, weight_x, weight_y, bias_mix, bias_x, bias_y, target, probing, label_smoothing, ignore_index,
                 parts, state, logits_mix, logits_x, logits_y, kl, strength, loss, losses)
    head_backward(grad_loss, grad_losses, grad_logits_mix, grad_logits_x, grad_logits_y, x, y, weight_mix, weight_x, weight_y,
                  bias_mix, target, state, logits_x, logits_y, strength, label_smoothing, ignore_index,
                  grad_x, grad_y, grad_weight_mix, grad_weight_x, grad_weight_y, grad_bias_mix, grad_bias_x, grad_bias_y)
    head_pairs_forward(features, weights, biases, pairs, target, probing, label_smoothing, ignore_index,
                       parts, state, logits, kl, strength, loss, losses)
    head_pairs_backward(grad_loss, grad_losses, grad_logits, features, weights, biases, pairs, target, state, unimodal,
                        strength, label_smoothing, ignore_index, grad_features, grad_weights, grad_biases)

average_strength reads its last four and writes them anew, contiguous ones of any shape. Features and logits are 2-D with any
strides, outputs contiguous; weight is (B,), of stride 0 where one value serves all rows; the gradient of batch_kl is () or
(B,), as its value was. stats and state of one backend serve the backward of another.

A head step of pairs has M features and P pairs of them, the latter in one list; its heads, their losses, logits and gradients
come mixtures first; λ is (P,), kl and strength (2P,); of logits the backward pass sees those of the modalities, of biases those
of the mixtures. A step of one pair has the same in the same order, one by one. parts says what of the step to do: PROBE, up to
the KL sums, REBALANCE, from there on, or both; between the two, the sums may be added over processes. On the CPU a label out of
range is refused by an error before anything else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

NAMES = ("reference", "cpp", "triton", "cuda")
KERNELS = (
    "normalize",
    "normalize_backward",
    "geodesic_mixup",
    "geodesic_mixup_backward",
    "geodesic_remix",
    "batch_kl",
    "batch_kl_backward",
    "batch_kl_pair",
    "strength_weights",
    "strength_weights_backward",
    "average_strength",
    "head_forward",
    "head_backward",
    "head_pairs_forward",
    "head_pairs_backward",
)
PROBE, REBALANCE = 1, 2
REDUCTIONS = ("sum", "mean", "none")


class Choice(NamedTuple):
    """A row of the table below: a backend that is tried for tensors of a device when none was asked for."""

    device: str  #: a device type, or "any"
    backend: str
    measured: str  #: what put it there


#: Which backend serves what, best first. A kernel that no GPU has run is never what a user gets by default: rows of "cuda" come
#: here, by size of the step, when `make gpu-check` has passed on one and measured them.
TABLE = (
    Choice("cpu", "cpp", "head step forward + backward, two Zen 4 cores: 0.30 ms at (64, 512, 6) where the released code's two "
           "passes take 1.11, 23.6 at (256, 512, 1000) where they take 28.5 and the library's products with the rows in plain "
           "torch 55.7"),
    Choice("any", "reference", "right everywhere"),
)  # fmt: skip


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why."""


@dataclass(frozen=True)
class BackendStatus:
    """What `backends` reports of one backend."""

    name: str
    available: bool
    devices: tuple[str, ...]  #: device types it serves here; ("any",) for all of them
    default_for: tuple[str, ...]  #: device types it serves here when nothing else was asked for
    reason: str  #: why it cannot run, or what to know when it can

    def __str__(self) -> str:
        state = f"serves {', '.join(self.devices)}" if self.available else "unavailable"
        default = f", default for {', '.join(self.default_for)}" if self.default_for else ""
        return f"{self.name}: {state}{default}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class _Loaded:
    kernels: SimpleNamespace | None
    devices: tuple[str, ...]
    reason: str


def _with_one_pair(kernels: dict[str, Any]) -> SimpleNamespace:
    """The kernels of a backend whose step of two modalities is that of many."""
    forward, backward = kernels["head_pairs_forward"], kernels["head_pairs_backward"]

    def head_forward(*of: Any) -> None:
        forward(of[:2], of[2:5], of[5:8], (0, 1), *of[8:14], of[14:17], *of[17:])

    def head_backward(*of: Any) -> None:
        backward(*of[:2], of[2:5], of[5:7], of[7:10], of[10:11], (0, 1), *of[11:13], of[13:15], *of[15:18], of[18:20],
                 of[20:23], of[23:])  # fmt: skip

    return SimpleNamespace(**{**kernels, "head_forward": head_forward, "head_backward": head_backward})


def _load_reference() -> _Loaded:
    module = importlib.import_module(".reference.kernels", __package__)
    return _Loaded(_with_one_pair(_found(module)), ("any",), "")


def _found(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in KERNELS if hasattr(module, name)}


def _load_cpp() -> _Loaded:
    try:
        importlib.import_module("._C", __package__)
    except ImportError as error:
        reason = (
            f"the C++ extension is not there: {error}; reinstall iprm-kernels where a C++20 compiler is on the PATH, "
            "with IPRM_KERNELS_BUILD=cpu to make a failed build an error"
        )
        return _Loaded(None, (), reason)
    ops = {name: getattr(torch.ops.iprm_cpp, name).default for name in KERNELS}
    by_place, backward_by_place = ops["batch_kl"], ops["batch_kl_backward"]  # they take no string, see divergence.cpp

    def batch_kl(p_logits: Any, q_logits: Any, reduction: str, *outputs: Any) -> None:
        by_place(p_logits, q_logits, REDUCTIONS.index(reduction), *outputs)

    def batch_kl_backward(grad: Any, p_logits: Any, q_logits: Any, stats: Any, reduction: str, *outputs: Any) -> None:
        backward_by_place(grad, p_logits, q_logits, stats, REDUCTIONS.index(reduction), *outputs)

    return _Loaded(SimpleNamespace(**{**ops, "batch_kl": batch_kl, "batch_kl_backward": batch_kl_backward}), ("cpu",), "")


def _load_triton() -> _Loaded:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return _Loaded(None, (), f"Triton is not there: {error}; pip install triton (Linux)")
    if triton.knobs.runtime.interpret:
        reason = "interpreted, for tests: TRITON_INTERPRET is set"
    elif torch.cuda.is_available():
        reason = "not yet verified on a GPU"
    else:
        return _Loaded(None, (), "no GPU is visible; TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests")
    devices = ("cpu", "cuda") if triton.knobs.runtime.interpret else ("cuda",)
    module = importlib.import_module(".kernels", __package__)
    composed = _load_reference().kernels
    assert composed is not None

    def head_pairs_forward(*arguments: Any) -> None:
        (module if module.serves(*arguments[:2]) else composed).head_pairs_forward(*arguments)

    def head_pairs_backward(*arguments: Any) -> None:
        (module if module.serves(*arguments[3:5]) else composed).head_pairs_backward(*arguments)

    head = {"head_pairs_forward": head_pairs_forward, "head_pairs_backward": head_pairs_backward}
    return _Loaded(_with_one_pair({**_found(module), **head}), devices, reason)


def _load_cuda() -> _Loaded:
    """The head step of two modalities in CUDA C++; what else there is by Triton's kernels, or else the reference."""
    built = build_info()
    if built["extension"] != "cuda":
        found = "holds no CUDA kernels" if built["extension"] == "cpu" else f"is not there ({built['reason']})"
        return _Loaded(None, (), f"the C++ extension {found}: reinstall with IPRM_KERNELS_BUILD=cuda, nvcc and a CUDA torch")
    if not torch.cuda.is_available() or torch.version.hip:
        return _Loaded(None, (), "no NVIDIA GPU is visible")
    others = _load("triton").kernels or _load("reference").kernels
    assert others is not None
    ops = torch.ops.iprm_cpp

    head = {name: getattr(ops, name).default for name in ("head_forward", "head_backward")}
    return _Loaded(SimpleNamespace(**{**vars(others), **head}), ("cuda",), "not yet verified on a GPU")


@functools.cache
def _load(name: str) -> _Loaded:
    loaders = {"reference": _load_reference, "cpp": _load_cpp, "triton": _load_triton, "cuda": _load_cuda}
    return loaders[name]()


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


# Process-wide and no thread-local: autograd runs backward passes of GPU tensors in threads of its own. An entry is a list of
# its own, so that of two threads each takes back what it put in.
_requested: list[list[str]] = []
# Read once: a look into os.environ takes 4 µs, a tenth of a small forward pass.
_from_environment = os.environ.get("IPRM_KERNELS_BACKEND")


def requested() -> str | None:
    """The backend asked for by `use_backend` or IPRM_KERNELS_BACKEND; None leaves the choice to the device."""
    return _requested[-1][0] if _requested else _from_environment


@functools.cache
def _select(name: str | None, device_type: str) -> SimpleNamespace:
    candidates = [_known(name)] if name else [row.backend for row in TABLE if row.device in (device_type, "any")]
    for candidate in candidates:
        loaded = _load(candidate)
        if loaded.kernels is not None and (device_type in loaded.devices or "any" in loaded.devices):
            return loaded.kernels
    loaded = _load(candidate)
    why = loaded.reason if loaded.kernels is None else f"it serves {' and '.join(loaded.devices)} tensors"
    raise BackendUnavailableError(f"backend {candidate!r} cannot serve a tensor on {device_type!r}: {why}")


def kernels(device: torch.device) -> SimpleNamespace:
    """The kernels that serve tensors on `device` now.

    Raises:
        BackendUnavailableError: the backend asked for cannot; it is never silently replaced.
    """
    return _select(requested(), device.type)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the operators called inside, on every thread of the process, by one backend. Use it around a compiled function, not
    within: torch.compile cannot trace it.

    Args:
        name: "reference", "cpp", "triton" or "cuda". The variable IPRM_KERNELS_BACKEND does the same for a whole run.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: the backend cannot run here; the message says why.
    """
    loaded = _load(_known(name))
    if loaded.kernels is None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {loaded.reason}")
    entry = [name]
    _requested.append(entry)
    try:
        yield
    finally:
        _requested[:] = [other for other in _requested if other is not entry]


def backends() -> dict[str, BackendStatus]:
    """What can run here, and for what it cannot, why: a status a backend, by name."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    statuses = {}
    for name in NAMES:
        loaded = _load(name)
        default_for = tuple(
            device for device in devices if loaded.kernels is not None and _select(None, device) is loaded.kernels
        )
        statuses[name] = BackendStatus(name, loaded.kernels is not None, loaded.devices, default_for, loaded.reason)
    return statuses


def build_info() -> dict[str, Any]:
    """What the C++ extension was built with: compiler, flags, CUDA version and architectures, torch.

    Returns:
        A dict whose "extension" is "cpu" or "cuda"; without the extension, "none" and the "reason".
    """
    try:
        extension = importlib.import_module("._C", __package__)
    except ImportError:
        return {"extension": "none", "reason": _load("cpp").reason}
    return dict(extension.build_info())
