"""Macro-F1 and mean average precision over classes, with memory that grows with the number of classes, not with its square."""

from __future__ import annotations

import torch
from torch import Tensor

#: Scores that are sorted at a time.
CHUNK = 2**22


def macro_f1(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Mean of F1_k = 2 TP_k / (2 TP_k + FP_k + FN_k) over the classes that occur in `prediction` or `target`.

    (N,) int64 each, below `num_classes` -> (); NaN without rows.
    """
    right = prediction[prediction == target].bincount(minlength=num_classes)
    total = prediction.bincount(minlength=num_classes) + target.bincount(minlength=num_classes)
    return (2 * right / total.clamp(min=1)).sum() / (total > 0).sum()


def mean_average_precision(score: Tensor, target: Tensor) -> Tensor:
    """Mean over the classes that occur in `target` of the average precision of class k against the others::

        AP_k = mean, over the rows i of class k, of the precision among all rows j with score_jk >= score_ik

    This is Σ_n (R_n - R_{n-1}) P_n over the thresholds, as in scikit-learn.  (N, C), (N,) int64 -> (); NaN without rows.
    """
    occurring = target.unique()
    rows, total = len(target), score.new_zeros(())
    place = torch.arange(rows, device=score.device)[:, None]
    for classes in occurring.split(max(1, CHUNK // max(1, rows))):
        ordered, order = score[:, classes].sort(dim=0, descending=True)
        own = target[order] == classes
        last = torch.ones_like(own)  # of the rows with equal scores
        last[:-1] = ordered[:-1] != ordered[1:]
        end = torch.where(last, place, rows - 1).flip(0).cummin(0).values.flip(0)
        precision = own.cumsum(0).gather(0, end) / (end + 1)
        total = total + ((precision * own).sum(0) / own.sum(0)).sum()
    return total / len(occurring)
