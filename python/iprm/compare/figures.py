"""The picture of a comparison: accuracy by method, and λ and ω over the epochs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from .run import Result
from .table import ACCURACY, Summary


def plot(path: Path, summary: Summary, results: Sequence[Result], title: str) -> None:
    """Writes one PNG: on the left test accuracy by method (mean, standard deviation, a tick a seed); on the right, a
    line a method and quantity, λ and the mean ω of every epoch, averaged over seeds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4), layout="constrained")
        figure.suptitle(title)
        scores, course = figure.subplots(1, 2)
        _accuracy(scores, summary)
        _course(course, results)
        figure.savefig(path, dpi=150)


def _accuracy(axes, summary: Summary) -> None:  # type: ignore[no-untyped-def]
    values = [summary.columns[ACCURACY][method] for method in summary.methods]
    means = [statistics.fmean(v) for v in values]
    deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    for place, (mean, deviation, seeds) in enumerate(zip(means, deviations, values, strict=True)):
        axes.errorbar(mean, place, xerr=deviation, fmt="o", color="#08519c", capsize=3)
        axes.plot(seeds, [place] * len(seeds), "|", color="#6baed6", markersize=12, zorder=0)
    axes.set(xlabel="test accuracy, %", yticks=range(len(values)), yticklabels=summary.methods)
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()


def _course(axes, results: Sequence[Result]) -> None:  # type: ignore[no-untyped-def]
    weighted = [result for result in results if any(name.startswith(("weight", "strength")) for name in result.history[-1])]
    names = dict.fromkeys(n for r in weighted for n in r.history[-1] if n.startswith(("weight", "strength")))
    for method in dict.fromkeys(result.method for result in weighted):
        for name in names:
            runs = [[epoch[name] for epoch in r.history] for r in weighted if r.method == method and name in r.history[-1]]
            label = name.replace("weight", "λ").replace("strength", "ω").replace("_", " ")
            style = "-" if name.startswith("weight") else "--"
            axes.plot([statistics.fmean(step) for step in zip(*runs, strict=True)], style, label=f"{method}: {label}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel="λ (end of epoch), ω (mean of epoch)", ylim=(0, 1))
    if weighted:
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, "none of these methods weighs modalities", ha="center", transform=axes.transAxes)
