"""The command `iprm info`. It needs no optional dependency of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import iprm_kernels as ik
from iprm.environment import VARIABLE, backends_by_operator, build_info, versions

DESCRIPTION = "Prints versions, build options, and the implementation that serves each operator on this machine."


def info_command(arguments: Sequence[str]) -> int:
    """Runs `iprm info` and returns the exit code."""
    if arguments:  # the parser needs jsonargparse, which the extra `train` installs
        from .parser import Parser

        Parser("iprm info", description=DESCRIPTION).parse_args(arguments)
    built = {name.replace("_", " "): str(value) or "-" for name, value in build_info().items()}
    _print("versions", versions())
    _print("C++ extension", built)
    for device, by_operator in backends_by_operator().items():
        _print(f"operators on {device}", by_operator)
    _print("backends", {name: str(status).removeprefix(f"{name}: ") for name, status in ik.backends().items()})
    print(f"{VARIABLE}=NAME selects one of these backends; a backend that cannot run raises an error and is never replaced.")
    return 0


def _print(title: str, rows: Mapping[str, str]) -> None:
    print(title, *(f"  {name:<30}{value}" for name, value in rows.items()), "", sep="\n")
