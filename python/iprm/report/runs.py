"""A run's folder, read: settings, the course of its metrics, what it measured at its end, and what of these is missing."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from iprm.errors import InputError, closest

from .record import Record, read_record

CONFIG, METRICS, DIAGNOSTICS = "config.yaml", "metrics.csv", "diagnostics.json"
MODEL = "hparams.yaml"  # of a run that was not started by iprm fit
FILES = (METRICS, CONFIG, DIAGNOSTICS)

Course = dict[int, float]  # epoch -> value


class PairCourse(NamedTuple):
    """λ and ω of one pair of modalities over the epochs."""

    first: str
    second: str
    weight: Course
    strengths: tuple[Course, Course]

    @property
    def name(self) -> str:
        return f"{self.first} × {self.second}"


@dataclass
class Run:
    """One run. What its folder lacks is empty here, and named in `missing`.

    settings: dotted name -> value, of config.yaml; courses: metric -> epoch -> value; name: the end of its path, and
    label: method and seed, each telling it apart from the other runs of a report.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    courses: dict[str, Course] = field(default_factory=dict)
    record: Record | None = None
    missing: list[str] = field(default_factory=list)
    name: str = ""
    label: str = ""

    @property
    def method(self) -> str:
        found = self.settings.get("model.method", self.record.method if self.record else None)
        return "unknown method" if found is None else str(found)

    @property
    def seed(self) -> str:
        return str(self.settings.get("seed_everything", "–"))

    @property
    def data(self) -> str:
        """The dataset's class, without its module."""
        return str(self.settings.get("data.class_path", "–")).rpartition(".")[2]

    @property
    def epochs(self) -> list[int]:
        return sorted({epoch for course in self.courses.values() for epoch in course})

    @property
    def max_epochs(self) -> int | None:
        asked = self.settings.get("trainer.max_epochs")
        return asked if isinstance(asked, int) and asked > 0 else None

    @property
    def best_epoch(self) -> int | None:
        """The first of those with the highest validation accuracy, as ModelCheckpoint chooses."""
        accuracy = self.courses.get("val_accuracy", {})
        return max(accuracy, key=lambda epoch: (accuracy[epoch], -epoch), default=None)

    @property
    def heads(self) -> list[str]:
        """Modalities in their order where it is known, then "mix" where the method mixes."""
        prefixes = ("val_accuracy_", "train_accuracy_")
        found = {name.removeprefix(p) for name in self.courses for p in prefixes if name.startswith(p)}
        known = list(self.record.modalities) if self.record else []
        rank = {name: place for place, name in enumerate([*known, *sorted(found - {*known, "mix"}), "mix"])}
        return sorted(found, key=lambda name: rank[name])

    @property
    def pairs(self) -> list[PairCourse]:
        """Of the pairs that IPRM mixes, none of another method."""
        modalities = [head for head in self.heads if head != "mix"]
        if "weight" in self.courses:
            first, second = modalities if len(modalities) == 2 else ("first", "second")
            strengths = (self.courses.get(f"strength_{first}", {}), self.courses.get(f"strength_{second}", {}))
            return [PairCourse(first, second, self.courses["weight"], strengths)]
        numbers = sorted(int(n) for name in self.courses if (n := name.removeprefix("weight_")) != name and n.isdecimal())
        names = list(itertools.combinations(modalities, 2))
        if self.record is None or len(names) != len(numbers):  # the columns of metrics.csv have lost the order
            names = [(f"pair {n} first", f"pair {n} second") for n in numbers]
        return [
            PairCourse(
                first,
                second,
                self.courses[f"weight_{n}"],
                (self.courses.get(f"strength_{n}_first", {}), self.courses.get(f"strength_{n}_second", {})),
            )
            for n, (first, second) in zip(numbers, names, strict=False)
        ]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, each once, with labels that tell them apart.

    Raises:
        InputError: a folder does not exist or is not a run; the message names the closest run there is.
    """
    runs = [read_run(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]
    places = [run.folder.resolve() for run in runs]
    titles = [f"{run.method} · seed {run.seed}" for run in runs]
    for run, place, title in zip(runs, places, titles, strict=True):
        run.name = _shortest(place, places)
        run.label = title if titles.count(title) == 1 else f"{title} · {run.name}"
    return runs


def _shortest(folder: Path, among: Sequence[Path]) -> str:
    """The end of the path that no other of `among` ends in."""
    for depth in range(1, len(folder.parts)):
        end = folder.parts[-depth:]
        if sum(other.parts[-depth:] == end for other in among) == 1:
            return "/".join(end)
    return str(folder)


def read_run(folder: Path) -> Run:
    """One run, as far as its folder holds it.

    Raises:
        InputError: the folder does not exist or is not a run; the message names the closest run there is.
    """
    if not is_run(folder):
        what = f"not a run of iprm fit: none of {', '.join(FILES)} is in it" if folder.is_dir() else "there is no such run"
        meant = _closest_run(folder)
        raise InputError(f"{folder}: {what}" + (f"; did you mean {meant}?" if meant else ""))
    run = Run(folder)
    run.settings = _settings(folder, run.missing)
    run.courses = _courses(folder / METRICS, run.missing)
    run.record = read_record(folder / DIAGNOSTICS, run.missing)
    last, asked = max(run.epochs, default=-1), run.max_epochs
    if asked and run.epochs and last + 1 < asked:
        run.missing.insert(0, f"{last + 1} of {asked} epochs: still running, or stopped early.")
    if not any((folder / "checkpoints").glob("*.ckpt")):
        run.missing.append("No checkpoint in checkpoints/.")
    return run


def is_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in FILES)


def _closest_run(folder: Path) -> Path | None:
    """A run above, below or beside what was asked for, by the likeness of its path."""
    above = next((parent for parent in list(folder.parents)[:2] if is_run(parent)), None)
    if above:
        return above
    base = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), Path())
    patterns = ("*", "*/*", "*/*/*") if base == folder else ("*", "*/*")
    found = itertools.islice((path for pattern in patterns for path in base.glob(pattern) if is_run(path)), 1000)
    runs = {str(path): path for path in found}
    name = closest(str(folder), runs)
    return runs[name] if name else next(iter(sorted(runs.values())), None)


def _settings(folder: Path, missing: list[str]) -> dict[str, Any]:
    """Of config.yaml, by dotted name; or those of the model, which Lightning's loggers write in any run."""
    if (folder / CONFIG).is_file():
        return _yaml(folder / CONFIG, missing)
    model = _yaml(folder / MODEL, missing) if (folder / MODEL).is_file() else {}
    known = {f"model.{name}": value for name, value in model.items()}
    unknown = "of the settings only the model's are" if known else "method, seed and settings are not"
    missing.append(f"No {CONFIG}: {unknown} known.")
    return known


def _yaml(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        missing.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return {}
    if not isinstance(content, Mapping):
        missing.append(f"{path.name} holds no settings.")
        return {}
    return dict(flattened(content))


def flattened(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs of dotted name and value; empty ones are values."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{name}.")
        else:
            yield name, value


def _courses(path: Path, missing: list[str]) -> dict[str, Course]:
    """metric -> epoch -> its last finite value. A last line that is being written is left out."""
    if not path.is_file():
        missing.append(f"No {METRICS}: no epoch has ended yet.")
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        whole, _, partial = text.rpartition("\n")
        rows = list(csv.DictReader(whole.splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        missing.append(f"{METRICS} cannot be read: {error}")
        return {}
    if partial:
        missing.append(f"The last line of {METRICS} is incomplete and left out.")
    courses: dict[str, Course] = {}
    for row in rows:
        epoch = _number(row.get("epoch"))
        if epoch is None:
            continue
        for name, text_value in row.items():
            value = _number(text_value)
            if isinstance(name, str) and name not in ("epoch", "step") and value is not None:
                courses.setdefault(name, {})[int(epoch)] = value
    if not courses:
        missing.append(f"{METRICS} holds no epoch yet.")
    return courses


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
