"""The predictions file of `iprm predict`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iprm.files import replacing
from iprm.streams import cell


def write_predictions(path: Path, batches: Sequence[dict[str, Tensor]], classes: Sequence[str]) -> None:
    """Writes one CSV row per sample: row, target, prediction, and the probability p_<class> of every class.

    Args:
        path: the file to write; its folder is created if missing.
        batches: the results of `FusionClassifier.predict_step`: probability (B, C), target (B,).
        classes: names of the C classes. The target of a row without a label is empty.
    """
    probability = torch.cat([batch["probability"] for batch in batches])
    target = torch.cat([batch["target"] for batch in batches])
    with replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(["row", "target", *columns(classes)])
        for row, (t, predicted) in enumerate(zip(target.tolist(), cells(probability, classes), strict=True)):
            writer.writerow([row, cell(classes[t]) if t >= 0 else "", *predicted])


def columns(classes: Sequence[str]) -> list[str]:
    """Column names of a prediction: the predicted class, and the probability of each class."""
    return ["prediction", *(f"p_{name}" for name in classes)]


def cells(probability: Tensor, classes: Sequence[str]) -> Iterator[list[Any]]:
    """The values for `columns`, one list per sample.  (B, C) -> B lists"""
    for k, p in zip(probability.argmax(1).tolist(), probability.tolist(), strict=True):
        yield [cell(classes[k]), *(f"{value:.6g}" for value in p)]
