"""The table of a run: ratios first, then times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timing import Spread


def row_of(group: str, shape: tuple[int, ...], times: Mapping[str, Spread]) -> dict[str, Any]:
    """One comparison: how many times faster ours is than each other version, and all medians."""
    ours = times["ours"].p50
    faster = {name: spread.p50 / ours for name, spread in times.items() if name != "ours"}
    return {"group": group, "shape": shape, "faster": faster, "times": dict(times)}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += ["", f"{group}: ours is faster than ..., times in microseconds, median (20th to 80th percentile)"]
        for row in (row for row in rows if row["group"] == group):
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["faster"].items())
            times = ", ".join(f"{name} {s.p50:.0f} ({s.p20:.0f} to {s.p80:.0f})" for name, s in row["times"].items())
            lines.append(f"  {row['shape']!s:<20} {ratios}; {times}")
    return lines
