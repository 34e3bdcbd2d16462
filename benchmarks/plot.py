"""Plots results: speed-ups by shape and by batch size, shares of the copy bandwidth, and the time of an epoch.

usage: plot.py RESULTS.json... PICTURE.png
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table import OURS

Rows = list[dict[str, Any]]


def by_group(paths: list[Path]) -> dict[str, Rows]:
    """group -> what its benchmarks recorded. Files that do not exist are skipped."""
    groups: dict[str, Rows] = {}
    for path in paths:
        for entry in json.loads(path.read_text())["benchmarks"] if path.is_file() else []:
            groups.setdefault(entry["group"], []).append(entry["extra_info"])
    return groups


def ratios_of(rows: Rows) -> dict[str, list[float]]:
    """Pair of versions -> how many times as fast the first is, by row."""
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    mine = [name for name in names if name in OURS]

    def ratio(times: dict[str, dict[str, float]], one: str, other: str) -> float:
        return times[other]["p50"] / times[one]["p50"] if one in times and other in times else math.nan  # not at every size

    return {
        f"{one} than {other}": [ratio(row["times"], one, other) for row in rows]
        for one in mine
        for other in names
        if other not in mine
    }


def draw_speedups(axes: Axes, group: str, rows: Rows) -> None:
    ratios = ratios_of(rows)
    width = 0.8 / len(ratios)
    for place, (name, values) in enumerate(ratios.items()):
        at = [index + (place - (len(ratios) - 1) / 2) * width for index in range(len(rows))]
        bars = axes.bar(at, values, width=0.9 * width, label=name)
        axes.bar_label(bars, ["" if math.isnan(value) else f"{value:.1f}" for value in values], fontsize=6)
    axes.axhline(1, color="black", linewidth=0.8)
    labels = ["\n".join(["×".join(map(str, r["shape"][:3])), *map(str, r["shape"][3:])]) for r in rows]
    axes.set(title=group, ylabel="times faster")
    axes.set_xticks(range(len(rows)), labels)


def draw_by_batch(axes: Axes, group: str, rows: Rows) -> None:
    for name, values in ratios_of(rows).items():
        axes.plot([row["shape"][0] for row in rows], values, marker="o", label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(title=f"{group}, 512 × 31", xscale="log", xlabel="batch", ylabel="times faster")


def draw_bandwidth(axes: Axes, group: str, rows: Rows) -> None:
    for kind in sorted({(row["operator"], row["dtype"], name) for row in rows for name in row["fractions"]}):
        chosen = [row for row in rows if (row["operator"], row["dtype"]) == kind[:2] and kind[2] in row["fractions"]]
        megabytes = [row["shape"][0] * row["shape"][1] * (4 if row["dtype"] == "fp32" else 2) / 2**20 for row in chosen]
        axes.plot(megabytes, [row["fractions"][kind[2]] for row in chosen], marker="o", label=" ".join(kind))
    axes.set(title=group, xscale="log", xlabel="MiB of one matrix", ylabel="share", ylim=(0, 1.1))


def draw_epoch(axes: Axes, group: str, rows: Rows) -> None:
    seconds, ratios = rows[0]["seconds"], rows[0]["ratios"]
    means, deviations = zip(*seconds.values(), strict=True)
    bars = axes.bar(list(seconds), means, yerr=deviations, capsize=4)
    axes.bar_label(bars, [f"×{ratios[name]:.3f}" for name in seconds], label_type="center", color="white", fontsize=8)
    axes.set(title=group, ylabel="seconds")


DRAWN: dict[str, Callable[[Axes, str, Rows], None]] = {
    "head step by batch": draw_by_batch,
    "share of copy bandwidth": draw_bandwidth,
    "an epoch of CREMA-D's size": draw_epoch,
}
NOT_DRAWN = (
    "launches a step",
    "memory beyond gradients",
    "the trainer over a bare loop",
    "an epoch of iprm over one of concat",
    "head step by instruction set",
)


def main(*paths: Path) -> None:
    *results, picture = paths
    groups = {group: rows for group, rows in by_group(results).items() if group not in NOT_DRAWN}
    if not groups:
        raise SystemExit("nothing to draw: none of the files holds a comparison")
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (group, rows) in zip(panels, groups.items(), strict=False):
        DRAWN.get(group, draw_speedups)(axes, group, rows)
        axes.tick_params(labelsize=7)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
