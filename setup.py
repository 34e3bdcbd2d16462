"""Builds the C++ extension; everything else about the package is in pyproject.toml.

IPRM_KERNELS_BUILD decides what is built, never whether the build machine happens to have a GPU:

    cpu     the CPU kernels; a failure is an error
    cuda    the CPU and CUDA kernels; a failure is an error
    none    no extension: a pure Python package
    unset   cuda where there are CUDA sources, nvcc and a CUDA build of torch, else cpu, else (no compiler) none with a warning

IPRM_KERNELS_SANITIZE=1 compiles the C++ with AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize` alone: slow,
and loaded only by a process that has preloaded the libraries of both. build_info()["flags"] says so.

CUDA architectures are those of TORCH_CUDA_ARCH_LIST, and the toolkit is CUDA_HOME, else that of the nvcc on PATH. The extension
keeps to LibTorch's stable ABI from torch 2.10 on, so that the torch it is compiled against need not be the torch it runs with.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
GENERATED = ROOT / "build" / "generated"
TORCH_FLOOR = "2.10"
TORCH_TARGET_VERSION = "0x020a000000000000"
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}  # other commands only describe
STABLE_LIBRARIES = ("torch_cpu", "torch_cuda", "cudart")
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
# -g0: Python's own flags carry -g. gcc 12 takes 22 s over geodesic.cpp with it and 15 without; the extension 8.9 MB and 1.5
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
# In the place of -O3 and -g0. Python's own flags carry -fwrapv, under which no signed overflow is one. vptr asks for the type
# information of libtorch's classes. The assertions are libstdc++'s, of a vector's index and the like. gcc 12 says of its own
# AVX-512 intrinsics that they read what is not initialised.
SANITIZERS = "-fsanitize=address,undefined"
SANITIZE_FLAGS = [
    SANITIZERS,
    "-fno-sanitize=vptr",
    "-fno-wrapv",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-D_GLIBCXX_ASSERTIONS",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-O1",
    "-g",
]

# -U: torch's own flags take the conversions of 16-bit types away
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-DUSE_CUDA",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]


def wanted() -> str:
    choice = os.environ.get("IPRM_KERNELS_BUILD", "")
    if choice not in ("", "cpu", "cuda", "none"):
        raise SystemExit(f"IPRM_KERNELS_BUILD: expected cpu, cuda or none, got {choice!r}")
    return choice


def sanitized() -> bool:
    choice = os.environ.get("IPRM_KERNELS_SANITIZE", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"IPRM_KERNELS_SANITIZE: expected 0 or 1, got {choice!r}")
    return choice == "1"


def cxx_flags() -> list[str]:
    if not sanitized():
        return CXX_FLAGS
    return [flag for flag in CXX_FLAGS if flag not in ("-O3", "-g0")] + SANITIZE_FLAGS


def find_torch() -> bool:
    """Whether a torch new enough can be imported, looking past the walls of an isolated build.

    pip builds in an environment without the installed packages, and would fetch a torch of several gigabytes to read its
    headers. The one already installed for this interpreter serves as well.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path += [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return [int(part) for part in version.split(".")[:2]] >= [int(part) for part in TORCH_FLOOR.split(".")]


def compiler_obstacle() -> str:
    """Why nothing can be compiled; empty if it can."""
    compiler = os.environ.get("CXX") or "c++"  # as torch chooses it
    return "" if shutil.which(compiler.split()[0]) else f"no C++ compiler was found ({compiler}: set CXX or PATH)"


def cuda_sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def toolkit() -> str | None:
    """The CUDA toolkit, None where torch is to find it.

    torch takes the folder above the nvcc on PATH. Where that nvcc is a script that runs the nvcc of a toolkit elsewhere, this
    folder has no libcudart. nvcc itself prints its toolkit as TOP.
    """
    if given := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return given
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    printed = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", printed, re.MULTILINE)
    return os.path.realpath(found[1].strip()) if found else None


def cuda_obstacle() -> str:
    """All that stands in the way of the CUDA kernels; empty if nothing does."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    home = CUDA_HOME or os.environ.get("CUDA_HOME")  # torch's is None in its builds without CUDA
    obstacles = {
        "csrc/cuda holds no sources in this release": not cuda_sources(),
        "no nvcc was found (set CUDA_HOME or PATH)": not shutil.which("nvcc", path=home and os.path.join(home, "bin")),
        f"torch {torch.__version__} is built without CUDA": torch.version.cuda is None,
    }
    return "; ".join(obstacle for obstacle, is_there in obstacles.items() if is_there)


def write_settings(kind: str) -> None:
    import torch

    settings = {
        "IPRM_EXTENSION": kind,
        "IPRM_FLAGS": " ".join(cxx_flags()),
        "IPRM_CUDA_VERSION": (torch.version.cuda or "") if kind == "cuda" else "",
        "IPRM_CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if kind == "cuda" else "",
        "IPRM_TORCH_FLOOR": TORCH_FLOOR,
    }
    # a header, since quotes in macro definitions do not survive every shell between here and the compiler
    GENERATED.mkdir(parents=True, exist_ok=True)
    lines = [f'#define {name} "{value}"' for name, value in settings.items()]
    header, text = GENERATED / "build_settings.h", "\n".join(["#pragma once", *lines, ""])
    if not header.is_file() or header.read_text() != text:  # or ninja compiles again what includes it
        header.write_text(text)


def extension(kind: str):
    import pybind11
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    if kind == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    write_settings(kind)
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    make = CUDAExtension if kind == "cuda" else CppExtension
    built = make(
        name="iprm_kernels._C",
        sources=["csrc/extension.cpp", *sources, *(cuda_sources() if kind == "cuda" else [])],
        include_dirs=[pybind11.get_include(), str(GENERATED)],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": cxx_flags(), "nvcc": NVCC_FLAGS},
        extra_link_args=[SANITIZERS] if sanitized() else [],
    )
    # without c10 and torch_python, which hold nothing of the stable ABI
    built.libraries = [library for library in built.libraries if library in STABLE_LIBRARIES]
    return built


def extensions() -> dict:
    """The arguments of `setup` that build the extension."""
    choice = wanted()
    if choice == "none":
        if "editable_wheel" in sys.argv:  # an extension left there by an earlier build would still be imported
            for left in (ROOT / "iprm_kernels").glob("_C*.so"):
                left.unlink()
        return {}
    found = find_torch()
    if COMPILING.isdisjoint(sys.argv):
        # told to whoever builds: pip installs it into the build environment and comes back
        return {} if found else {"setup_requires": [f"torch>={TORCH_FLOOR}"]}
    if not found:
        raise SystemExit(f"the C++ kernels need torch >= {TORCH_FLOOR} to build: install it, or set IPRM_KERNELS_BUILD=none")
    if choice != "cpu" and (home := toolkit()):
        os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension is imported, which reads it then
    kind = choice or ("cpu" if cuda_obstacle() else "cuda")
    if kind == "cuda" and (obstacle := cuda_obstacle()):
        raise SystemExit(f"IPRM_KERNELS_BUILD=cuda: {obstacle}")
    if obstacle := compiler_obstacle():
        if choice:
            raise SystemExit(f"IPRM_KERNELS_BUILD={choice}: {obstacle}")
        warnings.warn(f"{obstacle}: iprm-kernels is installed without its C++ kernels", stacklevel=1)
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [extension(kind)], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)}}


setup(**extensions())
