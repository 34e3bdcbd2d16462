"""The page of a report: cards of figures and tables, in one self-contained HTML file."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Sequence
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from iprm.compare.reading import MOST_BYTES, text
from iprm.compare.record import Record
from iprm.compare.runs import SYMBOLS, Run, label
from iprm.compare.table import Comparison, Table, comparisons, one_sided_notes

from . import figures, tables
from .figures import Line, percent

#: Largest numbers of pairs (of one run), and of heads (of several runs), measures and kinds of measures, that have figures.
MOST_PAIRS, MOST_MEASURES = 6, 12
#: Most comparisons, and groups of runs, that have figures: one takes up to 0.1 s on one Zen 4 core, and a group up to 14.
MOST_COMPARISONS, MOST_GROUPS = 20, 40
BOTH = "Thick: validation. Thin: training."


class Key(NamedTuple):
    """An entry of a legend: its text, and its index in the palette."""

    name: str
    place: int


class Card(NamedTuple):
    """A figure or a table with a title, a legend, and a note that explains it."""

    title: str
    chart: Markup
    keys: Sequence[Key] = ()
    note: str = ""
    table: Table | None = None


class Group(NamedTuple):
    """Runs that differ only in their seed, shown as one line in a figure."""

    label: str
    runs: list[Run]


def render(runs: Sequence[Run], version: str) -> str:
    """The HTML of the report.

    Args:
        runs: one or more, with labels that differ.
        version: of this package, for the footer.
    """
    loader = PackageLoader(__package__, "")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    groups = grouped(runs)
    compared = list(itertools.islice(comparisons(runs), MOST_COMPARISONS)) if len(runs) > 1 else []
    place = {id(run): place for place, group in enumerate(groups) for run in group.runs}
    titles = ", ".join(comparison.title for comparison in compared) or f"{len(runs)} runs"
    html = page.get_template("report.html.jinja").render(
        title=runs[0].label if len(runs) == 1 else titles,
        subtitle=runs[0].folder if len(runs) == 1 else ", ".join(dict.fromkeys(f"{run.method} on {run.data}" for run in runs)),
        css=Markup(resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")),
        runs=runs,
        places=[place[id(run)] for run in runs],
        keys=[Key(group.label, place) for place, group in enumerate(groups)],
        comparisons=[(comparison, _compared(comparison)) for comparison in compared],
        notes=list(one_sided_notes([run for run in runs if run.folder.parent.parent not in [it.folder for it in compared]])),
        summary=tables.summary(runs),
        courses=_courses_of_one(runs[0]) if len(runs) == 1 else _courses_of_several(groups),
        shown=[(group.runs[0], _measured(group.runs[0])) for group in groups[:MOST_GROUPS]],
        groups=len(groups),
        hidden=len(runs) - len(groups[:MOST_GROUPS]),
        folded=tables.folded(runs),
        version=version,
        made=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    return html.encode("utf-8", "backslashreplace").decode()  # a folder's name may not be UTF-8


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups runs that differ only in their seed."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        others = {
            name: text(value, MOST_BYTES)
            for name, value in run.settings.items()
            if not name.endswith(("seed", "seed_everything"))
        }
        found.setdefault(str(sorted(others.items())) if others else str(run.folder), []).append(run)
    methods = [group[0].method for group in found.values()]

    def name(group: list[Run]) -> str:
        return group[0].label if len(group) == 1 or methods.count(group[0].method) > 1 else group[0].method

    return [Group(name(group), group) for group in found.values()]


def _compared(comparison: Comparison) -> list[Card]:
    if not comparison.finished:
        return []
    title, rows = "Test accuracy by method", len(comparison.by_method)
    said = "; ".join(f"{row[0]}: {row[1]} %" for row in comparison.tables[0].rows)
    chart = figures.svg(partial(figures.accuracies, comparison=comparison), title, said, 50 + 22 * max(4, rows))
    return [Card(title, chart, note="Dot: mean. Bar: standard deviation. Tick: one seed.")]


def _lines(title: str, series: Sequence[Line], note: str = "", *, legend: bool = True, **options: Any) -> Card:
    shown = [line for line in series if line.course or line.training]
    if not shown:
        return Card(title, Markup('<p class="empty">No epoch yet.</p>'))
    longest = max(len(course) for line in (*shown, *options.get("others", ())) for course in (line.course, line.training))
    if longest > figures.MOST_POINTS:
        parts = figures.MOST_POINTS // 2
        note += f" Thinned: the smallest and the largest value of each of {parts} parts of {longest} epochs."
    said = figures.ends(shown, percent if options.get("percents") else "{:.3f}".format)
    chart = figures.svg(partial(figures.lines, series=shown, **options), title, said)
    return Card(title, chart, [Key(line.name, line.colour) for line in shown] if legend else (), note.strip())


def _courses_of_one(run: Run) -> list[Card]:
    """Accuracy, loss, and measures by kind; colours distinguish heads, modalities and pairs."""
    names = {"accuracy": "fusion"} | {f"accuracy_{head}": tables.head_name(head) for head in run.heads}
    series = [_split(Group(name, [run]), place, metric) for place, (metric, name) in enumerate(names.items())]
    cards = [_lines("Accuracy", series, BOTH, percents=True)]
    cards += [_lines("Loss", [_split(Group("loss", [run]), 0, "loss")], BOTH, legend=False)]
    kinds: dict[str, list[str]] = {}
    for measure in run.measures:
        kinds.setdefault(measure.partition("_")[0], []).append(measure)
    if "weight" in run.measures:  # of two modalities
        kinds = {"λ and ω": [*kinds.pop("strength", []), *kinds.pop("weight")]} | kinds
    drawn, more = _first(list(kinds.items()), MOST_MEASURES)
    cards[-1] = cards[-1]._replace(note=f"{cards[-1].note} {more}".strip()) if more else cards[-1]
    for kind, measures in drawn:
        series = [Line(label(name, run.heads), run.measures[name], place) for place, name in enumerate(measures)]
        note = "λ weighs the first modality in the probe, and follows its strength ω. " if kind in ("λ and ω", "weight") else ""
        named, others, more = figures.divided(series)
        weights = kind == "λ and ω" or kind in SYMBOLS
        cards.append(_lines(SYMBOLS.get(kind, kind), named, note + more, others=others, weights=weights))
    return cards


def _courses_of_several(groups: Sequence[Group]) -> list[Card]:
    """The same metrics of several groups, one card per metric; colours distinguish the groups."""
    groups, some = _first(groups, MOST_GROUPS)
    runs = [run for group in groups for run in group.runs]
    heads = tables.heads_of(runs)
    metrics = {"Accuracy of the fusion": "accuracy"}
    few, more = _first(heads, MOST_MEASURES)
    more = " ".join(filter(None, (more, some.replace("of", "configurations of"))))
    metrics |= {f"Accuracy of the {tables.head_name(head)}": f"accuracy_{head}" for head in few} | {"Loss": "loss"}
    cards = []
    for title, metric in metrics.items():
        series = [_split(group, place, metric) for place, group in enumerate(groups)]
        note = f"{BOTH} {more}" if len(groups) == len(runs) else f"{BOTH} Mean and range over the seeds. {more}"
        cards.append(_lines(title, series, note, legend=False, percents=metric != "loss"))
    every = list(dict.fromkeys(name for run in runs for name in run.measures))
    if len(every) > MOST_MEASURES:
        every.sort(key=lambda name: not name.startswith("weight"))  # λ first
    names, note = _first(every, MOST_MEASURES)
    for name in names:
        series = [_of(group, place, name) for place, group in enumerate(groups)]
        cards.append(_lines(label(name, heads), series, note, legend=False, weights=name.partition("_")[0] in SYMBOLS))
    return cards


def _split(group: Group, place: int, metric: str) -> Line:
    """A metric on validation and in training."""
    return _of(group, place, f"val_{metric}", f"train_{metric}")


def _of(group: Group, place: int, metric: str, training: str = "") -> Line:
    courses, trained = ([run.courses[name] for run in group.runs if name in run.courses] for name in (metric, training))
    return figures.mean(courses, group.label, place, trained)


def _measured(run: Run) -> list[Card]:
    """Confusion, angles and strength by class, if the run has recorded them."""
    return [*_confusion(run.record), *_angles(run.record), *_strengths(run.record)] if run.record else []


def _confusion(record: Record) -> list[Card]:
    if not record.rows:
        return []
    if record.classes > figures.MOST_CELLS:
        confused = Table("", ["true", "predicted as", "samples", "of"], tables.most_confused(record, 20))
        return [Card("Most confused classes", Markup(), table=confused)]
    title, worst = "Confusion matrix", [f"{t} as {p} ({n} of {of})" for t, p, n, of in tables.most_confused(record, 3)]
    note = f"Most often confused: {', '.join(worst)}." if worst else "All samples are classified correctly."
    return [Card(title, figures.svg(partial(figures.confusion, record=record), title, note, 330), note=note)]


def _angles(record: Record) -> list[Card]:
    chosen, more = _first(record.angles, MOST_PAIRS)
    if not chosen:
        return []
    means = ", ".join(f"{math.degrees(pair.mean):.1f}°" for pair in chosen if pair.mean is not None)
    note = (f"Mean {means} (dashed). " if means else "") + more
    title, keys = "Angle between the modalities", [Key(" × ".join(pair.pair), place) for place, pair in enumerate(chosen)]
    return [Card(title, figures.svg(partial(figures.angles, histograms=chosen), title, note, 188), keys, note.strip())]


def _strengths(record: Record) -> list[Card]:
    some = f" Shown: the {figures.MOST_BARS // 2} classes at each end." if record.classes > figures.MOST_BARS else ""
    chosen, more = _first(record.strength, MOST_PAIRS)
    cards = []
    for strength in chosen:
        first, second = strength.pair
        title, keys = f"ω by class: {first} × {second}", [Key(f"{first} stronger", 0), Key(f"{second} stronger", 1)]
        said = f"1: all weight on {first}. 0: on {second}.{some} {more}".strip()
        draw = partial(figures.strength_by_class, strength=strength, name=record.name)
        chart = figures.svg(draw, title, said, 188)
        cards.append(Card(title, chart, keys, said))
    return cards


def _first(found: Sequence[Any], most: int) -> tuple[Sequence[Any], str]:
    """The first of `found`, at most `most`, and a note if there are more."""
    return found[:most], f"Shown: the first {most} of {len(found)}." if len(found) > most else ""
