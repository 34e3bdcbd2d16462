"""The figure of a profile."""

from __future__ import annotations

from pathlib import Path

from iprm.files import replacing

from .profiler import Profile


def plot(path: Path, profile: Profile, title: str) -> None:
    """Writes one PNG: a horizontal bar per stage, in milliseconds per batch, with its share of the batch."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    milliseconds = [1000 * seconds for seconds in profile.stages.values()]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 0.5 + 0.35 * len(milliseconds)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(list(profile.stages), milliseconds, color="#08519c")
        axes.bar_label(bars, [f"{value / sum(milliseconds):.1%}" for value in milliseconds], padding=3)
        axes.invert_yaxis()
        axes.set(title=title, xlabel=f"ms of {sum(milliseconds):.2f} ms per batch")
        axes.margins(x=0.1)
        with replacing(path, "wb") as file:
            figure.savefig(file, dpi=150)
