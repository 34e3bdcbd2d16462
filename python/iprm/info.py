"""The command `iprm info`: versions, and which implementation of each operator runs here."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

import iprm_kernels as ik

from .arguments import Parser
from .versions import versions

#: The operators, and those that they are composed of.
OPERATORS = ("normalize", "geodesic_mixup", "batch_kl", "strength_weights", "probe_rebalance", "linear_probe_rebalance")


def info_command(arguments: Sequence[str]) -> int:
    """Runs `iprm info` and returns the exit code."""
    Parser(
        "iprm info", description="Versions, what was built, and which implementation of each operator runs here."
    ).parse_args(arguments)
    console = Console()
    console.print(_pairs("versions", versions()))
    console.print(_pairs("C++ extension", {name: str(value) for name, value in ik.build_info().items()}))
    console.print(_operators())
    console.print(_backends())
    return 0


def _pairs(title: str, pairs: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in pairs.items():
        table.add_row(name, value)
    return table


def chosen_backends() -> dict[str, str]:
    """device -> the backend that serves its tensors: what IPRM_KERNELS_BACKEND asks for, or else the default."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    asked = os.environ.get("IPRM_KERNELS_BACKEND")
    statuses = ik.backends().values()
    if asked:
        return dict.fromkeys(devices, f"{asked} (IPRM_KERNELS_BACKEND)")
    return {device: next(s.name for s in statuses if device in s.default_for) for device in devices}


def _operators() -> Table:
    chosen = chosen_backends()
    table = Table("operator", *(f"on {device}" for device in chosen), title="which backend serves", title_justify="left")
    for operator in OPERATORS:
        table.add_row(operator, *chosen.values())
    return table


def _backends() -> Table:
    table = Table("backend", "runs here", "serves", "default for", "remark", title="backends", title_justify="left")
    for status in ik.backends().values():
        state = "yes" if status.available else "no"
        table.add_row(status.name, state, ", ".join(status.devices), ", ".join(status.default_for), status.reason)
    return table
