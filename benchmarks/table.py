"""The table of a run: ratios first, then times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timing import Spread

#: The names of our versions: "ours" for the default backend of the device, or the backend.
OURS = ("ours", "triton", "cuda")


def row_of(group: str, shape: tuple[Any, ...], times: Mapping[str, Spread]) -> dict[str, Any]:
    """One comparison: how many times as fast each of ours is as each other version, and all times."""
    faster = {
        mine: {name: spread.p50 / times[mine].p50 for name, spread in times.items() if name not in OURS}
        for mine in times
        if mine in OURS
    }
    return {"group": group, "shape": shape, "faster": faster, "times": dict(times)}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += ["", f"{group}: ours is faster than ..., times in microseconds, median (20th to 80th percentile)"]
        for row in (row for row in rows if row["group"] == group):
            shape = "×".join(map(str, row["shape"]))
            for mine, faster in row["faster"].items():
                ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in faster.items())
                lines.append(f"  {shape:<24} {mine + ':' if mine != 'ours' else ''} {ratios}")
            times = ", ".join(f"{name} {s.p50:.0f} ({s.p20:.0f} to {s.p80:.0f})" for name, s in row["times"].items())
            lines.append(f"  {'':<24} {times}")
    return lines
