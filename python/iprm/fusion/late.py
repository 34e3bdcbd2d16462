"""Late fusion: one linear head per modality, logits summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from iprm.encoders.named_modules import NamedModules

from .module import FusionModule, sum_logits
from .output import FusionOutput


class Sum(FusionModule):
    r"""Sum fusion: ``logits = Σ_m (W_m x_m + b_m)``, trained with the cross entropy of the sum alone.

    Equivalent to `Concat` with one bias per modality instead of a shared one.
    """

    fused_loss, unimodal_losses = True, False

    def __init__(self, feature_dim: int | Mapping[str, int], num_classes: int, modalities: Sequence[str] = ("x", "y")) -> None:
        super().__init__(feature_dim, num_classes, modalities)
        self.heads = NamedModules({name: nn.Linear(width, self.num_classes) for name, width in self.widths.items()})

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        features, target = self._checked(features, target)
        logits_by = {name: self._logits(f"heads[{name!r}]", self.heads[name], x) for name, x in features.items()}
        heads = (*(("fused",) if self.fused_loss else ()), *(logits_by if self.unimodal_losses else ()))
        return self._with_losses(sum_logits(logits_by), logits_by, target, heads)


class Joint(Sum):
    r"""`Sum` with ``loss = CE(Σ_m logits_m) + Σ_m CE(logits_m)``: `iprm.ProbeRebalance`'s losses without its mixing."""

    unimodal_losses = True


class Ensemble(Sum):
    r"""Unimodal classifiers trained independently, with summed logits: ``loss = Σ_m CE(logits_m)``.

    No gradient of one modality depends on another, so each encoder and head is bit-identical to that of `Unimodal` trained
    from the same initial weights on the same batches. Model selection picks one epoch for all modalities together.
    """

    fused_loss, unimodal_losses = False, True


class Unimodal(Sum):
    """One modality alone: ``logits = W x_m + b``. ``modalities`` holds that one; features of other modalities are ignored.

    Raises:
        ValueError: `modality` is not in `modalities`.
    """

    minimum_modalities = 1

    def __init__(
        self,
        feature_dim: int | Mapping[str, int],
        num_classes: int,
        modalities: Sequence[str] = ("x", "y"),
        *,
        modality: str,
    ) -> None:
        if modality not in modalities:
            raise ValueError(f"modality: expected one of {', '.join(modalities)}, got {modality!r}")
        if isinstance(feature_dim, Mapping):
            feature_dim = {name: width for name, width in feature_dim.items() if name == modality}
        super().__init__(feature_dim, num_classes, (modality,))

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        if isinstance(features, Mapping):
            features = {name: x for name, x in features.items() if name in self.modalities}
        return super().forward(features, target)
