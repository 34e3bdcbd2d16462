"""What results depend on: versions, found without importing the packages, and the backend of the operators on each device."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .errors import InputError, unknown

if TYPE_CHECKING:
    import torch

    from iprm_kernels import BackendStatus

PACKAGES = ("iprm-kernels", "torch", "triton", "lightning", "torchmetrics", "jsonargparse", "numpy", "scikit-learn")
VARIABLE = "IPRM_KERNELS_BACKEND"


def versions() -> dict[str, str]:
    """The version of Python and of each of `PACKAGES`, or "not installed"."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """Type and model of a device, such as "cuda: NVIDIA H200" or "cpu: x86_64"."""
    if device.type == "cuda":
        import torch

        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.processor() or platform.machine()}"


def chosen_backends() -> dict[str, str]:
    """device -> the backend that serves most operators there, and by name the operators that another one serves."""
    chosen = {}
    for device, by_operator in backends_by_operator().items():
        most, *_ = Counter(by_operator.values()).most_common(1)[0]
        others = [f"{operator}: {backend}" for operator, backend in by_operator.items() if backend != most]
        chosen[device] = f"{most} ({'; '.join(others)})" if others else most
    return chosen


def backends_by_operator() -> dict[str, dict[str, str]]:
    """device -> operator -> the backend that serves it: what IPRM_KERNELS_BACKEND asks for, or else the default."""
    import torch

    import iprm_kernels as ik

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    statuses = ik.backends()
    operators = next(iter(statuses.values())).operators
    asked = os.environ.get(VARIABLE)
    if asked:
        return {device: {name: _asked(asked, statuses, device, name) for name in operators} for device in devices}
    return {device: {name: _default(statuses, device, name) for name in operators} for device in devices}


def _asked(asked: str, statuses: Mapping[str, BackendStatus], device: str, operator: str) -> str:
    """The backend asked for, or the reason why it does not serve this operator; no other backend replaces it."""
    status = statuses.get(asked)
    if status is None or not {device, "any"} & set(status.devices):
        return f"none: {VARIABLE} asks for {asked}, which does not serve {device}"
    of_operator = status.operators[operator]
    if not of_operator.available:
        return f"none: {VARIABLE} asks for {asked}: {of_operator.reason}"
    limits = f", {of_operator.limits}" if of_operator.limits else ""
    return f"{asked} ({VARIABLE}{limits})"


def _default(statuses: Mapping[str, BackendStatus], device: str, operator: str) -> str:
    """The backends that serve by default, with their limits, beyond which another one serves, and what `verify` found."""
    at = {status.name: status.operators[operator] for status in statuses.values()}
    serving = {name: status for name, status in at.items() if device in status.default_for}
    remarks = ["by type and size"] if len(serving) > 1 else []
    remarks += [f"{status.limits}; another backend beyond that" for status in serving.values() if status.limits]
    remarks += [f"{name} {status.verified[device]}" for name, status in at.items() if device in status.verified]
    return " or ".join(serving) + (f" ({'; '.join(remarks)})" if remarks else "")


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
