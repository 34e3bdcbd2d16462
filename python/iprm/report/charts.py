"""The charts of a report, as SVG of 336 units in width, which a card shows at 1 to 1.2 pixels a unit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from .record import Angles, Record, Strength
from .svg import element, group, picture, text, ticks

WIDTH = 336
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 34
HEIGHT = 204
MOST_CELLS = 60  # classes: above it a cell of the matrix would be smaller than 5 units
MOST_NUMBERED = 12  # classes: up to it a cell has room for its count
MOST_BARS = 48

COLOURS = 6  # of the palette in style.css; then the same ones dashed


class Series(NamedTuple):
    """A line of a chart: epoch -> value, its place in the palette, the same of training, drawn thin, and an epoch to mark."""

    name: str
    course: Mapping[int, float]
    colour: int
    training: Mapping[int, float] = {}
    marked: int | None = None


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def share(value: float) -> str:
    return f"{value:.3f}"


def colour_class(place: int) -> str:
    """The classes of style.css for the run or head at `place`."""
    return f"c{place % COLOURS} d{min(2, place // COLOURS)}"


def lines(
    label: str,
    series: Sequence[Series],
    *,
    unit: Callable[[float], str] = share,
    bounds: tuple[float, float] | None = None,
    reference: float | None = None,
) -> Markup:
    """Courses over the epochs. Each epoch has a column that tells all values when it is pointed at.

    Args:
        label: what a screen reader says of it.
        series: the first is drawn on top.
        unit: how a value is written.
        bounds: of the vertical axis; None takes them from the values.
        reference: a value to draw a thin line at.
    """
    epochs = sorted({epoch for s in series for epoch in (*s.course, *s.training)})
    if not epochs:
        return element("p", "No epoch yet.", class_="empty")
    values = [value for s in series for value in (*s.course.values(), *s.training.values())]
    marks = ticks(*bounds) if bounds else ticks(min(values), max(values))
    if unit is percent and marks[-1] > 1:  # there is nothing above 100 %
        marks = [t for t in marks if t < 1] + [1.0] if marks[0] < 1 else [0.0, 0.5, 1.0]
    low, high = marks[0], marks[-1]
    first, last = epochs[0], epochs[-1]

    def x(epoch: float) -> float:
        if first == last:
            return (LEFT + WIDTH - RIGHT) / 2
        return LEFT + 6 + (epoch - first) / (last - first) * (WIDTH - RIGHT - LEFT - 12)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def short(value: float) -> str:
        return f"{100 * value:.4g} %" if unit is percent else f"{value:.4g}"

    axes = [*_vertical(marks, y, short), *_horizontal([t for t in ticks(first, last, 6, whole=True) if first <= t <= last], x)]
    if reference is not None:
        axes.append(element("path", d=f"M{LEFT} {y(reference):.1f}H{WIDTH - RIGHT}", class_="ref"))
    thin = [_line(s.training, f"{colour_class(s.colour)} thin", None, x, y) for s in reversed(series) if s.training]
    thick = [_line(s.course, colour_class(s.colour), s.marked, x, y) for s in reversed(series) if s.course]
    return picture(WIDTH, HEIGHT, label, *axes, *thin, *thick, _columns(series, epochs, x, unit))


def _vertical(marks: Sequence[float], y: Callable[[float], float], short: Callable[[float], str]) -> list[Markup]:
    grid = "".join(f"M{LEFT} {y(t):.1f}H{WIDTH - RIGHT}" for t in marks)
    return [element("path", d=grid, class_="grid"), *(text(LEFT - 5, y(t) + 4, short(t), "end") for t in marks)]


def _horizontal(marks: Sequence[float], x: Callable[[float], float], title: str = "epoch") -> list[Markup]:
    below = HEIGHT - BOTTOM
    return [
        *(text(x(t), below + 15, f"{t:g}", "middle") for t in marks),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, title, "middle", class_="axis"),
    ]


def _line(
    course: Mapping[int, float], style: str, marked: int | None, x: Callable[[float], float], y: Callable[[float], float]
) -> Markup:
    points = [f"{x(epoch):.1f} {y(value):.1f}" for epoch, value in sorted(course.items())]
    parts = [element("path", d="M" + "L".join(points))] if len(points) > 1 else []
    dot = next(iter(course)) if len(points) == 1 else marked
    if dot is not None and dot in course:
        parts.append(element("circle", cx=x(dot), cy=y(course[dot]), r=3.5))
    return group(parts, class_=f"line {style}")


def _columns(
    series: Sequence[Series], epochs: Sequence[int], x: Callable[[float], float], unit: Callable[[float], str]
) -> Markup:
    def said(s: Series, epoch: int) -> str:
        training = f"training {unit(s.training[epoch])}" if epoch in s.training else ""
        if epoch not in s.course:
            return f"{s.name}: {training}"
        return f"{s.name}: {unit(s.course[epoch])}" + (f" ({training})" if training else "")

    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in itertools.pairwise(epochs)), WIDTH - RIGHT]
    columns = []
    for epoch, (left, right) in zip(epochs, itertools.pairwise(edges), strict=True):
        known = [said(s, epoch) for s in series if epoch in s.course or epoch in s.training]
        title = element("title", "\n".join([f"epoch {epoch}", *known]))
        columns.append(element("rect", title, x=left, y=TOP, width=float(right - left), height=HEIGHT - TOP - BOTTOM))
    return group(columns, class_="hit")


def angles(histograms: Sequence[Angles]) -> Markup:
    """How θ of each pair is spread over [0°, 180°], and its mean."""
    height, below = 188, 188 - BOTTOM
    top = max((max(h.counts, default=0) / max(1, sum(h.counts)) for h in histograms), default=0) or 1.0
    marks = ticks(0, top, 4)
    bins = len(histograms[0].counts)
    step = (WIDTH - RIGHT - LEFT) / bins

    def y(value: float) -> float:
        return below - value / marks[-1] * (below - TOP)

    def x(degrees: float) -> float:
        return LEFT + degrees / 180 * (WIDTH - RIGHT - LEFT)

    parts = _vertical(marks, y, lambda value: f"{100 * value:.3g} %")
    for place, histogram in enumerate(histograms):
        total = max(1, sum(histogram.counts))
        outline = f"M{LEFT} {below}"
        for k, count in enumerate(histogram.counts):
            outline += f"V{y(count / total):.1f}H{LEFT + (k + 1) * step:.1f}"
        parts.append(group([element("path", d=f"{outline}V{below}Z")], class_=f"area {colour_class(place)}"))
        if histogram.mean is not None:
            mean = x(math.degrees(histogram.mean))
            parts.append(group([element("path", d=f"M{mean:.1f} {TOP}V{below}")], class_=f"line mean {colour_class(place)}"))
    columns = []
    for k in range(bins):
        said = [f"{a} × {b}: {h.counts[k]}" for h in histograms for a, b in [h.pair]]
        title = element("title", "\n".join([f"{180 * k / bins:g}° to {180 * (k + 1) / bins:g}°", *said]))
        columns.append(element("rect", title, x=LEFT + k * step, y=TOP, width=step, height=below - TOP))
    scale = [text(x(d), below + 15, f"{d}°", "end" if d == 180 else "middle") for d in (0, 45, 90, 135, 180)]
    named = text((LEFT + WIDTH - RIGHT) / 2, height - 3, "angle θ", "middle", class_="axis")
    return picture(WIDTH, height, "distribution of the angle θ", *parts, *scale, named, group(columns, class_="hit"))


def strength_by_class(strength: Strength, counts: Sequence[int]) -> Markup:
    """ω of a pair's modalities by class: above the middle the first is the stronger, below it the second."""
    first, second = strength.pair
    known = [(k, omega) for k, omega in enumerate(strength.omega[0]) if omega is not None]
    if not known:
        return element("p", "No class has a sample.", class_="empty")
    if len(known) > MOST_BARS:
        ordered = sorted(known, key=lambda pair: -pair[1])
        known = ordered[: MOST_BARS // 2] + ordered[-MOST_BARS // 2 :]
    height, below = 188, 188 - BOTTOM
    step = (WIDTH - RIGHT - LEFT) / len(known)

    def y(value: float) -> float:
        return TOP + (1 - value) * (below - TOP)

    parts = _vertical([0, 0.25, 0.5, 0.75, 1], y, lambda value: f"{value:g}")
    bars: list[Markup] = []
    room = max(1, math.ceil((max(len(str(k)) for k, _ in known) * 7.5 + 6) / step))  # classes to a label
    for place, (k, omega) in enumerate(known):
        left, gap = LEFT + place * step, min(3.0, step / 5)
        title = element("title", f"class {k} ({counts[k]} samples)\nω {first}: {share(omega)}\nω {second}: {share(1 - omega)}")
        top, bottom = min(y(omega), y(0.5)), max(y(omega), y(0.5))
        box = {"x": left + gap / 2, "width": step - gap, "y": top, "height": max(1.0, bottom - top)}
        bars.append(element("rect", title, **box, class_="c0" if omega >= 0.5 else "c1"))
        if place % room == 0:
            parts.append(text(left + step / 2, below + 15, k, "middle"))
    middle = element("path", d=f"M{LEFT} {y(0.5):.1f}H{WIDTH - RIGHT}", class_="ref")
    named = text((LEFT + WIDTH - RIGHT) / 2, height - 3, "class", "middle", class_="axis")
    return picture(WIDTH, height, f"ω of {first} by class", *parts, group(bars, class_="bars"), middle, named)


def confusion(record: Record) -> Markup:
    """The matrix: a row a true class, shaded by its share of the row; the diagonal in another colour."""
    n = record.classes
    left, bottom = 44, 36
    cell = min(44.0, (WIDTH - left - RIGHT) / n)
    side = cell * n
    rows: dict[int, list[Markup]] = {}
    numbers = []
    for (target, prediction), count in sorted(record.confusion.items()):
        part = count / record.class_counts[target]
        shade = round(0.12 + 0.88 * math.sqrt(part), 2)
        title = element("title", f"{target} as {prediction}: {count} of {record.class_counts[target]} ({percent(part)})")
        kind = "right" if target == prediction else None
        box = element("rect", title, x=prediction * cell, class_=kind, fill_opacity=str(shade))
        rows.setdefault(target, []).append(box)
        if n <= MOST_NUMBERED:
            middle = left + (prediction + 0.5) * cell, TOP + (target + 0.5) * cell + 4
            numbers.append(text(*middle, count, "middle", class_="on" if shade > 0.6 else None))
    cells = [group(row, transform=f"translate({left} {TOP + target * cell:.1f})") for target, row in rows.items()]
    every = max(1, math.ceil(15 / cell))
    across = max(every, math.ceil((len(str(n - 1)) * 7.5 + 4) / cell))
    labels = [text(left - 5, TOP + (k + 0.5) * cell + 4, k, "end") for k in range(0, n, every)]
    labels += [text(left + (k + 0.5) * cell, TOP + side + 15, k, "middle") for k in range(0, n, across)]
    names = [
        text(left + side / 2, TOP + side + 32, "predicted class", "middle", class_="axis"),
        text(0, 0, "true class", "middle", class_="axis", transform=f"translate(11 {TOP + side / 2:.1f}) rotate(-90)"),
    ]
    frame = element("rect", x=float(left), y=float(TOP), width=side, height=side, class_="frame")
    return picture(
        WIDTH,
        round(TOP + side + bottom),
        "confusion matrix",
        frame,
        group(cells, class_="cells", style=f"--side:{cell - (1 if cell > 8 else 0):.2f}px"),
        group(numbers, class_="numbers"),
        *labels,
        *names,
    )
