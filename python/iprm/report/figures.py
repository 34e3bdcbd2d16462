"""The figures of reports and comparisons, drawn by matplotlib: as SVG within a page, or as a file."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from iprm.compare.reading import Course
from iprm.compare.record import Angles, Record, Strength
from iprm.compare.runs import label
from iprm.compare.table import Comparison

#: The colours of style.css. In a page, its variables replace them, so that they follow the reader's colour scheme.
PALETTE = ("#0072b2", "#d55e00", "#05a960", "#3a16b8", "#7b828a", "#1b1f24")
SOFT, GRID, ON = "#57606a", "#e6e9ed", "#ffffff"
FAINT = PALETTE[4]
VARIABLES = {colour: f"var(--c{place})" for place, colour in enumerate(PALETTE)} | {SOFT: "var(--soft)", GRID: "var(--grid)"}
DASHES = ("-", (0, (4, 2)), (0, (1, 2)))
#: Most lines with a name in a figure of one run, or of a comparison; if there are more, the others are thin and grey.
MOST_LINES = 12
#: Most of these others.
MOST_OTHERS = 1000
#: Most points of a course: the smallest and the largest value of each of half as many parts. A figure is 270 pixels wide.
MOST_POINTS = 600
MOST_CELLS = 60  # classes; with more, a cell of the matrix would be smaller than 5 units
MOST_NUMBERED = 12  # classes; with more, a cell has no room for its count
MOST_BARS = 48
LONGEST_CLASS = 12  # letters of the name of a class beside an axis
WIDTH = 336  # units of an SVG, which a card shows at 1 to 1.2 pixels each
RC: dict[Any, Any] = dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top", "text.parse_math"), False)
RC |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), SOFT)
RC |= {
    "text.usetex": False,  # names may be anyone's
    "grid.color": GRID,
    "grid.linewidth": 1,
    "axes.grid": True,
    "axes.axisbelow": True,
    "font.size": 11.5,
    "axes.labelpad": 3,
}
RC |= {"xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 7, "svg.hashsalt": "iprm", "svg.fonttype": "none"}


class Line(NamedTuple):
    """A metric over the epochs.

    course: epoch -> value; colour: index in the palette; training: the metric in training, drawn thin; band: epoch -> range of
    the courses of which `course` is the mean.
    """

    name: str
    course: Mapping[int, float]
    colour: int
    training: Mapping[int, float] = {}
    band: Mapping[int, tuple[float, float]] = {}


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def style(place: int) -> dict[str, Any]:
    """Colour and dashes of the run or head at `place`."""
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": DASHES[min(2, place // len(PALETTE))]}


def svg(draw: Callable[[Axes], None], title: str, description: str = "", height: float = 204) -> Markup:
    """SVG of what `draw` draws on empty axes; the same figure gives the same bytes."""
    with mpl.rc_context(RC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's font lacks a letter; the browser has it
        figure = Figure((WIDTH / 72, height / 72), layout="constrained")
        draw(figure.add_subplot())
        for artist in figure.findobj():
            artist.set_clip_on(False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", dpi=72, transparent=True, metadata=nothing)
    _, _, body = file.getvalue().partition("<svg")
    _, _, body = body.partition(">")
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<g id=\"[^\"]*\">\s*</g>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[\w.]+">', "<g>", body)
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0].replace("\n", "")), body)
    body = re.sub(r"font-family: [^;\"]*; ", "", body)
    body = re.sub("|".join(VARIABLES), lambda colour: VARIABLES[colour[0]], body)
    head = Markup('<svg viewBox="0 0 {:g} {:g}" role="img"><title>{}</title><desc>{}</desc>')
    return head.format(WIDTH, height, title, description) + Markup(body)


def thinned(course: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """Epochs and values of a course; with more than `MOST_POINTS`, the smallest and the largest value of each of half as many
    parts of equal length."""
    epochs = sorted(course)
    if len(epochs) > MOST_POINTS:
        values = np.array([course[epoch] for epoch in epochs])
        starts = np.linspace(0, len(epochs), MOST_POINTS // 2, endpoint=False).astype(int)
        parts = np.split(values, starts[1:])
        low, high = (starts + [extreme(part) for part in parts] for extreme in (np.argmin, np.argmax))
        epochs = [epochs[place] for place in np.union1d(low, high)]
    return epochs, [course[epoch] for epoch in epochs]


def lines(
    axes: Axes, series: Sequence[Line], *, others: Sequence[Line] = (), percents: bool = False, weights: bool = False
) -> None:
    """Draws metrics over the epochs, `thinned`, the first on top, and `others` behind them, thin and grey. With `percents`, the
    axis is in percent and ends at 100 % or below; with `weights`, it is [0, 1] with a thin line at 0.5."""
    faint = [list(zip(*thinned(line.course), strict=True)) for line in others if line.course]
    axes.add_collection(LineCollection(faint, colors=FAINT, linewidths=0.6, alpha=0.5))
    for place, line in enumerate(reversed(series)):
        for course, options in ((line.training, {"linewidth": 1.1, "alpha": 0.55}), (line.course, {"linewidth": 2})):
            epochs, values = thinned(course)
            look = style(line.colour) | {"zorder": 3 + place / 1000, "marker": "o" if len(epochs) == 1 else "", **options}
            if epochs:
                axes.plot(epochs, values, label=line.name, **look)
        band = sorted({epoch for side in (0, 1) for epoch in thinned({e: ends[side] for e, ends in line.band.items()})[0]})
        low, high = ([line.band[epoch][side] for epoch in band] for side in (0, 1))
        axes.fill_between(band, low, high, color=PALETTE[line.colour % len(PALETTE)], alpha=0.15, linewidth=0)
    axes.autoscale_view()
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g} %" if percents else f"{y:.4g}"))
    if weights:
        axes.set_ylim(0, 1)
        axes.axhline(0.5, color=SOFT, linestyle=(0, (2, 3)), linewidth=1)
    elif percents and axes.get_ylim()[1] > 1:
        axes.set_ylim(top=1)


def ends(series: Sequence[Line], unit: Callable[[float], str] = "{:.3f}".format) -> str:
    """The description of `lines` for screen readers."""
    said = [(line.name, line.course or line.training) for line in series[:MOST_LINES] if line.course or line.training]
    return "; ".join(f"{name}: {unit(course[max(course)])} in epoch {max(course)}" for name, course in said)


def mean(courses: Sequence[Mapping[int, float]], name: str, colour: int, training: Sequence[Mapping[int, float]] = ()) -> Line:
    """Mean and range at each epoch over the courses that reach it."""

    def at_epochs(all_courses: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
        epochs = sorted({epoch for course in all_courses for epoch in course})
        return {epoch: [course[epoch] for course in all_courses if epoch in course] for epoch in epochs}

    if len(courses) <= 1 and len(training) <= 1:
        return Line(name, next(iter(courses), {}), colour, next(iter(training), {}))
    found, trained = at_epochs(courses), at_epochs(training)
    return Line(
        name,
        {epoch: statistics.fmean(values) for epoch, values in found.items()},
        colour,
        {epoch: statistics.fmean(values) for epoch, values in trained.items()},
        band={epoch: (min(values), max(values)) for epoch, values in found.items()} if len(courses) > 1 else {},
    )


def angles(axes: Axes, histograms: Sequence[Angles]) -> None:
    """Draws the distribution of θ of each pair over [0°, 180°], and its mean, dashed."""
    for place, histogram in enumerate(histograms):
        bins = len(histogram.counts)
        shares = [count / max(1, sum(histogram.counts)) for count in histogram.counts]
        edges = [180 * k / bins for k in range(bins + 1)]
        look = style(place)
        axes.stairs(shares, edges, fill=True, color=look["color"], alpha=0.18)
        axes.stairs(shares, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.5)
        if histogram.mean is not None:
            axes.axvline(math.degrees(histogram.mean), color=look["color"], linestyle=(0, (4, 4)), linewidth=1.5)
    axes.set(xlabel="angle θ", xticks=(0, 45, 90, 135, 180), xlim=(0, 180))
    axes.xaxis.set_major_formatter("{x:g}°")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g} %"))


def strength_by_class(axes: Axes, strength: Strength, name: Callable[[int], str] = str) -> None:
    """Draws ω by class: above the middle, the first modality of the pair is stronger, below it the second."""
    known = [(k, omega) for k, omega in enumerate(strength.omega[0]) if omega is not None]
    if len(known) > MOST_BARS:
        ordered = sorted(known, key=lambda pair: -pair[1])
        known = ordered[: MOST_BARS // 2] + ordered[-MOST_BARS // 2 :]
    colours = [PALETTE[0] if omega >= 0.5 else PALETTE[1] for _, omega in known]
    axes.bar(range(len(known)), [omega - 0.5 for _, omega in known], bottom=0.5, color=colours, width=0.8)
    axes.axhline(0.5, color=SOFT, linestyle=(0, (2, 3)), linewidth=1)
    labels = [short(name(k), LONGEST_CLASS) for k, _ in known]
    width = max(map(len, labels), default=1) * 7.5 + 6
    every = max(1, math.ceil(width * len(known) / (WIDTH - 60)))
    axes.set(xlabel="class", ylim=(0, 1), xlim=(-0.6, len(known) - 0.4), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.set_xticks(range(0, len(known), every), labels[::every])
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter("{x:g}")


def confusion(axes: Axes, record: Record) -> None:
    """Draws the confusion matrix: one row per true class, shaded by share of the row, the diagonal in another colour."""
    n = record.classes
    cells = [[(0.0, 0.0, 0.0, 0.0)] * n for _ in range(n)]
    for (target, prediction), count in record.confusion.items():
        if count:
            shade = 0.12 + 0.88 * math.sqrt(count / record.class_counts[target])
            cells[target][prediction] = to_rgba(PALETTE[0 if target == prediction else 1], shade)
            if n <= MOST_NUMBERED:
                colour = ON if shade > 0.6 else PALETTE[5]
                axes.text(prediction, target, str(count), ha="center", va="center", color=colour)
    axes.imshow(cells, interpolation="none", aspect="equal")
    every = max(1, math.ceil(n / 16))
    labels = [short(record.name(k), LONGEST_CLASS) for k in range(0, n, every)]
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(0, n, every), labels, rotation=90 if max(map(len, labels), default=0) > 2 else 0)
    axes.set_yticks(range(0, n, every), labels)
    axes.grid(visible=False)


def accuracies(axes: Axes, comparison: Comparison) -> None:
    """Draws test accuracy by method: mean, standard deviation, and one tick per seed."""
    values = {method: found for method in comparison.by_method if (found := comparison.accuracies(method))}
    for place, seeds in enumerate(values.values()):
        deviation = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
        axes.plot(seeds, [place] * len(seeds), "|", color=PALETTE[0], alpha=0.5, markersize=12)
        axes.errorbar(statistics.fmean(seeds), place, xerr=deviation, fmt="o", color=PALETTE[0], capsize=3)
    axes.set(xlabel="test accuracy, %", ylim=(max(1, len(values)) - 0.5, -0.5))
    axes.set_yticks(range(len(values)), [short(method) for method in values])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(visible=False, axis="y")


def short(name: str, most: int = 24) -> str:
    """The name with at most `most` letters: the middle of a longer one is left out, as many names differ at their end."""
    end = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - end]}…{name[-end:]}"


def divided(series: Sequence[Line]) -> tuple[list[Line], list[Line], str]:
    """The lines that a figure names, at most `MOST_LINES`; the others; and a note if there are any. The lines named are those
    that end farthest from 0.5, in their order: of many λ, those that prefer one modality."""
    if len(series) <= MOST_LINES:
        return list(series), [], ""
    distance = [abs(line.course[max(line.course)] - 0.5) if line.course else 0.0 for line in series]
    chosen = sorted(sorted(range(len(series)), key=lambda k: -distance[k])[:MOST_LINES])
    named = [series[k]._replace(colour=place) for place, k in enumerate(chosen)]
    others = [line for k, line in enumerate(series) if k not in chosen][:MOST_OTHERS]
    some = f" Grey: {MOST_OTHERS} others." if len(named) + len(others) < len(series) else ""
    return named, others, f"Named: the {MOST_LINES} of {len(series)} that end farthest from 0.5.{some}"


def measured(comparison: Comparison) -> list[Line]:
    """λ, ω and the other measures of every method, as means over the seeds with their range; without ω, if these are more than
    `MOST_LINES`."""
    found: dict[tuple[str, str], list[Course]] = {}
    for run in comparison.finished:
        for name, course in run.measures.items():
            found.setdefault((run.method, name), []).append(course)
    if len(found) > MOST_LINES:
        found = {key: courses for key, courses in found.items() if not key[1].startswith("strength")}
    names = [f"{short(method)}: {label(name, comparison.modalities, partial(short, most=12))}" for method, name in found]
    return [mean(courses, name, place) for place, (name, courses) in enumerate(zip(names, found.values(), strict=True))]


def comparison_figure(comparison: Comparison) -> Figure:
    """plot.png: test accuracy by method on the left, the measures of the methods over the epochs on the right."""
    with mpl.rc_context(RC | {"font.size": 9}):
        figure = Figure((11, max(4, 1 + 0.32 * len(comparison.by_method))), layout="constrained", dpi=150)
        figure.suptitle(comparison.title)
        left, right = figure.subplots(1, 2)
        accuracies(left, comparison)
        every = measured(comparison)
        series, others, note = divided(every)
        lines(right, series, others=others, weights=all(0 <= value <= 1 for line in every for value in line.course.values()))
        right.set_ylabel("λ at the end of an epoch, mean ω of an epoch")
        right.set_title(note, fontsize=8)
        if series:
            handles, names = right.get_legend_handles_labels()
            right.legend(handles[::-1], names[::-1], fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            right.text(0.5, 0.5, "none of these methods measures weights", ha="center", transform=right.transAxes)
        figure.draw_without_rendering()
    return figure
