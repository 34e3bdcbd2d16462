"""Macro-F1 and mean average precision over classes, with memory that grows with the number of classes, not with its square."""

from __future__ import annotations

import torch
from torch import Tensor

#: Scores that are counted at a time.
CHUNK = 2**21


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
    The scores of all rows are counted by the sorted scores of the rows of class k, which are few, instead of being sorted.
    """
    classes, own_rows = target.unique(return_counts=True)
    by_class = target.argsort(stable=True)  # the rows of each class in turn
    rows, total, first = len(target), score.new_zeros(()), 0
    if rows == 0:
        return score.new_full((), torch.nan)
    for part, counts in zip(*(x.split(max(1, CHUNK // max(1, rows))) for x in (classes, own_rows)), strict=True):
        scores = score[:, part].T.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).contiguous()  # (K, N)
        inside = torch.arange(int(counts.max()), device=score.device) < counts[:, None]  # (K, n): a class has n rows at most
        of = by_class[first : first + int(counts.sum())]
        first += len(of)
        own = torch.full(inside.shape, torch.inf, dtype=score.dtype, device=score.device)
        own[inside] = scores[torch.repeat_interleave(torch.arange(len(part), device=score.device), counts), of]
        own = own.sort(1).values
        # of each row, the number of thresholds of class k that it reaches, by which the rows are counted
        reached = torch.searchsorted(own, scores, right=True).minimum(counts[:, None])
        places = torch.arange(len(part), device=score.device)[:, None] * (inside.shape[1] + 1)
        rows_by = (reached + places).flatten().bincount(minlength=len(part) * (inside.shape[1] + 1))
        above = rows_by.view(len(part), -1).flip(1).cumsum(1).flip(1)[:, 1:]  # rows with a score of at least the threshold
        own_above = counts[:, None] - torch.searchsorted(own, own)
        precision = torch.where(inside, own_above / above.clamp(min=1), 0)
        total = total + (precision.sum(1) / counts).sum()
    return total / len(classes)
