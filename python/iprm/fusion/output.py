"""What every fusion module returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FusionOutput(NamedTuple):
    """Result of a fusion module's ``forward``; B samples, C classes, P pairs of modalities."""

    loss: Tensor | None  #: () the training objective; None without a target
    logits: Tensor  #: (B, C) the prediction
    logits_by: dict[str, Tensor]  #: (B, C) each: by modality, and "mix" where the method mixes
    strength: Tensor | None = None  #: (2,) ω of the pair's modalities, (P, 2) for several pairs; None where none is measured
    weight: Tensor | None = None  #: () λ of the pair's first modality, (P,) for several pairs: the one this call mixed with
