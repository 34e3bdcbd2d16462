"""Numbers of rows per class and split: exact over all rows, and as even as whole numbers can be within each class."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

#: Distance from a whole number within which a quota counts as one: far above the rounding of float64, far below one row.
CLOSE = 1e-6


def largest_remainder(total: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers with the sum `total`, each within one of its fraction of it: first the whole parts, then one more for
    each of the largest remainders. Fractions have the sum 1."""
    quotas = np.asarray(fractions) * total
    counts = np.floor(quotas + CLOSE).astype(int)
    order = np.argsort(counts - quotas, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts.tolist()


def apportioned(rows: np.ndarray, held: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Rows of every class in each held-out split; the other rows of a class, at least one, are for training.

    Each number is the class's quota rounded up or down, where the quotas of a class have the proportions of `held` and, unless
    a class is too small for it, the same share of its rows. Columns have exactly the sums `held`.

    Args:
        rows: (C,) rows of every class.
        held: (S,) rows of every held-out split, at most sum(rows) - C in all.
        rng: decides which classes are rounded up where several are equal.

    Returns:
        (C, S)
    """
    out = _held_out(rows, sum(held))
    quotas = np.empty((len(rows), len(held) + 1))
    quotas[:, :-1] = out[:, None] * (np.asarray(held) / max(1, sum(held)))
    quotas[:, -1] = rows - out
    return _rounded(quotas, rows, np.array([*held, rows.sum() - sum(held)]), rng)[:, :-1]


def _held_out(rows: np.ndarray, held: int) -> np.ndarray:
    """min(rows - 1, φ rows) with the share φ whose sum over the classes is `held`.  (C,) -> (C,)"""
    capped = np.zeros(len(rows), bool)
    while True:
        share = (held - (rows[capped] - 1).sum()) / max(1, rows[~capped].sum())
        above = ~capped & (share * rows > rows - 1)
        if not above.any():
            return np.where(capped, rows - 1, share * rows)
        capped |= above


def _rounded(quotas: np.ndarray, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every quota (C, S) rounded up or down, with the sums `rows` (C,) and `columns` (S,).

    Such numbers exist for every table of quotas with these sums (the vertices of a transportation polytope are integral). Each
    class first rounds up its largest remainders; then units are moved along shortest paths from columns above their sum to
    columns below, from the classes that lose least by it.
    """
    counts = np.floor(quotas + CLOSE).astype(int)
    remainder = quotas - counts
    free = remainder > CLOSE
    tie = rng.random(len(rows))
    up = np.zeros_like(free)
    order = np.argsort(-remainder, axis=1, kind="stable")
    np.put_along_axis(up, order, np.arange(quotas.shape[1]) < (rows - counts.sum(1))[:, None], axis=1)
    while True:
        surplus = counts.sum(0) + up.sum(0) - columns
        if not surplus.any():
            return counts + up
        path = _path(up, free, surplus)
        steps = [(s, t, np.flatnonzero(up[:, s] & free[:, t] & ~up[:, t])) for s, t in itertools.pairwise(path)]
        amount = min(surplus[path[0]], -surplus[path[-1]], *(len(classes) for _, _, classes in steps))
        for s, t, classes in steps:  # of different classes: on a shortest path no class could move its unit further
            cost = remainder[classes, s] - remainder[classes, t]
            moved = classes[np.lexsort((tie[classes], np.round(cost, 6)))[:amount]]
            up[moved, s], up[moved, t] = False, True


def _path(up: np.ndarray, free: np.ndarray, surplus: np.ndarray) -> list[int]:
    """A shortest path of columns from one above its sum to one below, along which classes can move a unit."""
    paths = [[int(s)] for s in np.flatnonzero(surplus > 0)]
    seen = {path[0] for path in paths}
    for path in paths:  # which grows
        if surplus[path[-1]] < 0:
            return path
        for t in range(len(surplus)):
            if t not in seen and (up[:, path[-1]] & free[:, t] & ~up[:, t]).any():
                seen.add(t)
                paths.append([*path, t])
    raise AssertionError("quotas: expected a table with the given sums")
