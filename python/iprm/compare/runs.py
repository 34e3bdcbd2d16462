"""Reads the folder of a run, without torch: settings, metrics of each epoch, test metrics, diagnostics, and what is missing."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iprm.errors import InputError, closest
from iprm.names import escaped, file_name, possible_names

from .reading import HEADS, Budget, Course, is_file, number, read, read_courses, read_json, read_yaml, text
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

#: Most runs of a report.
MOST_RUNS = 1000
#: Distance from 0 or 1 at which a table shows λ as 0.00 or 1.00.
ONE_SIDED = 0.005


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

    @functools.cached_property
    def method(self) -> str:
        found = self.settings.get("model.method", self.record.method if self.record else None)
        return "unknown method" if found is None else text(found)

    @functools.cached_property
    def seed(self) -> str:
        return text(self.settings.get("seed_everything", "–"))

    @functools.cached_property
    def data(self) -> str:
        """The dataset's class, without its module."""
        return text(text(self.settings.get("data.class_path", "–"), 1000).rpartition(".")[2])

    @functools.cached_property
    def epochs(self) -> list[int]:
        return sorted({epoch for course in self.courses.values() for epoch in course})

    @property
    def max_epochs(self) -> int | None:
        asked = self.settings.get("trainer.max_epochs")
        return asked if isinstance(asked, int) and 0 < asked < 2**31 else None

    @property
    def best_epoch(self) -> int | None:
        """The first epoch with the highest validation accuracy, which ModelCheckpoint also chooses."""
        accuracy = self.courses.get("val_accuracy", {})
        return max(accuracy, key=lambda epoch: (accuracy[epoch], -epoch), default=None)

    @functools.cached_property
    def heads(self) -> list[str]:
        """Modalities in their order, then "mix" if the method mixes."""
        found = dict.fromkeys(name.removeprefix(p) for name in self.courses for p in HEADS if name.startswith(p))
        known = [name for name in (self.record.modalities if self.record else ()) if name in found]
        return sorted(found, key=lambda head: (head == "mix", known.index(head) if head in known else len(known)))

    @functools.cached_property
    def measures(self) -> dict[str, Course]:
        """The measures of the method, such as λ and ω, by the names of their columns in metrics.csv."""
        return {name: course for name, course in self.courses.items() if not name.startswith(NO_MEASURE)}

    @functools.cached_property
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
    for names in ({m: m for m in modalities}, {escaped(m): m for m in modalities}):
        for place in (place for place, letter in enumerate(rest) if letter == "_"):
            first, tail = rest[:place], rest[place + 1 :]
            for second, of in ((tail, ""), (tail.removesuffix(f"_{first}"), first), (tail[: len(tail) // 2],) * 2):
                if first in names and second in names and rest == "_".join(filter(None, (first, second, of))):
                    pair = f"{shown(names[first])} × {shown(names[second])}"
                    return f"{SYMBOLS[kind]} {shown(names[of])} ({pair})" if of else f"{SYMBOLS[kind]} {pair}"
    return f"{SYMBOLS[kind]} {shown(rest)}".rstrip()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders or below them, each once, with unique labels.

    Raises:
        InputError: a folder does not exist or has no run, and the message names the closest existing run; or there are more
            than `MOST_RUNS`.
    """
    budget = Budget()
    found = {path.resolve(): path for folder in folders for path in _runs_at(folder, budget)}
    if len(found) > MOST_RUNS:
        raise InputError(f"expected at most {MOST_RUNS} runs, got {len(found)}: name those that the report is about")
    runs = [read_run(folder, budget) for folder in found.values()]
    titles = [f"{run.method} · seed {run.seed}" for run in runs]
    common = Path(os.path.commonpath(found)) if len(found) > 1 else next(iter(found)).parent
    for run, place, title in zip(runs, found, titles, strict=True):
        run.name = place.relative_to(common).as_posix()
        run.label = title if titles.count(title) == 1 else f"{title} · {run.name}"
    return runs


def _runs_at(folder: Path, budget: Budget) -> list[Path]:
    if is_run(folder):
        return [folder]
    runs = list(_runs_below(folder))
    if not runs:
        what = f"not a run of iprm fit: none of {', '.join(FILES)} is in it" if folder.is_dir() else "there is no such run"
        meant = _closest_run(folder)
        raise InputError(f"{folder}: {what}" + (f"; did you mean {meant}?" if meant else ""))
    order = {
        parent: [file_name(text(name)) for name in settings_of_comparison(parent, budget).get("methods", [])]
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
    """The runs in up to three levels of folders, each folder once, as links may lead in circles."""
    level, seen = [folder], set()
    for _ in range(3):
        below = []
        for path in itertools.chain.from_iterable(map(_folders_in, level)):
            there = path.stat()
            if (there.st_dev, there.st_ino) not in seen:
                seen.add((there.st_dev, there.st_ino))
                below.append(path)
                if is_run(path):
                    yield path
        level = below


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if os.path.isdir(path)]
    except OSError:  # it may not be listed
        return []


def read_run(folder: Path, budget: Budget | None = None) -> Run:
    """Reads one run from the files that its folder has, as far as the budget of all runs allows."""
    run, budget = Run(folder), budget or Budget()
    if is_file(folder / CONFIG):
        run.settings = read(folder / CONFIG, read_yaml, run.missing, budget) or {}
    else:
        model = (read(folder / MODEL, read_yaml, run.missing, budget) if is_file(folder / MODEL) else None) or {}
        run.settings = {f"model.{name}": value for name, value in model.items()}
        unknown = "only the model's settings are" if model else "method, seed and settings are not"
        run.missing.append(f"No {CONFIG}: {unknown} known.")
    if is_file(folder / METRICS):
        run.courses = read_courses(folder / METRICS, run.missing, budget)
    else:
        run.missing.append(f"No {METRICS}: no epoch has ended yet.")
    if is_file(folder / DIAGNOSTICS):
        run.record = read(folder / DIAGNOSTICS, read_record, run.missing, budget)
    else:
        what = "no confusion matrix, no angles, no strength by class and no environment"
        run.missing.append(f"No {DIAGNOSTICS}, which is written at the end of training: {what}.")
    if is_file(folder / FAILED):
        reason = read(folder / FAILED, str.splitlines, run.missing, budget) or ["for an unknown reason"]
        run.failure = text(reason[0], 1000)
        run.missing.insert(0, f"Failed: {run.failure}")
    if is_file(folder / TEST):
        test = read(folder / TEST, read_json, run.missing, budget) or {}
        numbers = {name.removeprefix("metrics."): number(test[name]) for name in test if name.startswith("metrics.")}
        run.test = {name: value for name, value in numbers.items() if value is not None}
        run.seconds = number(test.get("seconds_per_epoch"))
    last, asked = max(run.epochs, default=-1), run.max_epochs
    if asked and run.epochs and last + 1 < asked:
        run.missing.insert(0, f"{last + 1} of {asked} epochs: still running, or stopped early.")
    if not any((folder / "checkpoints").glob("*.ckpt")):
        run.missing.append("No checkpoint in checkpoints/.")
    return run


def settings_of_comparison(folder: Path, budget: Budget | None = None) -> dict[str, Any]:
    """The content of settings.json, such as data, methods and seeds; empty if it cannot be read."""
    found: Any = read(folder / COMPARISON, json.loads, [], budget) if is_file(folder / COMPARISON) else None
    usable = isinstance(found, dict) and all(isinstance(found.get(name), list) for name in ("methods", "seeds"))
    return found if usable else {}


def is_run(folder: Path) -> bool:
    return os.path.isdir(folder) and any(is_file(folder / name) for name in FILES)


def _closest_run(folder: Path) -> Path | None:
    """The run that contains `folder`, or else one near it with a similar path."""
    above = next((parent for parent in list(folder.parents)[:2] if is_run(parent)), None)
    base = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), Path())
    runs = {} if above else {str(path): path for path in itertools.islice(_runs_below(base), 1000)}
    name = closest(str(folder), runs)
    return above or (runs[name] if name else next(iter(sorted(runs.values())), None))
