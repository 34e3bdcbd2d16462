"""What results depend on: versions, found without importing the packages, and the backend of the operators on each device."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import InputError, unknown

PACKAGES = ("iprm-kernels", "torch", "triton", "lightning", "torchmetrics", "jsonargparse", "numpy", "scikit-learn")
VARIABLE = "IPRM_KERNELS_BACKEND"


def versions() -> dict[str, str]:
    """Python, and each package or "not installed"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def chosen_backends() -> dict[str, str]:
    """device -> the backend that serves its tensors: what IPRM_KERNELS_BACKEND asks for, or else the default."""
    import torch

    import iprm_kernels as ik

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    statuses = ik.backends()
    asked = os.environ.get(VARIABLE)
    if not asked:
        return {device: next(s.name for s in statuses.values() if device in s.default_for) for device in devices}
    served = set(statuses[asked].devices) if asked in statuses else set()
    absent = f"none: {VARIABLE} asks for {asked}, which does not serve"
    return {device: f"{asked} ({VARIABLE})" if served & {device, "any"} else f"{absent} {device}" for device in devices}


def check_variables() -> None:
    """Raises InputError if IPRM_KERNELS_BACKEND or IPRM_KERNELS_ISA asks for what does not exist."""
    import iprm_kernels as ik

    asked = os.environ.get(VARIABLE)
    if asked and asked not in ik.backends():
        raise InputError(f"{VARIABLE}: {unknown('backend', asked, ik.backends())}")
    build_info()


def build_info() -> dict[str, Any]:
    """`iprm_kernels.build_info`.

    Raises:
        InputError: IPRM_KERNELS_ISA names an instruction set that does not exist here.
    """
    import iprm_kernels as ik

    try:
        return ik.build_info()
    except RuntimeError as error:  # of IPRM_KERNELS_ISA, which names itself
        raise InputError(str(error)) from error
