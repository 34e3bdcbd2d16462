"""The return value of every fusion module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FusionOutput(NamedTuple):
    """Result of a fusion module's ``forward``; B samples, C classes, P pairs of modalities.

    A head is a modality, "mix" where the method mixes, or "fused" where it has one more head for all modalities.
    """

    loss: Tensor | None  #: () the training objective; None without a target
    logits: Tensor  #: (B, C) the prediction
    logits_by: dict[str, Tensor]  #: head -> (B, C)
    strength: Tensor | None = None  #: (2,) ω of the pair's modalities, (P, 2) for several pairs; None if not measured
    weight: Tensor | None = None  #: () λ of the pair's first modality, (P,) for several pairs, as used by this call
    losses_by: dict[str, Tensor] = {}  #: head -> () its loss, for logs and rules; empty without a target  # noqa: RUF012
    #: name -> (), detached: further quantities to log, equal on all processes; their mean over an epoch is logged
    measures: dict[str, Tensor] = {}  # noqa: RUF012
