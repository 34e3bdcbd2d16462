"""In-place compilation of encoders and fusion module."""

from __future__ import annotations

import torch

from iprm.errors import InputError, unknown
from iprm.fusion.model import FusionModel


def compile_modules(model: FusionModel, backend: str | None) -> None:
    """Converts the encoders' weights to the model's memory format, and compiles encoders and fusion module in place, so that
    the keys of checkpoints do not change.

    Args:
        model: encoders and fusion module.
        backend: a backend of torch.compile; None compiles nothing.

    Raises:
        InputError: torch.compile has no such backend.
    """
    model.encoders.to(memory_format=model.memory_format)  # type: ignore[call-overload]
    if backend is None:
        return
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise InputError(unknown("backend of torch.compile", backend, known))
    for module in (*model.encoders.values(), model.fusion):
        module.compile(backend=backend)
