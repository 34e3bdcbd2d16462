"""The command `iprm info`: versions, what was built, and which implementation of each operator runs here. Needs no extra."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import iprm_kernels as ik
from iprm.environment import versions
from iprm.errors import InputError, unknown

from .parser import Parser

VARIABLE = "IPRM_KERNELS_BACKEND"


def info_command(arguments: Sequence[str]) -> int:
    """Runs `iprm info` and returns the exit code."""
    Parser(
        "iprm info", description="Versions, what was built, and which implementation of each operator runs here."
    ).parse_args(arguments)
    built = {name.replace("_", " "): str(value) or "-" for name, value in _build_info().items()}
    _print("versions", versions())
    _print("C++ extension", built)
    for device, by_operator in backends_by_operator().items():
        _print(f"operators on {device}", by_operator)
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
    """device -> the backend that serves most operators there, and by name the operators that another one serves."""
    chosen = {}
    for device, by_operator in backends_by_operator().items():
        most, *_ = Counter(by_operator.values()).most_common(1)[0]
        others = [f"{operator}: {backend}" for operator, backend in by_operator.items() if backend != most]
        chosen[device] = f"{most} ({'; '.join(others)})" if others else most
    return chosen


def backends_by_operator() -> dict[str, dict[str, str]]:
    """device -> operator -> the backend that serves it: what IPRM_KERNELS_BACKEND asks for, or else the default."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    statuses = ik.backends()
    operators = next(iter(statuses.values())).operators
    asked = os.environ.get(VARIABLE)
    if asked:
        return {device: {name: _asked(asked, statuses, device, name) for name in operators} for device in devices}
    return {device: {name: _default(statuses, device, name) for name in operators} for device in devices}


def _asked(asked: str, statuses: Mapping[str, ik.BackendStatus], device: str, operator: str) -> str:
    """Of an operator that the backend asked for does not serve, the reason: nothing else serves it either."""
    status = statuses.get(asked)
    if status is None or not {device, "any"} & set(status.devices):
        return f"none: {VARIABLE} asks for {asked}, which does not serve {device}"
    of_operator = status.operators[operator]
    if not of_operator.available:
        return f"none: {VARIABLE} asks for {asked}: {of_operator.reason}"
    limits = f", {of_operator.limits}" if of_operator.limits else ""
    return f"{asked} ({VARIABLE}{limits})"


def _default(statuses: Mapping[str, ik.BackendStatus], device: str, operator: str) -> str:
    """The first choice; beyond its limits the next backend of the table serves."""
    status = next(status for status in statuses.values() if device in status.operators[operator].default_for)
    limits = status.operators[operator].limits
    return f"{status.name} ({limits}; another backend beyond that)" if limits else status.name
