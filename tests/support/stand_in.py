"""Triton's real binder, compiler and launcher on a stand-in libcuda that launches nothing, for machines without a GPU.

`install` puts the stand-in in place for the whole process, so only a process of its own may call it. Kernels then write
nothing: their outputs hold whatever was in memory.
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
from pathlib import Path
from typing import NamedTuple

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

SOURCE = Path(__file__).with_name("stand_in_libcuda.c")


class _Record(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_char_p), ("programs", ctypes.c_uint), ("threads", ctypes.c_uint))


class Launched(NamedTuple):
    """A launch as the driver received it."""

    kernel: str
    programs: int
    threads: int


class StandIn:
    """What the stand-in has recorded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._count = ctypes.c_uint.in_dll(library, "stand_in_count")
        self._records = (_Record * (1 << 16)).in_dll(library, "stand_in_launches")

    def clear(self) -> None:
        self._count.value = 0

    @property
    def launches(self) -> list[Launched]:
        """Since the last `clear`."""
        records = self._records[: self._count.value]
        return [Launched(record.kernel.decode(), record.programs, record.threads) for record in records]


class _Driver(nvidia.CudaDriver):
    """Triton's driver for one GPU of compute capability 9.0, with its own launcher."""

    def __init__(self) -> None:  # torch, whose functions the base class takes, has no CUDA here
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = lambda device=0: 0
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def install(folder: Path) -> StandIn:
    """Compiles the stand-in into `folder`, and makes it the driver of Triton and the triton backend a server of CPU tensors."""
    built = folder / "libcuda.so.1"
    include = Path(nvidia.dirname) / "include"
    flags = ["-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, str(SOURCE), "-o", str(built)], check=True)
    library = ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)  # which Triton then finds by its soname
    nvidia.libcuda_dirs = lambda: [str(folder)]
    driver.set_active(_Driver())
    serve("cpu")
    return StandIn(library)


def serve(*devices: str) -> None:
    """Makes the triton backend serve tensors on `devices`."""
    backends, loading, kernels = (
        importlib.import_module(f"iprm_kernels.{name}") for name in ("backends", "loading", "kernels")
    )
    loaded = loading.Loaded(kernels.SERVES, devices, "a stand-in")
    loading._load_triton = lambda: loaded
    loading.load.cache_clear()
    backends.forget()
