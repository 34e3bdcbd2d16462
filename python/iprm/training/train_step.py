"""What a training step computes: encoders and fusion, in a memory format, and compiled where that was asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from iprm.encoders.description import Input, each
from iprm.errors import InputError, unknown
from iprm.fusion.output import FusionOutput


class TrainingStep(nn.Module):
    """What a training step computes: modality -> input, target (B,) -> features and FusionOutput."""

    def __init__(self, encoders: nn.ModuleDict, fusion: nn.Module, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.encoders, self.fusion, self.memory_format = encoders, fusion, memory_format

    def forward(self, inputs: Mapping[str, Input], target: Tensor) -> tuple[dict[str, Tensor], FusionOutput]:
        features = encode(self.encoders, inputs, self.memory_format)
        return features, self.fusion(features, target)


def encode(encoders: nn.ModuleDict, inputs: Mapping[str, Input], memory_format: torch.memory_format) -> dict[str, Tensor]:
    """Features of every modality that has an encoder: modality -> (B, ...), or a dict of these, to modality -> (B, D)."""

    def placed(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x

    return {modality: encoder(each(placed, inputs[modality])) for modality, encoder in encoders.items()}


def prepare(encoders: nn.ModuleDict, fusion: nn.Module, memory_format: torch.memory_format, backend: str | None) -> None:
    """Weights in the memory format, and modules compiled where they are, so that nothing of a checkpoint has another name.

    Raises:
        InputError: torch.compile has no such backend.
    """
    encoders.to(memory_format=memory_format)  # type: ignore[call-overload]
    if backend is None:
        return
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise InputError(unknown("backend of torch.compile", backend, known))
    for module in (*encoders.values(), fusion):
        module.compile(backend=backend)
