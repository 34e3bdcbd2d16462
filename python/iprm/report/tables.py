"""The tables of a report: results of the runs, and differences in their settings and environment."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iprm.compare.reading import MOST_HEADS, text
from iprm.compare.record import Record
from iprm.compare.runs import Run, label
from iprm.compare.table import ABSENT, Table

from .figures import percent

#: Largest number of measures with columns in the summary; if there are more, the page shows only figures of them.
MOST_MEASURES = 4
#: Most cells of a table of settings: of 1,000 runs with 260 each.
MOST_CELLS = 2**18
#: Letters of a setting, of which the rest is cut.
LONGEST_SETTING = 2000


def summary(runs: Sequence[Run]) -> Table:
    """Method, seed, best epoch, accuracies on validation at that epoch, last measures, test accuracy."""

    def column(value: Callable[[Run], float | None], unit: Callable[[float], str]) -> list[str]:
        return [ABSENT if (v := value(run)) is None else unit(v) for run in runs]

    def at_best(metric: str) -> Callable[[Run], float | None]:
        return lambda run: None if run.best_epoch is None else run.courses.get(metric, {}).get(run.best_epoch)

    columns = {
        "run": [run.name for run in runs],
        "method": [run.method for run in runs],
        "seed": [run.seed for run in runs],
        "best epoch": column(lambda run: run.best_epoch, str),
        "val accuracy": column(at_best("val_accuracy"), percent),
    }
    columns |= {head_name(head): column(at_best(f"val_accuracy_{head}"), percent) for head in heads_of(runs)}
    measures = dict.fromkeys(name for run in runs for name in run.measures)
    for name in measures if len(measures) <= MOST_MEASURES else ():
        columns[f"last {label(name, heads_of(runs))}"] = column(lambda run, name=name: run.last(name), "{:.3f}".format)  # type: ignore[misc]
    if any(run.test for run in runs):
        columns["test accuracy"] = column(lambda run: run.test.get("accuracy"), percent)
    columns |= {"epochs": [str(max(run.epochs, default=-1) + 1) for run in runs], "data": [run.data for run in runs]}
    return Table("", list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def heads_of(runs: Sequence[Run]) -> list[str]:
    """All heads, "mix" last; the first `MOST_HEADS` of all runs."""
    found = itertools.islice(dict.fromkeys(head for run in runs for head in run.heads), MOST_HEADS)
    return sorted(found, key=lambda head: head == "mix")


def head_name(head: str) -> str:
    return "mixture" if head == "mix" else f"{head} head"


def compared(runs: Sequence[Run], values: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Named values that differ between the runs, and those that are equal; runs without any values are not considered. The
    first names alone, if the tables would have more than `MOST_CELLS`."""
    differing, shared = [], []
    for name in itertools.islice(dict.fromkeys(name for run in values for name in run), MOST_CELLS // len(runs)):
        row = [text(run.get(name, ABSENT), LONGEST_SETTING) for run in values]
        known = {cell for cell, run in zip(row, values, strict=True) if run}
        if len(known) > 1:
            differing.append([text(name), *row])
        else:
            shared.append([text(name), known.pop()])
    several = "The same in all runs that have it" if len(runs) > 1 else ""
    found = [Table("Differs between the runs", ["", *(run.label for run in runs)], differing), Table(several, [], shared)]
    return [table for table in found if table.rows]


def folded(runs: Sequence[Run]) -> list[tuple[str, list[Table]]]:
    """Settings; and versions, platform, device and backends, if the runs have recorded them."""
    environment = [run.record.environment if run.record else {} for run in runs]
    return [("Settings", compared(runs, [run.settings for run in runs])), ("Environment", compared(runs, environment))]


def most_confused(record: Record, count: int) -> list[list[str]]:
    """The most frequent errors: true class, predicted class, their number, and the samples of the true class."""
    wrong = [(t, p, n) for (t, p), n in record.confusion.items() if t != p]
    wrong.sort(key=lambda cell: (-cell[2], cell[:2]))
    return [[record.name(t), record.name(p), str(n), str(record.class_counts[t])] for t, p, n in wrong[:count]]
