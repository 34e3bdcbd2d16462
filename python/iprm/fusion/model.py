"""Encoders and a fusion module as one classifier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from iprm.encoders.description import Input, each
from iprm.encoders.named_modules import NamedModules

from .module import FusionModule
from .output import FusionOutput


class FusionModel(nn.Module):
    """Encoders, then a fusion module: modality -> (B, ...), target (B,) -> `FusionOutput`.

    Parameters: ``encoders.<modality>.*`` (see `iprm.encoders.named_modules.module_name`) and ``fusion.*``.

    Args:
        encoders: modality -> module (B, ...) -> (B, D). Encoders of modalities that `fusion` does not read are dropped.
        fusion: the fusion module.
        memory_format: memory format that images (B, C, H, W) are converted to before they are encoded.
    """

    encoders: NamedModules
    fusion: FusionModule

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | nn.ModuleDict,
        fusion: FusionModule,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.encoders = NamedModules({name: encoders[name] for name in fusion.modalities})
        self.fusion, self.memory_format = fusion, memory_format

    def encode(self, inputs: Mapping[str, Input]) -> dict[str, Tensor]:
        """modality -> (B, ...), or a dict of such tensors, to modality -> (B, D)."""
        return {name: self.encoders[name](each(self._placed, inputs[name])) for name in self.fusion.modalities}

    def forward(self, inputs: Mapping[str, Input], target: Tensor | None = None) -> FusionOutput:
        return self.fusion(self.encode(inputs), target)

    def with_features(
        self, inputs: Mapping[str, Input], target: Tensor | None = None
    ) -> tuple[dict[str, Tensor], FusionOutput]:
        """Returns the features of every modality as well: (features, output)."""
        features = self.encode(inputs)
        return features, self.fusion(features, target)

    def _placed(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.memory_format) if x.dim() == 4 else x
