"""Loads the backends. No other file does."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import extension
from .convention import Kernel, Kernels

if TYPE_CHECKING:
    from . import kernels as triton_kernels
    from .reference import kernels as reference_kernels

    _CHECKED: tuple[Kernels, ...] = (reference_kernels, triton_kernels)  # for mypy, which compares every signature

NAMES = ("reference", "cpp", "triton", "cuda")


@dataclass(frozen=True)
class Loaded:
    """The kernels of a backend."""

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


def _load_reference() -> Loaded:
    return Loaded(importlib.import_module(".reference.kernels", __package__).SERVES, ("any",), "")


def _load_cpp() -> Loaded:
    try:
        extension.load()
    except ImportError as error:
        return Loaded({}, (), str(error))
    return Loaded(extension.cpu_kernels(), ("cpu",), "")


def _load_triton() -> Loaded:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return Loaded({}, (), f"Triton cannot be imported: {error}; pip install triton (Linux)")
    interpreted = triton.knobs.runtime.interpret
    if not interpreted and not torch.cuda.is_available():
        return Loaded({}, (), "no GPU is visible; TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests")
    reason, devices = ("interpreted, for tests: TRITON_INTERPRET is set", ("cpu", "cuda")) if interpreted else ("", ("cuda",))
    return Loaded(importlib.import_module(".kernels", __package__).SERVES, devices, reason)


def _load_cuda() -> Loaded:
    built = extension.build_info()
    if built["extension"] != "cuda":
        found = "holds no CUDA kernels" if built["extension"] == "cpu" else f"cannot be loaded ({built['reason']})"
        return Loaded({}, (), f"the C++ extension {found}: reinstall with IPRM_KERNELS_BUILD=cuda, nvcc and a CUDA torch")
    if not torch.cuda.is_available() or torch.version.hip:
        return Loaded({}, (), "no NVIDIA GPU is visible")
    return Loaded(extension.cuda_kernels(), ("cuda",), "serves only the head step")


@functools.cache
def load(name: str) -> Loaded:
    """The kernels of a backend, by name, which are empty if it cannot run here."""
    loaders = {"reference": _load_reference, "cpp": _load_cpp, "triton": _load_triton, "cuda": _load_cuda}
    return loaders[name]()
