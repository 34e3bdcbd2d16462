"""The tables of a report: the runs' figures, and what differs between them in settings and environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .charts import percent
from .runs import Run, flattened

ABSENT = "–"


class Column(NamedTuple):
    """A column of the summary: its title, and a cell a run. `best` is the cell to set in bold, in all rows that have it."""

    title: str
    cells: list[str]
    numeric: bool = True
    best: str | None = None


def summary(runs: Sequence[Run]) -> list[Column]:
    """Method, seed, best epoch, accuracies on validation at that epoch, and the last λ and ω."""
    accuracy = [_at_best(run, "val_accuracy") for run in runs]
    known = [value for value in accuracy if value is not None]
    # of different data the accuracies are not to be compared
    comparable = len(known) > 1 and len({run.data for run in runs}) == 1
    best = percent(max(known)) if comparable else None
    columns = [
        Column("method", [run.method for run in runs], numeric=False),
        Column("seed", [run.seed for run in runs]),
        Column("best epoch", [ABSENT if run.best_epoch is None else str(run.best_epoch) for run in runs]),
        Column("val accuracy", [_cell(value, percent) for value in accuracy], best=best),
    ]
    for head in heads_of(runs):
        cells = [_cell(_at_best(run, f"val_accuracy_{head}"), percent) for run in runs]
        columns.append(Column("mixture" if head == "mix" else f"{head} head", cells))
    for name in dict.fromkeys(pair.name for run in runs for pair in run.pairs):
        found = [next((pair for pair in run.pairs if pair.name == name), None) for run in runs]
        columns.append(Column(f"λ {name}", [_cell(_last(pair.weight) if pair else None, "{:.3f}".format) for pair in found]))
        omegas = [[_cell(_last(course), "{:.3f}".format) for course in pair.strengths] if pair else [ABSENT] for pair in found]
        columns.append(Column(f"last ω {name}", [" / ".join(omega) for omega in omegas]))
    columns.append(Column("epochs", [_epochs(run) for run in runs]))
    columns.append(Column("data", [run.data for run in runs], numeric=False))
    return columns


def heads_of(runs: Sequence[Run]) -> list[str]:
    """All heads, "mix" last."""
    found = dict.fromkeys(head for run in runs for head in run.heads)
    return sorted(found, key=lambda head: head == "mix")


def _epochs(run: Run) -> str:
    """How far it came: of a continued run metrics.csv has the last part alone."""
    done = max(run.epochs, default=-1) + 1
    return f"{done} of {run.max_epochs}" if run.max_epochs and run.max_epochs != done else str(done)


def _at_best(run: Run, metric: str) -> float | None:
    return None if run.best_epoch is None else run.courses.get(metric, {}).get(run.best_epoch)


def _last(course: Mapping[int, float]) -> float | None:
    return course[max(course)] if course else None


def _cell(value: float | None, unit: Callable[[float], str]) -> str:
    return ABSENT if value is None else unit(value)


class Comparison(NamedTuple):
    """Named values of several runs: those that differ, a value a run, and those that all share."""

    differing: list[tuple[str, list[str]]]
    shared: list[tuple[str, str]]


def compared(values: Sequence[Mapping[str, Any]]) -> Comparison:
    """What differs between the runs of which anything is known, and what does not, in the order of its appearance."""
    differing, shared = [], []
    for name in dict.fromkeys(name for run in values for name in run):
        row = [str(run.get(name, ABSENT)) for run in values]
        known = {cell for cell, run in zip(row, values, strict=True) if run}
        if len(known) > 1:
            differing.append((name, row))
        else:
            shared.append((name, known.pop()))
    return Comparison(differing, shared)


def environment(runs: Sequence[Run]) -> Comparison:
    """Versions, platform, device and backends, as far as the runs have recorded them."""
    return compared([dict(flattened(run.record.environment)) if run.record else {} for run in runs])


def most_confused(run: Run, count: int) -> list[tuple[int, int, int, int]]:
    """The pairs of classes that are most often taken for one another: true, predicted, how often, of how many."""
    if run.record is None:
        return []
    wrong = [(target, prediction, n) for (target, prediction), n in run.record.confusion.items() if target != prediction]
    wrong.sort(key=lambda cell: (-cell[2], cell[:2]))
    return [(target, prediction, n, run.record.class_counts[target]) for target, prediction, n in wrong[:count]]
