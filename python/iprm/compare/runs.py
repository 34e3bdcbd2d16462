"""Reads the folder of a run, without torch: settings, metrics of each epoch, test metrics, diagnostics, and what is missing."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from iprm.errors import InputError, closest
from iprm.names import file_name, possible_names

from .record import Pair, Record, read_record

CONFIG, METRICS, DIAGNOSTICS = "config.yaml", "metrics.csv", "diagnostics.json"
MODEL = "hparams.yaml"  # of a run that was not started by iprm fit
TEST, FAILED = "test.json", "failed.txt"  # of a run of a comparison
COMPARISON = "settings.json"  # in <comparison>, above <comparison>/<method>/seed=<k>
FILES = (METRICS, CONFIG, DIAGNOSTICS)
#: Settings that change what is shown during a run, and not the run.
DISPLAY = ("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps")
SYMBOLS = {"weight": "λ", "strength": "ω"}
#: Prefixes of columns of metrics.csv that are not measures of the method.
NO_MEASURE = ("train_", "val_", "test_", "lr-")

LARGEST = 1e30
#: Distance from 0 or 1 at which a table shows λ as 0.00 or 1.00.
ONE_SIDED = 0.005

Course = dict[int, float]  # epoch -> value


@dataclass
class Run:
    """One run. Parts that its folder lacks are empty here, and `missing` names them.

    settings: dotted name -> value, from config.yaml; courses: metric -> epoch -> value; test: metrics of the best checkpoint
    on the test split, without "test_"; seconds: median of the training part of an epoch; failure: the reason of a failed run;
    name: the end of its path, and label: method and seed, each unique among the runs of a report.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    courses: dict[str, Course] = field(default_factory=dict)
    record: Record | None = None
    test: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    failure: str = ""
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
        """The first epoch with the highest validation accuracy, which ModelCheckpoint also chooses."""
        accuracy = self.courses.get("val_accuracy", {})
        return max(accuracy, key=lambda epoch: (accuracy[epoch], -epoch), default=None)

    @property
    def heads(self) -> list[str]:
        """Modalities in their order, then "mix" if the method mixes."""
        prefixes = ("val_accuracy_", "train_accuracy_")
        found = dict.fromkeys(name.removeprefix(p) for name in self.courses for p in prefixes if name.startswith(p))
        known = [name for name in (self.record.modalities if self.record else ()) if name in found]
        return sorted(found, key=lambda head: (head == "mix", known.index(head) if head in known else len(known)))

    @property
    def measures(self) -> dict[str, Course]:
        """The measures of the method, such as λ and ω, by the names of their columns in metrics.csv."""
        return {name: course for name, course in self.courses.items() if not name.startswith(NO_MEASURE)}

    @property
    def weights(self) -> dict[str, Pair]:
        """The column of λ of each pair -> the pair, in the order of the modalities: λ weighs the first of a pair."""
        heads = [head for head in self.heads if head != "mix"]
        if len(heads) == 2 and "weight" in self.courses:
            return {"weight": (heads[0], heads[1])}
        pairs = (pair for both in itertools.combinations(heads, 2) for pair in (both, both[::-1]))
        named = ((f"weight_{name}", pair) for pair in pairs for name in possible_names(*pair))
        return {name: pair for name, pair in named if name in self.courses}

    @property
    def one_sided(self) -> dict[Pair, str]:
        """Each pair whose last λ is within `ONE_SIDED` of 0 or 1 -> the modality that its mixture then consists of."""
        found = {}
        for name, pair in self.weights.items():
            last = self.last(name)
            if last is not None and abs(last - round(last)) < ONE_SIDED:
                found[pair] = pair[1 - round(last)]
        return found

    def last(self, metric: str) -> float | None:
        course = self.courses.get(metric, {})
        return course[max(course)] if course else None


def label(measure: str, modalities: Sequence[str], shown: Callable[[str], str] = str) -> str:
    """Display name of a measure: "λ", "ω audio", "λ audio × text", "ω text (audio × text)", with modalities as `shown` returns
    them; other measures keep their names."""
    kind, _, rest = measure.partition("_")
    if kind not in SYMBOLS:
        return measure
    for first, second in itertools.permutations(modalities, 2):
        for of in ("", first, second):
            if rest in possible_names(*filter(None, (first, second, of))):
                pair = f"{shown(first)} × {shown(second)}"
                return f"{SYMBOLS[kind]} {shown(of)} ({pair})" if of else f"{SYMBOLS[kind]} {pair}"
    return f"{SYMBOLS[kind]} {shown(rest)}".rstrip()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders or below them, each once, with unique labels.

    Raises:
        InputError: a folder does not exist or has no run; the message names the closest existing run.
    """
    found = {path.resolve(): path for folder in folders for path in _runs_at(folder)}
    runs = [read_run(folder) for folder in found.values()]
    titles = [f"{run.method} · seed {run.seed}" for run in runs]
    common = Path(os.path.commonpath(found)) if len(found) > 1 else next(iter(found)).parent
    for run, place, title in zip(runs, found, titles, strict=True):
        run.name = place.relative_to(common).as_posix()
        run.label = title if titles.count(title) == 1 else f"{title} · {run.name}"
    return runs


def _runs_at(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    runs = list(_runs_below(folder))
    if not runs:
        what = f"not a run of iprm fit: none of {', '.join(FILES)} is in it" if folder.is_dir() else "there is no such run"
        meant = _closest_run(folder)
        raise InputError(f"{folder}: {what}" + (f"; did you mean {meant}?" if meant else ""))
    order = {
        parent: [file_name(str(name)) for name in settings_of_comparison(parent).get("methods", [])]
        for parent in {run.parent.parent for run in runs}
    }

    def place(run: Path) -> tuple[Any, ...]:
        methods = order[run.parent.parent]
        rank = methods.index(run.parent.name) if run.parent.name in methods else len(methods)
        return _natural(run.parent.parent), rank, _natural(run.parent), _natural(run)

    return sorted(runs, key=place)


def _natural(path: Path) -> list[tuple[int, str]]:
    """version_2 before version_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path)) if part]


def _runs_below(folder: Path) -> Iterator[Path]:
    for pattern in ("*", "*/*", "*/*/*"):
        yield from (path for path in folder.glob(pattern) if is_run(path))


def read_run(folder: Path) -> Run:
    """Reads one run from the files that its folder has."""
    run = Run(folder)
    if (folder / CONFIG).is_file():
        run.settings = read_settings(folder / CONFIG, run.missing)
    else:
        model = read_settings(folder / MODEL, run.missing) if (folder / MODEL).is_file() else {}
        run.settings = {f"model.{name}": value for name, value in model.items()}
        unknown = "only the model's settings are" if model else "method, seed and settings are not"
        run.missing.append(f"No {CONFIG}: {unknown} known.")
    if (folder / METRICS).is_file():
        run.courses = _read(folder / METRICS, lambda text: _courses(text, run.missing), run.missing) or {}
    else:
        run.missing.append(f"No {METRICS}: no epoch has ended yet.")
    if (folder / DIAGNOSTICS).is_file():
        run.record = _read(folder / DIAGNOSTICS, read_record, run.missing)
    else:
        what = "no confusion matrix, no angles, no strength by class and no environment"
        run.missing.append(f"No {DIAGNOSTICS}, which is written at the end of training: {what}.")
    if (folder / FAILED).is_file():
        run.failure = (_read(folder / FAILED, str.splitlines, run.missing) or ["for an unknown reason"])[0]
        run.missing.insert(0, f"Failed: {run.failure}")
    if (folder / TEST).is_file():
        test = _read(folder / TEST, lambda text: dict(flattened(json.loads(text))), run.missing) or {}
        numbers = {name.removeprefix("metrics."): _number(test[name]) for name in test if name.startswith("metrics.")}
        run.test = {name: value for name, value in numbers.items() if value is not None}
        run.seconds = _number(test.get("seconds_per_epoch"))
    last, asked = max(run.epochs, default=-1), run.max_epochs
    if asked and run.epochs and last + 1 < asked:
        run.missing.insert(0, f"{last + 1} of {asked} epochs: still running, or stopped early.")
    if not any((folder / "checkpoints").glob("*.ckpt")):
        run.missing.append("No checkpoint in checkpoints/.")
    return run


def settings_of_comparison(folder: Path) -> dict[str, Any]:
    """The content of settings.json, such as data, methods and seeds; empty if it cannot be read."""
    found = _read(folder / COMPARISON, json.loads, [])
    usable = isinstance(found, dict) and all(isinstance(found.get(name), list) for name in ("methods", "seeds"))
    return found if usable else {}


def is_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in FILES)


def _closest_run(folder: Path) -> Path | None:
    """The run that contains `folder`, or else one near it with a similar path."""
    above = next((parent for parent in list(folder.parents)[:2] if is_run(parent)), None)
    base = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), Path())
    runs = {} if above else {str(path): path for path in itertools.islice(_runs_below(base), 1000)}
    name = closest(str(folder), runs)
    return above or (runs[name] if name else next(iter(sorted(runs.values())), None))


def read_settings(path: Path, missing: list[str]) -> dict[str, Any]:
    """Dotted name -> value of a YAML file; empty, with a message in `missing`, if it holds none."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return _read(path, lambda text: dict(flattened(yaml.load(text, Loader=loader))), missing) or {}


def _read(path: Path, parse: Callable[[str], Any], missing: list[str]) -> Any:
    """The parsed content of the file; or None, with a message in `missing`."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError, csv.Error) as error:
        missing.append(f"{path.name} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")
        return None


def flattened(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs of dotted name and value; empty mappings are values."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{name}.")
        else:
            yield name, value


def _courses(text: str, missing: list[str]) -> dict[str, Course]:
    """metric -> epoch -> its last finite value. An incomplete last line is left out."""
    whole, _, partial = text.rpartition("\n")
    if partial:
        missing.append(f"The last line of {METRICS} is incomplete and left out.")
    courses: dict[str, Course] = {}
    for row in csv.DictReader(whole.splitlines()):
        epoch = _number(row.get("epoch"))
        for name, cell in row.items() if epoch is not None and abs(epoch) < 2**31 else ():
            value = _number(cell)
            if isinstance(name, str) and name not in ("epoch", "step") and value is not None:
                courses.setdefault(name, {})[int(epoch)] = value  # type: ignore[arg-type]
    if not courses:
        missing.append(f"{METRICS} holds no epoch yet.")
    return courses


def _number(text: Any) -> float | None:
    """The number; None if it is not finite, or beyond `LARGEST`, which no metric reaches and no axis can show."""
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < LARGEST else None
