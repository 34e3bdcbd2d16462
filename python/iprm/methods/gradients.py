"""Gradients of a model by modality, for rules that modify them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from iprm.fusion.model import FusionModel


class Gradients:
    """The gradients of one update: reduced over processes, unscaled, not yet clipped.

    Parameters without a gradient, such as those of a frozen encoder, are left out.
    """

    def __init__(self, model: FusionModel) -> None:
        self.model = model

    def encoder(self, modality: str) -> dict[str, Tensor]:
        """Name within the encoder -> gradient, which may be changed in place."""
        return _gradients(self.model.encoders[modality])

    def fusion(self) -> dict[str, Tensor]:
        """Name within the fusion module -> gradient, which may be changed in place."""
        return _gradients(self.model.fusion)


def scale(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies gradients by a factor () on their device, in place, in one call for all of them."""
    tensors = list(gradients)
    if tensors:
        torch._foreach_mul_(tensors, factor.to(tensors[0].dtype))


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
