"""Draws a run: how many times faster ours is than each other version, by operator and shape.

usage: plot.py RESULTS.json PICTURE.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def comparisons(path: Path) -> dict[str, list[dict[str, Any]]]:
    """group -> its comparisons, each with "shape" and "times"."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(path.read_text())["benchmarks"]:
        groups.setdefault(entry["group"], []).append(entry["extra_info"])
    return groups


def draw(axes: Axes, group: str, rows: list[dict[str, Any]]) -> None:
    others = [name for name in rows[0]["times"] if name != "ours"]
    for place, name in enumerate(others):
        ratios = [row["times"][name]["p50"] / row["times"]["ours"]["p50"] for row in rows]
        at = [index + (place - (len(others) - 1) / 2) * 0.25 for index in range(len(rows))]
        bars = axes.bar(at, ratios, width=0.22, label=f"than {name}")
        axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set(title=group, xticks=range(len(rows)), xticklabels=["×".join(map(str, r["shape"])) for r in rows])
    axes.legend(fontsize=7)


def main(results: Path, picture: Path) -> None:
    groups = comparisons(results)
    figure = Figure(figsize=(4.5 * len(groups), 3.6), layout="constrained")
    for axes, (group, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        draw(axes, group, rows)
    figure.supylabel("times faster, forward + backward")
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
