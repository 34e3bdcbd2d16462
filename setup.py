"""Builds the C++ extension; everything else about the package is in pyproject.toml.

IPRM_KERNELS_BUILD decides what is built, never whether the build machine happens to have a GPU:

    cpu     the CPU kernels; a failure is an error
    cuda    the CPU and CUDA kernels; a failure is an error
    none    no extension: a pure Python package
    unset   cuda where there are CUDA sources, nvcc and a CUDA build of torch, else cpu, else (no compiler) none with a warning

CUDA architectures are those of TORCH_CUDA_ARCH_LIST. The extension keeps to LibTorch's stable ABI from torch 2.10 on, so that
the torch it is compiled against need not be the torch it runs with.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
GENERATED = ROOT / "build" / "generated"
TORCH_FLOOR = "2.10"
TORCH_TARGET_VERSION = "0x020a000000000000"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]


def find_torch() -> bool:
    """Whether torch can be imported, looking past the walls of an isolated build.

    pip builds in an environment without the installed packages, and would fetch a torch of several gigabytes to read its
    headers. The one already installed for this interpreter serves as well.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path += [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    return importlib.util.find_spec("torch") is not None


def wanted() -> str:
    choice = os.environ.get("IPRM_KERNELS_BUILD", "")
    if choice not in ("", "cpu", "cuda", "none"):
        raise SystemExit(f"IPRM_KERNELS_BUILD: expected cpu, cuda or none, got {choice!r}")
    return choice


def cuda_sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def cuda_obstacle() -> str:
    """Why the CUDA kernels cannot be built; empty if they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not cuda_sources():
        return "csrc/cuda holds no sources in this release"
    if CUDA_HOME is None:
        return "no nvcc was found (set CUDA_HOME)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return ""


def extension(kind: str):
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    if kind == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    settings = {
        "IPRM_EXTENSION": kind,
        "IPRM_FLAGS": " ".join(CXX_FLAGS),
        "IPRM_CUDA_VERSION": (torch.version.cuda or "") if kind == "cuda" else "",
        "IPRM_CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if kind == "cuda" else "",
        "IPRM_TORCH_FLOOR": TORCH_FLOOR,
    }
    # a header, since quotes in macro definitions do not survive every shell between here and the compiler
    GENERATED.mkdir(parents=True, exist_ok=True)
    lines = [f'#define {name} "{value}"' for name, value in settings.items()]
    (GENERATED / "build_settings.h").write_text("\n".join(["#pragma once", *lines, ""]))
    make = CUDAExtension if kind == "cuda" else CppExtension
    return make(
        name="iprm_kernels._C",
        sources=["csrc/extension.cpp", *sources, *(cuda_sources() if kind == "cuda" else [])],
        include_dirs=[pybind11.get_include(), str(GENERATED)],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++20"]},
    )


def extensions() -> dict:
    """The arguments of `setup` that build the extension."""
    choice = wanted()
    if choice == "none":
        return {}
    if not find_torch():
        # told to whoever builds: pip installs it into the build environment and comes back
        return {"setup_requires": [f"torch>={TORCH_FLOOR}"]}
    from torch.utils.cpp_extension import BuildExtension

    kind = choice or ("cpu" if cuda_obstacle() else "cuda")
    if kind == "cuda" and (obstacle := cuda_obstacle()):
        raise SystemExit(f"IPRM_KERNELS_BUILD=cuda: {obstacle}")
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if not choice and shutil.which(compiler.split()[0]) is None:
        warnings.warn(f"no C++ compiler ({compiler}): iprm-kernels is installed without its C++ kernels", stacklevel=1)
        return {}
    return {"ext_modules": [extension(kind)], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)}}


setup(**extensions())
