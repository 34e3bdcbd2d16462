"""Reads and checks diagnostics.json, which `iprm.training.callbacks.diagnostics.Diagnostics` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .reading import flattened, text

#: Most bins of a histogram of angles; the callback writes 36.
MOST_BINS = 1000

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


def read_record(content: str) -> Record:
    """Parses diagnostics.json; raises an error, of whatever type, for other content."""
    found = json.loads(content)
    class_counts = [_whole("class_counts", count) for count in found["class_counts"]]
    classes, names = len(class_counts), [text(name) for name in found.get("classes", ())]
    if _whole("num_classes", found["num_classes"]) != classes or len(names) not in (0, classes):
        raise ValueError(
            f"expected {classes} classes as in class_counts, got {text(found['num_classes'])} and {len(names)} names"
        )
    bins = {len(angles["counts"]) for angles in found["angles"]}
    if len(bins) > 1 or not bins <= set(range(1, MOST_BINS + 1)):
        raise ValueError(f"angles: expected one number of bins from 1 to {MOST_BINS}, got {sorted(bins)[:10]}")
    return Record(
        method=None if found.get("method") is None else text(found["method"]),
        modalities=tuple(text(name) for name in found["modalities"]),
        classes=classes,
        class_counts=class_counts,
        confusion=_confusion(found["confusion"], class_counts, classes),
        angles=[_angles(angles) for angles in found["angles"]],
        strength=[Strength(_pair(s), _omega(s["omega"], classes)) for s in found["strength"]],
        best=found["weights"]["from"] == "best",
        epoch=_whole("epoch", found["weights"]["epoch"]),
        environment=flattened({key: found[key] for key in ("versions", "platform", "device", "precision", "backends")}),
        names=names,
    )


def _angles(angles: Mapping[str, Any]) -> Angles:
    counts = [_whole("angles", count) for count in angles["counts"]]
    mean = _optional("angle", angles["mean"], math.pi)
    return Angles(_pair(angles), counts, mean, _whole("undirected", angles["undirected"]))


def _confusion(cells: Mapping[str, Any], class_counts: list[int], classes: int) -> dict[tuple[int, int], int]:
    confusion: dict[tuple[int, int], int] = {}
    sums = [0] * classes
    for target, prediction, count in zip(cells["target"], cells["prediction"], cells["count"], strict=True):
        if not (0 <= target < classes and 0 <= prediction < classes):
            raise ValueError(f"confusion: expected classes below {classes}, got {target} and {prediction}")
        confusion[int(target), int(prediction)] = _whole("confusion", count)
        sums[int(target)] += int(count)
    if sums != class_counts:
        raise ValueError("confusion: its rows are expected to sum to class_counts")
    return confusion


def _pair(of: Mapping[str, Any]) -> Pair:
    first, second = of["pair"]
    return text(first), text(second)


def _omega(rows: Any, classes: int) -> tuple[Numbers, Numbers]:
    first, second = ([_optional("strength", value, 1) for value in row] for row in rows)
    if len(first) != classes or len(second) != classes:
        raise ValueError(f"strength: expected {classes} classes, got {len(first)} and {len(second)}")
    return first, second


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < 2**53 and value == int(value)):
        raise ValueError(f"{name}: expected counts from 0 up, got {text(value)}")
    return int(value)


def _optional(name: str, value: Any, highest: float) -> float | None:
    """The value as a float; None if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    if not 0 <= value <= highest + 1e-6:
        raise ValueError(f"{name}: expected a number from 0 to {highest:g}, got {text(value)}")
    return float(value)
