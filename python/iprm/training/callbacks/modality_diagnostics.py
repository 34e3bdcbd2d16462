"""Measurements of a fusion module on a whole split: confusion, angles between modalities, and their strength by class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import iprm_kernels as ik
from iprm.fusion.module import IGNORE_INDEX, FusionModule
from iprm.fusion.probe_rebalance import ProbeRebalance

BINS = 36  # of θ over [0, π]: 5 degrees each


class SplitMeasurement:
    """Measures a fusion module in evaluation mode, batch by batch.

    Per sample, the target, the prediction, and one angle and two divergences per pair are kept on the device; everything else
    is computed at the end, with one transfer to the host.

    Args:
        fusion: any fusion module. Divergences need pairs that it mixes, angles need features of equal width; otherwise they
            are left out.
    """

    def __init__(self, fusion: FusionModule) -> None:
        self.fusion = fusion
        self.mixed = fusion.pairs if isinstance(fusion, ProbeRebalance) else ()
        self.angled: list[tuple[str, str]] = []
        self._target: list[Tensor] = []  # (B,)
        self._prediction: list[Tensor] = []  # (B,)
        self._angle: list[Tensor] = []  # (pairs, B)
        self._kl: list[Tensor] = []  # (pairs * 2, B)

    @torch.no_grad()
    def update(self, features: Mapping[str, Tensor], target: Tensor) -> None:
        """Adds one batch: features (B, D_modality) each, target (B,)."""
        output = self.fusion(features, target)
        mixtures = self.fusion.mixtures(features) if isinstance(self.fusion, ProbeRebalance) else []
        divergences = [
            ik.batch_kl(output.logits_by[modality], logits, reduction="none")
            for pair, logits in zip(self.mixed, mixtures, strict=True)
            for modality in pair
        ]
        projections = getattr(self.fusion, "projections", {})
        common = {name: projections[name](x) if name in projections else x for name, x in features.items()}
        every = itertools.combinations(self.fusion.modalities, 2)
        self.angled = [(a, b) for a, b in every if common[a].shape == common[b].shape]
        self._target.append(target)
        self._prediction.append(output.logits.argmax(1))
        self._angle.append(_rows([_angle(common[a], common[b]) for a, b in self.angled], target))
        self._kl.append(_rows(divergences, target))

    @torch.no_grad()
    def compute(self) -> dict[str, Any]:
        """What `.diagnostics.Diagnostics` describes, from ``modalities`` to ``strength``, as plain values."""
        classes, target = self.fusion.num_classes, torch.cat(self._target)
        labelled = target != IGNORE_INDEX
        target, prediction = target[labelled].long(), torch.cat(self._prediction)[labelled]
        angle, kl = torch.cat(self._angle, 1)[:, labelled], torch.cat(self._kl, 1)[:, labelled].double()
        cells, counts = torch.unique(target * classes + prediction, return_counts=True)
        class_counts = _by_class(torch.ones_like(target, dtype=torch.float64)[None], target, classes)[0]
        kl = _by_class(kl, target, classes).view(len(self.mixed), 2, classes)

        found = (cells, counts, class_counts, *_histograms(angle), kl, _strengths(kl))
        cells, counts, class_counts, histograms, means, undirected, kl, omega = _to_host(*found)
        present = class_counts > 0
        return {
            "modalities": list(self.fusion.modalities),
            "num_classes": classes,
            "rows": int(class_counts.sum()),
            "class_counts": _integers(class_counts),
            "confusion": {
                "target": _integers(cells // classes),
                "prediction": _integers(cells % classes),
                "count": _integers(counts),
            },
            "angles": [
                {"pair": list(pair), "counts": _integers(row), "mean": mean, "undirected": int(none)}
                for pair, row, mean, none in zip(self.angled, histograms, _numbers(means), undirected, strict=True)
            ],
            "strength": [
                {
                    "pair": list(pair),
                    "kl": [_numbers(x, present) for x in sums],
                    "omega": [_numbers(x, present) for x in shares],
                }
                for pair, sums, shares in zip(self.mixed, kl, omega, strict=True)
            ],
        }


def _rows(rows: list[Tensor], like: Tensor) -> Tensor:
    """Stacks R rows (B,) to (R, B), including R = 0."""
    return torch.stack(rows) if rows else like.new_zeros((0, len(like)), dtype=torch.float32)


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """θ between the rows of two batches.  (B, D) each -> (B,); NaN where either vector is zero.

    Computed as 2 atan2(‖x̂ - ŷ‖, ‖x̂ + ŷ‖): near 0 and π, a float32 cosine loses half of the digits of θ.
    """
    directed = (x != 0).any(1) & (y != 0).any(1)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, y = ik.normalize(x.to(wide)), ik.normalize(y.to(wide))
    theta = 2 * torch.atan2((x - y).norm(dim=1), (x + y).norm(dim=1))
    return torch.where(directed, theta, math.nan)


def _by_class(values: Tensor, target: Tensor, classes: int) -> Tensor:
    """Values (R, N) summed by class -> (R, C)."""
    return values.new_zeros((len(values), classes)).index_add_(1, target, values)


def _histograms(angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Angles (P, N) -> counts (P, BINS) over [0, π], means (P,), and numbers (P,) of undefined (NaN) angles."""
    angles = angles.double()
    none = angles.isnan()
    bins = (angles.nan_to_num() * (BINS / math.pi)).long().clamp(max=BINS - 1)
    counts = angles.new_zeros((len(angles), BINS)).scatter_add_(1, bins, (~none).double())
    return counts, angles.nanmean(1), none.sum(1)


def _strengths(kl: Tensor) -> Tensor:
    """ω (P, 2, C) of KL sums (P, 2, C), by one small operator call per class and pair, once per run."""
    pairs, _, classes = kl.shape
    omega = [ik.strength_weights(both) for both in kl.transpose(1, 2).reshape(-1, 2)]
    return torch.stack(omega).view(pairs, classes, 2).transpose(1, 2) if omega else kl


def _to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float64, which holds any count below 2⁵³, in one transfer."""
    flat = torch.cat([x.double().flatten() for x in tensors]).cpu()
    return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)]


def _integers(values: Tensor) -> list[int]:
    return values.long().tolist()


def _numbers(values: Tensor, present: Tensor | None = None) -> list[float | None]:
    """Numbers rounded to seven digits, the precision of float32; None for absent and non-finite values, which JSON lacks."""
    known = values.isfinite() if present is None else values.isfinite() & present
    return [float(f"{value:.7g}") if good else None for value, good in zip(values.tolist(), known.tolist(), strict=True)]
