"""Early fusion: one linear head on features that were joined before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .module import FusionModule, cross_entropy, sum_logits
from .output import FusionOutput


class Concat(FusionModule):
    r"""Concatenation: ``logits = W [x_1, ..., x_M] + b``.

    ``logits_by`` holds each modality's own part of it, ``W_m x_m + b/M``, with W_m its columns of W: the parts sum to the
    logits, which is how they are computed.
    """

    def __init__(self, feature_dim: int | Mapping[str, int], num_classes: int, modalities: Sequence[str] = ("x", "y")) -> None:
        super().__init__(feature_dim, num_classes, modalities)
        self.head = nn.Linear(sum(self.widths.values()), self.num_classes)

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        features, target = self._checked(features, target)
        columns = self.head.weight.split(list(self.widths.values()), dim=1)  # (C, D_m) each
        bias = self.head.bias / len(features)
        logits_by = {name: F.linear(x, w, bias) for (name, x), w in zip(features.items(), columns, strict=True)}
        logits = sum_logits(logits_by)
        return FusionOutput(None if target is None else cross_entropy(logits, target, self._share(target)), logits, logits_by)


class Weight(FusionModule):
    r"""Weighted fusion, by how much of a modality's softmax over its features lies at each of them::

        s_m = softmax(x_m over D)      a_m = s_m / Σ_j s_j  elementwise      logits = W (Σ_m a_m ⊙ x_m) + b

    ``logits_by`` holds the head on each weighted modality alone, ``W (a_m ⊙ x_m) + b``. Unequal widths are projected to the
    smallest.
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
        return FusionOutput(None if target is None else cross_entropy(logits, target, self._share(target)), logits, logits_by)
