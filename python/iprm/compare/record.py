"""Reads diagnostics.json, which `iprm.training.callbacks.diagnostics.Diagnostics` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Pair = tuple[str, str]


class Angles(NamedTuple):
    """Histogram of the angle θ of a pair over [0, π]. mean: radians, None without rows; undirected: rows with a zero vector."""

    pair: Pair
    counts: list[int]
    mean: float | None
    undirected: int


class Strength(NamedTuple):
    """ω by class of the first and the second modality of a pair; None for classes without samples."""

    pair: Pair
    omega: tuple[list[float | None], list[float | None]]


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
    """Parses diagnostics.json; raises ValueError, TypeError or LookupError for other content."""
    content = json.loads(text)
    cells = content["confusion"]
    places = zip(cells["target"], cells["prediction"], strict=True)
    return Record(
        method=content["method"],
        modalities=tuple(content["modalities"]),
        classes=content["num_classes"],
        class_counts=content["class_counts"],
        confusion=dict(zip(places, cells["count"], strict=True)),
        angles=[Angles(**angles) for angles in content["angles"]],
        strength=[Strength(strength["pair"], strength["omega"]) for strength in content["strength"]],
        best=content["weights"]["from"] == "best",
        epoch=content["weights"]["epoch"],
        environment={key: content[key] for key in ("versions", "platform", "device", "precision", "backends")},
        names=[str(name) for name in content.get("classes", ())],
    )
