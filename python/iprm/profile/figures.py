"""The picture of a profile: the stages of a step side by side, and those of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .result import Profile

#: A part narrower than this has no room for its percentage.
NARROWEST = 0.04


def plot(path: Path, profile: Profile, title: str) -> None:
    """Writes one PNG of two bars: the mean step in milliseconds, by stage, and an epoch in seconds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mean = sum(stage.mean for stage in profile.stages)
    step = [(stage.name, 1000 * stage.mean) for stage in profile.stages]
    parts = [
        ("training steps", profile.steps_of_epoch),
        ("validation", profile.validation),
        ("between epochs", profile.between),
    ]
    epoch = [(name, seconds) for name, seconds in parts if seconds is not None]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        figure.suptitle(title)
        above, below = figure.subplots(2, 1)
        _bar(above, step, [mpl.colormaps["tab20"](place) for place in range(len(step))], "ms")
        above.set(xlabel=f"a step: {1000 * mean:.2f} ms on average")
        _bar(below, epoch, ["#08519c", "#6baed6", "#bdd7e7"], "s")
        below.set(xlabel="an epoch, s")
        figure.savefig(path, dpi=150)


def _bar(axes, parts: Sequence[tuple[str, float]], colours: Sequence, unit: str) -> None:  # type: ignore[no-untyped-def]
    """One horizontal bar, with a legend that names every part, however narrow."""
    whole, left = sum(value for _, value in parts), 0.0
    for (name, value), colour in zip(parts, colours, strict=False):
        share = value / whole
        axes.barh(0, value, left=left, color=colour, edgecolor="white", linewidth=0.5, label=f"{name}: {value:.3g} {unit}")
        if share >= NARROWEST:
            dark = sum(weight * channel for weight, channel in zip((0.3, 0.6, 0.1), _rgb(colour), strict=True)) < 0.6
            axes.text(left + value / 2, 0, f"{share:.0%}", ha="center", va="center", color="white" if dark else "black")
        left += value
    axes.set(yticks=[], xlim=(0, whole))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _rgb(colour) -> tuple[float, float, float]:  # type: ignore[no-untyped-def]
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
