"""SVG elements, scales and ticks. Whatever text goes in is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup, escape


def element(name: str, *children: object, **attributes: object) -> Markup:
    """``<name attributes>children</name>``; ``class_`` is class, ``stroke_width`` stroke-width; None leaves one out."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.strip("_").replace("_", "-"), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inner)


def _value(value: object) -> object:
    """Coordinates to a tenth of a unit, which is a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def group(children: Iterable[object], **attributes: object) -> Markup:
    return element("g", *children, **attributes)


def text(x: float, y: float, content: object, anchor: str = "start", **attributes: object) -> Markup:
    return element("text", content, x=float(x), y=float(y), text_anchor=None if anchor == "start" else anchor, **attributes)


def picture(width: float, height: float, label: str, *children: object) -> Markup:
    """The whole image, which scales to the width of its place."""
    return element("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers, two at least, from at or below `low` to at or above `high`; `whole` ones for epochs."""
    size = max(abs(low), abs(high))
    span = high - low
    if span <= 1e-9 * size or span < 1e-300:
        span = size if size > 1e-300 else 1.0
    raw = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, max(last, first + 1) + 1)]
