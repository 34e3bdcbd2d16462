"""The command `iprm info`: versions, what was built, and which implementation of each operator runs here. Needs no extra."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import iprm_kernels as ik
from iprm.environment import versions
from iprm.errors import InputError, unknown

from .parser import Parser

#: The operators, and those that they are composed of.
OPERATORS = (
    "normalize",
    "geodesic_mixup",
    "batch_kl",
    "strength_weights",
    "probe_rebalance",
    "linear_probe_rebalance",
    "linear_probe_rebalance_pairs",
)
VARIABLE = "IPRM_KERNELS_BACKEND"


def info_command(arguments: Sequence[str]) -> int:
    """Runs `iprm info` and returns the exit code."""
    Parser(
        "iprm info", description="Versions, what was built, and which implementation of each operator runs here."
    ).parse_args(arguments)
    built = {name.replace("_", " "): str(value) or "-" for name, value in _build_info().items()}
    _print("versions", versions())
    _print("C++ extension", built)
    for device, backend in chosen_backends().items():
        _print(f"operators on {device}", dict.fromkeys(OPERATORS, backend))
    _print("backends", {name: str(status).removeprefix(f"{name}: ") for name, status in ik.backends().items()})
    print(f"{VARIABLE}=NAME asks for one of these; it is never silently replaced.")
    return 0


def check_variables() -> None:
    """Raises InputError if IPRM_KERNELS_BACKEND or IPRM_KERNELS_ISA asks for what does not exist."""
    asked = os.environ.get(VARIABLE)
    if asked and asked not in ik.backends():
        raise InputError(f"{VARIABLE}: {unknown('backend', asked, ik.backends())}")
    _build_info()


def _build_info() -> dict[str, Any]:
    try:
        return ik.build_info()
    except RuntimeError as error:  # of IPRM_KERNELS_ISA, which names itself
        raise InputError(str(error)) from error


def _print(title: str, rows: Mapping[str, str]) -> None:
    print(title, *(f"  {name:<30}{value}" for name, value in rows.items()), "", sep="\n")


def chosen_backends() -> dict[str, str]:
    """device -> the backend that serves its tensors: what IPRM_KERNELS_BACKEND asks for, or else the default."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    statuses = ik.backends()
    asked = os.environ.get(VARIABLE)
    if not asked:
        return {device: next(s.name for s in statuses.values() if device in s.default_for) for device in devices}
    served = set(statuses[asked].devices) if asked in statuses else set()
    absent = f"none: {VARIABLE} asks for {asked}, which does not serve"
    return {device: f"{asked} ({VARIABLE})" if served & {device, "any"} else f"{absent} {device}" for device in devices}
