"""Early fusion: features are joined, then classified by one linear head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iprm.encoders.named_modules import NamedModules
from iprm.errors import plain_number

from .heads import plain_parameters
from .module import FusionModule, sum_logits
from .output import FusionOutput


class Concat(FusionModule):
    r"""Concatenation: ``logits = W [x_1, ..., x_M] + b``.

    ``logits_by`` holds the contribution of each modality, ``W_m x_m + b/M``, where W_m are its columns of W. The logits are
    computed as the sum of these contributions. For a head f that is not plainly an `nn.Linear`, such as one with an adapter
    or a hook, the logits are its own output, and a contribution is ``f(x_m, zeros elsewhere) - (1 - 1/M) f(zeros)``, which
    is the same number if f is affine, computed in evaluation mode and without gradient.
    """

    def __init__(self, feature_dim: int | Mapping[str, int], num_classes: int, modalities: Sequence[str] = ("x", "y")) -> None:
        super().__init__(feature_dim, num_classes, modalities)
        self.head = nn.Linear(sum(self.widths.values()), self.num_classes)

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        features, target = self._checked(features, target)
        linear = plain_parameters([self.head], sum(self.widths.values()), self.num_classes)
        if linear is None:
            logits = self._logits("head", self.head, torch.cat(list(features.values()), dim=1))
            return self._with_losses(logits, self._contributions(features), target, ["fused"])
        ((weight, bias),) = linear
        columns = weight.split(list(self.widths.values()), dim=1)  # (C, D_m) each
        bias = None if bias is None else bias / len(features)
        logits_by = {name: F.linear(x, w, bias) for (name, x), w in zip(features.items(), columns, strict=True)}
        return self._with_losses(sum_logits(logits_by), logits_by, target, ["fused"])

    @torch.no_grad()
    def _contributions(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each modality contributes to the logits of any head.  (B, D_m) each -> (B, C) each"""
        zeros = {name: torch.zeros_like(x) for name, x in features.items()}
        training = [module for module in self.head.modules() if module.training]
        self.head.eval()
        try:
            nothing = self.head(torch.cat(list(zeros.values()), dim=1)) * (1 - 1 / len(features))
            alone = {name: torch.cat(list((zeros | {name: x}).values()), dim=1) for name, x in features.items()}
            return {name: self.head(x) - nothing for name, x in alone.items()}
        finally:
            for module in training:
                module.training = True


class DGL(Concat):
    r"""Decoupled gradients: each encoder learns from its own loss alone, the fused head from detached features::

        logits = W [x_1, ..., x_M] + b            with detached x_m
        loss   = CE(logits) + alpha Σ_m CE(W_m x_m + b_m)

    ``logits_by`` holds the unimodal logits and ``"fused"``, the prediction.

    Args:
        alpha: weight of the unimodal losses, above 0.

    Source: Wei, Luo, Luo, "Boosting Multimodal Learning via Disentangled Gradient Learning", ICCV 2025.
    """

    def __init__(
        self,
        feature_dim: int | Mapping[str, int],
        num_classes: int,
        modalities: Sequence[str] = ("x", "y"),
        *,
        alpha: float = 1.0,
    ) -> None:
        super().__init__(feature_dim, num_classes, modalities)
        number = plain_number(alpha)
        if number is None:
            raise TypeError(f"alpha: expected a number above 0, got {alpha!r}")
        if not 0 < number < math.inf:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        self.alpha = float(number)
        self.heads = NamedModules({name: nn.Linear(width, self.num_classes) for name, width in self.widths.items()})

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        features, target = self._checked(features, target)
        logits = self._logits("head", self.head, torch.cat([x.detach() for x in features.values()], dim=1))
        own = {name: self._logits(f"heads[{name!r}]", self.heads[name], x) for name, x in features.items()}
        logits_by = own | {"fused": logits}
        output = self._with_losses(logits, logits_by, target, logits_by)
        if output.loss is None:
            return output
        unimodal = torch.stack([output.losses_by[name] for name in features]).sum()
        return output._replace(loss=output.losses_by["fused"] + self.alpha * unimodal)


class Weight(FusionModule):
    r"""Weighted fusion: each feature is weighted by its modality's share in the softmax over features::

        s_m = softmax(x_m over D)      a_m = s_m / Σ_j s_j  elementwise      logits = W (Σ_m a_m ⊙ x_m) + b

    ``logits_by`` holds the logits of each weighted modality alone, ``W (a_m ⊙ x_m) + b``. Features wider than the narrowest
    modality are projected to its width.
    """

    def __init__(self, feature_dim: int | Mapping[str, int], num_classes: int, modalities: Sequence[str] = ("x", "y")) -> None:
        super().__init__(feature_dim, num_classes, modalities)
        self.head = nn.Linear(self._project_to_smallest(), self.num_classes)

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        features, target = self._checked(features, target)
        features = self._projected(features)
        x = torch.stack(list(features.values()))  # (M, B, D)
        # the quotient of softmaxes is the softmax of their logarithms, which has no 0/0 where all of them underflow
        weighted = x.log_softmax(dim=2).softmax(dim=0).to(x.dtype) * x
        logits = self._logits("head", self.head, weighted.sum(0))
        if plain_parameters([self.head], weighted.shape[2], self.num_classes) is None:  # which may take only (B, D)
            parts = [self._logits("head", self.head, own) for own in weighted.unbind()]
        else:
            parts = list(self.head(weighted).unbind())
        logits_by = dict(zip(features, parts, strict=True))
        return self._with_losses(logits, logits_by, target, ["fused"])
