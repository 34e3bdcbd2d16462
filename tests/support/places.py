"""The places operator tests run at: a backend, and the device its tensors live on.

A plain process tests `reference` and `cpp` on the CPU and, where there is a GPU, `triton` and `cuda` on it. A process with
TRITON_INTERPRET=1 tests the Triton kernels on CPU tensors and nothing else; its shapes are smaller, because the interpreter
takes tens of milliseconds a program. `make test` runs both.
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


#: Where kernels are compared with the reference.
FUSED = [_place("triton", "cpu")] if INTERPRETED else [_place("cpp", "cpu"), _place("triton", "cuda"), _place("cuda", "cuda")]
PLACES = FUSED if INTERPRETED else [_place("reference", "cpu"), *FUSED]
