"""diagnostics.json, read and checked: what `iprm.training.callbacks.diagnostics.Diagnostics` has written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Angles:
    """The histogram of θ of a pair over [0, π]; `mean` in radians, None without a row."""

    pair: tuple[str, str]
    counts: list[int]
    mean: float | None
    undirected: int


@dataclass(frozen=True)
class Strength:
    """KL sums and ω of a pair by class; None where the class has no sample."""

    pair: tuple[str, str]
    kl: tuple[list[float | None], list[float | None]]
    omega: tuple[list[float | None], list[float | None]]


@dataclass(frozen=True)
class Record:
    """What a run measured on validation at its end. confusion: (target, prediction) -> count, zeros left out.

    best: with the weights best on validation, not the last; epoch: the one that ended with these weights.
    """

    method: str | None
    modalities: tuple[str, ...]
    classes: int
    rows: int
    class_counts: list[int]
    confusion: dict[tuple[int, int], int]
    angles: list[Angles]
    strength: list[Strength]
    best: bool
    epoch: int
    environment: Mapping[str, Any]

    @property
    def correct(self) -> int:
        return sum(count for (target, prediction), count in self.confusion.items() if target == prediction)


def read_record(path: Path, missing: list[str]) -> Record | None:
    """The record, or None and a word in `missing`."""
    if not path.is_file():
        missing.append(
            f"No {path.name}, which is written at the end of training: no confusion matrix, no angles, no strength by class "
            "and no environment."
        )
        return None
    try:
        return _record(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        missing.append(f"{path.name} cannot be read: {type(error).__name__}: {error}")
        return None


def _record(content: Mapping[str, Any]) -> Record:
    classes = int(content["num_classes"])
    class_counts = [int(count) for count in content["class_counts"]]
    weights = content["weights"]
    return Record(
        method=content.get("method"),
        modalities=tuple(str(name) for name in content["modalities"]),
        classes=classes,
        rows=sum(class_counts),
        class_counts=class_counts,
        confusion=_confusion(content["confusion"], class_counts, classes),
        angles=[_angles(angles, len(content["angles"][0]["counts"])) for angles in content["angles"]],
        strength=[Strength(_pair(s["pair"]), _two(s["kl"], classes), _two(s["omega"], classes)) for s in content["strength"]],
        best=weights["from"] == "best",
        epoch=int(weights["epoch"]),
        environment={key: content[key] for key in ("versions", "platform", "device", "precision", "backends")},
    )


def _confusion(cells: Mapping[str, Any], class_counts: list[int], classes: int) -> dict[tuple[int, int], int]:
    confusion: dict[tuple[int, int], int] = {}
    sums = [0] * classes
    for target, prediction, count in zip(cells["target"], cells["prediction"], cells["count"], strict=True):
        if not (0 <= target < classes and 0 <= prediction < classes):
            raise ValueError(f"confusion: expected classes below {classes}, got {target} and {prediction}")
        confusion[int(target), int(prediction)] = int(count)
        sums[int(target)] += int(count)
    if sums != class_counts:
        raise ValueError("confusion: its rows are expected to sum to class_counts")
    return confusion


def _angles(angles: Mapping[str, Any], bins: int) -> Angles:
    counts = [int(count) for count in angles["counts"]]
    if len(counts) != bins or not counts:
        raise ValueError(f"angles: expected {bins or 'some'} bins, got {len(counts)}")
    return Angles(_pair(angles["pair"]), counts, _optional(angles["mean"]), int(angles["undirected"]))


def _pair(names: Any) -> tuple[str, str]:
    first, second = names
    return str(first), str(second)


def _two(rows: Any, classes: int) -> tuple[list[float | None], list[float | None]]:
    first, second = ([_optional(value) for value in row] for row in rows)
    if len(first) != classes or len(second) != classes:
        raise ValueError(f"strength: expected {classes} classes, got {len(first)} and {len(second)}")
    return first, second


def _optional(value: Any) -> float | None:
    """None for what is not there, and for what is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None
