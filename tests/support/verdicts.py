"""Verdicts of tests: a cache folder of their own, and kernels that list their calls."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import planted
import pytest
import torch

from iprm_kernels import verdict
from iprm_kernels.convention import Kernel
from iprm_kernels.loading import Loaded
from iprm_kernels.verdict import Case, Result

choice = importlib.import_module("iprm_kernels.backends")
CPU = torch.device("cpu")


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fixture: an empty cache folder, and no verdict in memory."""
    monkeypatch.setenv("IPRM_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdict, "_made", {})
    monkeypatch.setattr(choice, "_from_environment", None)
    choice.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    choice.forget()


def calls_of(monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> list[str]:
    """Installs right kernels for a device in the place of "triton", which list their calls."""
    calls: list[str] = []
    load = choice.load

    def counted(kernel: str) -> Kernel:
        def run(*arguments: object) -> None:
            calls.append(kernel)
            planted.whole[kernel](*arguments)

        return Kernel(run)

    loaded = Loaded({kernel: counted(kernel) for kernel in planted.whole}, (device,), "")
    monkeypatch.setattr(choice, "load", lambda name: loaded if name == "triton" else load(name))
    choice.forget()
    return calls


def kept(*results: Result) -> None:
    verdict.keep(CPU, results)
    choice.forget()


def passed(operator: str, size: str, ratio: float, backend: str = "triton") -> Result:
    return Result(backend, Case(operator, "float32", size), "", ratio)
