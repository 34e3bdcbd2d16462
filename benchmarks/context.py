"""The context of a result: machine, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import iprm_kernels as ik

ROOT = Path(__file__).parent.parent


def context() -> dict[str, Any]:
    """Processor, threads, versions, backends, commit, whether the tree is dirty; name, driver and clocks of a GPU."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "build": ik.build_info(),
        "backends": {name: str(status) for name, status in ik.backends().items()},
        **_commit(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
        found["gpu_state"] = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv")
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> dict[str, Any]:
    """From IPRM_COMMIT, the output of `git describe --always --dirty --abbrev=40`, for a machine without the repository."""
    if given := os.environ.get("IPRM_COMMIT"):
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str:
    return _run("git", "-C", str(ROOT), *arguments)


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not known ({error})"
