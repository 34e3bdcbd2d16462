"""Early fusion: features are joined, then classified by one linear head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iprm.encoders.named_modules import NamedModules

from .module import FusionModule, sum_logits
from .output import FusionOutput


class Concat(FusionModule):
    r"""Concatenation: ``logits = W [x_1, ..., x_M] + b``.

    ``logits_by`` holds the contribution of each modality, ``W_m x_m + b/M``, where W_m are its columns of W. The logits are
    computed as the sum of these contributions.
    """

    def __init__(self, feature_dim: int | Mapping[str, int], num_classes: int, modalities: Sequence[str] = ("x", "y")) -> None:
        super().__init__(feature_dim, num_classes, modalities)
        self.head = nn.Linear(sum(self.widths.values()), self.num_classes)

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        features, target = self._checked(features, target)
        columns = self.head.weight.split(list(self.widths.values()), dim=1)  # (C, D_m) each
        bias = self.head.bias / len(features)
        logits_by = {name: F.linear(x, w, bias) for (name, x), w in zip(features.items(), columns, strict=True)}
        return self._with_losses(sum_logits(logits_by), logits_by, target, ["fused"])


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
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha: expected a number above 0, got {alpha!r}")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        self.alpha = float(alpha)
        self.heads = NamedModules({name: nn.Linear(width, self.num_classes) for name, width in self.widths.items()})

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        features, target = self._checked(features, target)
        logits = self.head(torch.cat([x.detach() for x in features.values()], dim=1))
        logits_by = {name: self.heads[name](x) for name, x in features.items()} | {"fused": logits}
        output = self._with_losses(logits, logits_by, target, logits_by)
        if output.loss is None:
            return output
        own = torch.stack([output.losses_by[name] for name in features]).sum()
        return output._replace(loss=output.losses_by["fused"] + self.alpha * own)


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
        logits = self.head(weighted.sum(0))
        logits_by = dict(zip(features, self.head(weighted).unbind(), strict=True))
        return self._with_losses(logits, logits_by, target, ["fused"])
