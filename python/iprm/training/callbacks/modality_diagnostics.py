"""Measurements of a fusion module on a whole split: confusion, angles between modalities, and their strength by class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import iprm_kernels as ik
from iprm.fusion.module import IGNORE_INDEX, FusionModule
from iprm.fusion.probe_rebalance import ProbeRebalance

BINS = 36  # of θ over [0, π]: 5 degrees each


class SplitMeasurement:
    """Measures a fusion module in evaluation mode, batch by batch.

    Per sample, the target, the prediction, and one angle and two divergences per pair are kept on the device; everything else
    is computed on the host at the end.

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

    def compute(self) -> dict[str, Any]:
        """What `.diagnostics.Diagnostics` describes, from ``modalities`` to ``strength``, as plain values."""
        classes, target = self.fusion.num_classes, torch.cat(self._target).cpu().numpy()
        labelled = target != IGNORE_INDEX
        target, prediction = target[labelled], torch.cat(self._prediction).cpu().numpy()[labelled]
        angle, kl = (torch.cat(rows, 1).double().cpu().numpy()[:, labelled] for rows in (self._angle, self._kl))
        cells, counts = np.unique(target * classes + prediction, return_counts=True)
        class_counts = np.bincount(target, minlength=classes)
        present = class_counts > 0
        sums = np.array([np.bincount(target, row, classes) for row in kl]).reshape(len(self.mixed), 2, classes)
        return {
            "modalities": list(self.fusion.modalities),
            "num_classes": classes,
            "rows": len(target),
            "class_counts": class_counts.tolist(),
            "confusion": {
                "target": (cells // classes).tolist(),
                "prediction": (cells % classes).tolist(),
                "count": counts.tolist(),
            },
            "angles": [{"pair": list(pair), **_histogram(row)} for pair, row in zip(self.angled, angle, strict=True)],
            "strength": [
                {"pair": list(pair), "kl": _numbers(both, present), "omega": _numbers(_strengths(both), present)}
                for pair, both in zip(self.mixed, sums, strict=True)
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


def _histogram(angles: np.ndarray) -> dict[str, Any]:
    """Counts of angles (N,) over [0, π], their mean, and the number of undefined (NaN) ones."""
    known = angles[~np.isnan(angles)].clip(max=math.pi)  # π in float32 is above π
    counts = np.histogram(known, BINS, (0, math.pi))[0].tolist()
    mean = float(f"{known.mean():.7g}") if len(known) else None
    return {"counts": counts, "mean": mean, "undirected": len(angles) - len(known)}


def _strengths(kl: np.ndarray) -> np.ndarray:
    """ω (2, C) of KL sums (2, C), by one small operator call per class, once per run."""
    return np.stack([ik.strength_weights(torch.from_numpy(both)).numpy() for both in kl.T], axis=1)


def _numbers(values: np.ndarray, present: np.ndarray) -> list[list[float | None]]:
    """Numbers (2, C) rounded to seven digits, the precision of float32; None for absent and non-finite values, which JSON
    lacks."""
    known = np.isfinite(values) & present
    return [
        [float(f"{value:.7g}") if good else None for value, good in zip(*row, strict=True)]
        for row in zip(values.tolist(), known.tolist(), strict=True)
    ]
