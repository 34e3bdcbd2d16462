"""Reads and checks diagnostics.json, which `iprm.training.callbacks.diagnostics.Diagnostics` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Pair = tuple[str, str]
Numbers = list["float | None"]


class Angles(NamedTuple):
    """Histogram of the angle θ of a pair over [0, π]. mean: radians, None without rows; undirected: rows with a zero vector."""

    pair: Pair
    counts: list[int]
    mean: float | None
    undirected: int


class Strength(NamedTuple):
    """ω by class of the first and the second modality of a pair; None for classes without samples."""

    pair: Pair
    omega: tuple[Numbers, Numbers]


class Record(NamedTuple):
    """Measurements on the validation split at the end of a run.

    confusion: (target, prediction) -> count, without zeros; best: whether the weights are those best on
    validation, not the last; epoch: the epoch at whose end the model had these weights; names: of the classes, empty if
    they have none but their indices.
    """

    method: str | None
    modalities: tuple[str, ...]
    classes: int
    class_counts: list[int]
    confusion: dict[tuple[int, int], int]
    angles: list[Angles]
    strength: list[Strength]
    best: bool
    epoch: int
    environment: Mapping[str, Any]
    names: Sequence[str] = ()

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.names[label] if self.names else str(label)

    @property
    def rows(self) -> int:
        return sum(self.class_counts)

    @property
    def correct(self) -> int:
        return sum(count for (target, prediction), count in self.confusion.items() if target == prediction)


def read_record(text: str) -> Record:
    """Parses diagnostics.json; raises ValueError, TypeError, LookupError or AttributeError for other content."""
    content = json.loads(text)
    classes, class_counts = int(content["num_classes"]), [int(count) for count in content["class_counts"]]
    bins = {len(angles["counts"]) for angles in content["angles"]}
    if len(bins) > 1 or 0 in bins:
        raise ValueError(f"angles: expected one number of bins from 1 up, got {sorted(bins)}")
    return Record(
        method=content.get("method"),
        modalities=tuple(str(name) for name in content["modalities"]),
        classes=classes,
        class_counts=class_counts,
        confusion=_confusion(content["confusion"], class_counts, classes),
        angles=[
            Angles(_pair(a), [int(count) for count in a["counts"]], _optional(a["mean"]), int(a["undirected"]))
            for a in content["angles"]
        ],
        strength=[Strength(_pair(s), _omega(s["omega"], classes)) for s in content["strength"]],
        best=content["weights"]["from"] == "best",
        epoch=int(content["weights"]["epoch"]),
        environment={key: content[key] for key in ("versions", "platform", "device", "precision", "backends")},
        names=[str(name) for name in content.get("classes", ())],
    )


def _confusion(cells: Mapping[str, Any], class_counts: list[int], classes: int) -> dict[tuple[int, int], int]:
    confusion: dict[tuple[int, int], int] = {}
    sums = [0] * classes
    for target, prediction, count in zip(cells["target"], cells["prediction"], cells["count"], strict=True):
        if not (0 <= target < classes and 0 <= prediction < classes):
            raise ValueError(f"confusion: expected classes below {classes}, got {target} and {prediction}")
        confusion[int(target), int(prediction)] = int(count)
        sums[int(target)] += int(count)
    if min([*class_counts, *confusion.values()], default=0) < 0:
        raise ValueError("confusion: expected counts from 0 up")
    if sums != class_counts:
        raise ValueError("confusion: its rows are expected to sum to class_counts")
    return confusion


def _pair(of: Mapping[str, Any]) -> Pair:
    first, second = of["pair"]
    return str(first), str(second)


def _omega(rows: Any, classes: int) -> tuple[Numbers, Numbers]:
    first, second = ([_optional(value) for value in row] for row in rows)
    if len(first) != classes or len(second) != classes:
        raise ValueError(f"strength: expected {classes} classes, got {len(first)} and {len(second)}")
    return first, second


def _optional(value: Any) -> float | None:
    """The value as a float; None if it is missing or not finite."""
    return float(value) if value is not None and math.isfinite(value) else None
