"""The report: runs to cards, cards to one HTML file that needs nothing beside it."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import charts, tables
from .charts import Series
from .runs import Run


class Key(NamedTuple):
    """An entry of a legend."""

    name: str
    style: str


class Card(NamedTuple):
    """A chart with its title, its legend, and a line that says how to read it."""

    title: str
    chart: Markup
    keys: Sequence[Key] = ()
    note: str = ""


def render(runs: Sequence[Run], version: str) -> str:
    """The whole file.

    Args:
        runs: one or more, with labels that differ.
        version: of this package, for the foot.
    """
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns = tables.summary(runs)
    return environment.get_template("report.html.jinja").render(
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs",
        subtitle=runs[0].folder if len(runs) == 1 else ", ".join(dict.fromkeys(f"{run.method} on {run.data}" for run in runs)),
        css=Markup(resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")),
        runs=runs,
        keys=[Key(run.label, charts.colour_class(place)) for place, run in enumerate(runs)],
        columns=columns,
        courses=_courses_of_one(runs[0]) if len(runs) == 1 else _courses_of_several(runs),
        measured=[_measured(run) for run in runs],
        confused=[_most_confused(run) for run in runs],
        settings=tables.compared([run.settings for run in runs]),
        environment=tables.environment(runs),
        version=version,
        made=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


BOTH = "Thick: validation. Thin: training."
WEIGHTS: dict[str, Any] = {"bounds": (0, 1), "reference": 0.5}  # of charts of λ and ω


def _courses_of_one(run: Run) -> list[Card]:
    """Accuracy, the loss, and λ and ω: heads and modalities are told apart by colour."""
    names = {"": "fusion"} | {f"_{head}": _head(head) for head in run.heads}
    lines = [_both(run, f"accuracy{suffix}", name, place) for place, (suffix, name) in enumerate(names.items())]
    note = "" if run.best_epoch is None else f" Dots: the best epoch, {run.best_epoch}."
    cards = [_card("Accuracy", lines, BOTH + note, unit=charts.percent)]
    cards.append(Card("Loss", charts.lines("Loss", [_both(run, "loss", "loss", 0)]), note=BOTH + note))
    for pair in run.pairs:
        title = "λ and ω" if len(run.pairs) == 1 else f"λ and ω: {pair.name}"
        first, second = pair.strengths
        lines = [
            Series(f"ω {pair.first}", first, 0),
            Series(f"ω {pair.second}", second, 1),
            Series("λ", pair.weight, charts.COLOURS - 1),
        ]
        cards.append(_card(title, lines, f"λ weighs {pair.first} in the probe, and follows its strength ω.", **WEIGHTS))
    return cards


def _courses_of_several(runs: Sequence[Run]) -> list[Card]:
    """The same, a card a quantity: runs are told apart by colour."""
    cards = [_by_run("Accuracy of the fusion", runs, "accuracy", unit=charts.percent)]
    for head in tables.heads_of(runs):
        cards.append(_by_run(f"Accuracy of the {_head(head)}", runs, f"accuracy_{head}", unit=charts.percent))
    cards.append(_by_run("Loss", runs, "loss"))
    for name in dict.fromkeys(pair.name for run in runs for pair in run.pairs):
        found = [(place, run, pair) for place, run in enumerate(runs) for pair in run.pairs if pair.name == name]
        against = f"of {found[0][2].first}, against {found[0][2].second}"
        weights = [Series(run.label, pair.weight, place) for place, run, pair in found]
        strengths = [Series(run.label, pair.strengths[0], place) for place, run, pair in found]
        for title, lines in ((f"λ {against}", weights), (f"ω {against}", strengths)):
            cards.append(Card(title, charts.lines(title, lines, **WEIGHTS), note=_without(runs, lines)))
    return cards


def _head(name: str) -> str:
    return "mixture" if name == "mix" else f"{name} head"


def _both(run: Run, metric: str, name: str, place: int) -> Series:
    """The course on validation and in training."""
    validation, training = (run.courses.get(f"{split}_{metric}", {}) for split in ("val", "train"))
    return Series(name, validation, place, training, run.best_epoch)


def _by_run(title: str, runs: Sequence[Run], metric: str, **options: Any) -> Card:
    series = [_both(run, metric, run.label, place) for place, run in enumerate(runs)]
    note = f"{BOTH} Dots: the best epochs. {_without(runs, series)}"
    return Card(title, charts.lines(title, series, **options), note=note.rstrip())


def _without(runs: Sequence[Run], series: Sequence[Series]) -> str:
    """The runs that a chart does not show."""
    shown = {line.name for line in series if line.course or line.training}
    absent = [run.label for run in runs if run.label not in shown]
    if not absent or len(absent) == len(runs):
        return ""
    return f"Not in: {', '.join(absent)}." if len(absent) <= 2 else f"Not in {len(absent)} of the runs."


def _card(title: str, series: Sequence[Series], note: str = "", **options: Any) -> Card:
    keys = [Key(line.name, charts.colour_class(line.colour)) for line in series if line.course or line.training]
    return Card(title, charts.lines(title, series, **options), keys, note)


def _measured(run: Run) -> list[Card]:
    """Confusion, angles and strength by class, of what the run has recorded."""
    record = run.record
    if record is None:
        return []
    cards = []
    if record.classes <= charts.MOST_CELLS and record.rows:
        cards.append(Card("Confusion matrix", charts.confusion(record), note=_worst(run)))
    if record.angles:
        keys = [Key(" × ".join(a.pair), charts.colour_class(place)) for place, a in enumerate(record.angles)]
        means = [f"{math.degrees(a.mean):.1f}°" for a in record.angles if a.mean is not None]
        undirected = sum(a.undirected for a in record.angles)
        note = f"Mean {', '.join(means)} (dashed)." if means else ""
        note += f" {undirected} of the angles are none: a feature vector is zero." if undirected else ""
        cards.append(Card("Angle between the modalities", charts.angles(record.angles), keys, note))
    for strength in record.strength:
        first, second = strength.pair
        keys = [Key(f"{first} stronger", "c0"), Key(f"{second} stronger", "c1")]
        some = f" The {charts.MOST_BARS // 2} classes at either end." if record.classes > charts.MOST_BARS else ""
        note = f"1: all weight on {first}. 0: on {second}.{some}"
        cards.append(
            Card(f"ω by class: {first} × {second}", charts.strength_by_class(strength, record.class_counts), keys, note)
        )
    return cards


def _worst(run: Run) -> str:
    confused = [f"{target} as {prediction} ({n} of {of})" for target, prediction, n, of in tables.most_confused(run, 3)]
    return f"Most often taken for another: {', '.join(confused)}." if confused else "No sample is taken for another class."


def _most_confused(run: Run) -> list[tuple[int, int, int, int]]:
    """In place of a matrix too large to be seen."""
    large = run.record is not None and run.record.classes > charts.MOST_CELLS
    return tables.most_confused(run, 20) if large else []
