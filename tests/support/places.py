"""The places where operator tests run: a backend, and the device of its tensors.

A plain process tests `reference` and `cpp` on the CPU and, if there is a GPU, `triton` and (for the head step) `cuda` on it. A
process with TRITON_INTERPRET=1 tests only the Triton kernels, on CPU tensors; its shapes are smaller, because the interpreter
takes tens of milliseconds per program. `make test` runs both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Place:
    backend: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.backend}-{self.device.type}"


def _place(backend: str, device: str) -> object:
    place = Place(backend, torch.device(device))
    return pytest.param(place, id=str(place), marks=[pytest.mark.gpu] if device == "cuda" else [])


#: Places where kernels are compared with the reference.
FUSED = [_place("triton", "cpu")] if INTERPRETED else [_place("cpp", "cpu"), _place("triton", "cuda")]
PLACES = FUSED if INTERPRETED else [_place("reference", "cpu"), *FUSED]
#: Further places that have kernels only for the head step of two modalities.
HEAD = [] if INTERPRETED else [_place("cuda", "cuda")]


def of(fixture: str, module: str) -> list[object]:
    """The places at which a fixture of conftest.py runs the tests of a module."""
    head = HEAD if module.rpartition(".")[2] in ("test_head", "test_head_accuracy") else []
    return {"place": PLACES, "fused": FUSED, "gpu": [] if INTERPRETED else [_place("triton", "cuda")]}[fixture] + head
