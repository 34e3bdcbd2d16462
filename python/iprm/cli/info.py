"""The command `iprm info`: versions, what was built, and which implementation of each operator runs here. Needs no extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import iprm_kernels as ik
from iprm.environment import VARIABLE, build_info, chosen_backends, versions

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


def info_command(arguments: Sequence[str]) -> int:
    """Runs `iprm info` and returns the exit code."""
    Parser(
        "iprm info", description="Versions, what was built, and which implementation of each operator runs here."
    ).parse_args(arguments)
    built = {name.replace("_", " "): str(value) or "-" for name, value in build_info().items()}
    _print("versions", versions())
    _print("C++ extension", built)
    for device, backend in chosen_backends().items():
        _print(f"operators on {device}", dict.fromkeys(OPERATORS, backend))
    _print("backends", {name: str(status).removeprefix(f"{name}: ") for name, status in ik.backends().items()})
    print(f"{VARIABLE}=NAME asks for one of these; it is never silently replaced.")
    return 0


def _print(title: str, rows: Mapping[str, str]) -> None:
    print(title, *(f"  {name:<30}{value}" for name, value in rows.items()), "", sep="\n")
