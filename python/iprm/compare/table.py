"""The tables of a comparison, computed from the folders of its runs; as Markdown and CSV."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from iprm.errors import counted
from iprm.files import replacing, write_atomically
from iprm.streams import cell

from .reading import Budget, text
from .record import Pair
from .runs import SYMBOLS, Run, settings_of_comparison

ABSENT = "–"
SECONDS = "s/epoch"
#: Most values of the runs in a table: of 4,950 pairs of 100 modalities in 50 runs.
MOST_VALUES = 2**18
#: Most pairs that a note names.
MOST_NAMED = 6
#: tests/iprm/fusion/test_one_sided.py measures it.
ADVICE = (
    "Such a mixture does not learn from the other modality. To keep λ at 0.5: method iprm-one-pass with the options "
    '{"alpha": 1, "ema_start": "released"}; see "λ goes to 0 or 1" in docs/troubleshooting.md'
)


class Table(NamedTuple):
    """A title, the names of the columns, rows of cells (the first cell names the row), and the indices of the bold rows."""

    title: str
    head: list[str]
    rows: list[list[str]]
    bold: frozenset[int] = frozenset()


class Comparison:
    """Runs of several methods and seeds.

    by_method: method -> its runs; finished: the runs with test metrics; tables: test metrics by method, as mean and standard
    deviation over seeds, accuracies in percent; then, after the last epoch, λ by pair if there are several pairs, and measures
    other than λ and ω; notes: what to know about them.
    """

    def __init__(self, folder: Path, runs: Sequence[Run]) -> None:
        settings = settings_of_comparison(folder)
        self.folder = folder
        self.by_method = {run.method: [r for r in runs if r.method == run.method] for run in runs}
        self.finished = [run for run in runs if run.test]
        self.failed = [f"{run.method}, seed {run.seed}: {run.failure}" for run in runs if run.failure]
        seeds = len({run.seed for run in runs})
        epochs = max((run.max_epochs or len(run.epochs) for run in runs), default=0)
        data = text(settings.get("data", folder.name))
        self.title = f"{data}: {counted(seeds, 'seed')}, {counted(epochs, 'epoch')}"
        expected = max(len(runs), len(settings.get("methods", [])) * len(settings.get("seeds", [])))
        if len(self.finished) < expected:
            self.title += f"; {len(self.finished)} of {expected} runs"
        self.modalities = max((_modalities(run) for run in runs), key=len, default=[])
        self.tables = [self._accuracies(), *self._weights(), *self._measures()]
        self.notes = list(one_sided_notes(self.finished))

    def values(self, method: str, value: Callable[[Run], float | None]) -> list[float]:
        """`value` of each finished run of the method, without None."""
        return [v for run in self.by_method[method] if run.test and (v := value(run)) is not None]

    def accuracies(self, method: str, name: str = "accuracy") -> list[float]:
        """A test metric of each finished run of the method, in percent."""
        return [100 * v for v in self.values(method, lambda run: run.test.get(name))]

    def _accuracies(self) -> Table:
        names = {"accuracy": "accuracy", "mAP": "map", "macro-F1": "macro_f1"}
        names |= {f"{modality} head": f"accuracy_{modality}" for modality in self.modalities}
        weighs = any("weight" in run.courses for run in self.finished)
        rows = []
        for method in self.by_method:
            cells = [_cell(self.accuracies(method, name), 1) for name in names.values()]
            cells += [_cell(self.values(method, lambda run: run.last("weight")), 2)] if weighs else []
            seconds = self.values(method, lambda run: run.seconds)
            rows.append([method, *cells, _cell(seconds and [statistics.fmean(seconds)], 2)])
        means = [statistics.fmean(values) if (values := self.accuracies(method)) else -1.0 for method in self.by_method]
        best = frozenset(place for place, mean in enumerate(means) if mean == max(means) >= 0 and len(means) > 1)
        return Table(self.title, ["method", *names, *(["λ"] if weighs else []), SECONDS], rows, best)

    def _weights(self) -> list[Table]:
        pairs = dict.fromkeys(pair for run in self.finished for name, pair in run.weights.items() if name != "weight")

        columns = {id(run): {pair: name for name, pair in run.weights.items()} for run in self.finished}

        def last(run: Run, pair: Pair) -> float | None:
            return run.last(columns[id(run)].get(pair, ""))

        rows = {" × ".join(pair): partial(last, pair=pair) for pair in pairs}
        return self._last("λ, the weight of the first of a pair, after the last epoch", "pair", rows)

    def _measures(self) -> list[Table]:
        names = dict.fromkeys(name for run in self.finished for name in run.measures if name.partition("_")[0] not in SYMBOLS)
        rows = {name: partial(Run.last, metric=name) for name in names}
        return self._last("Measures after the last epoch", "measure", rows)

    def _last(self, title: str, of: str, rows: Mapping[str, Callable[[Run], float | None]]) -> list[Table]:
        """A table of these values by method, of the methods that have one; none without rows. The first rows alone, if there
        are more than `MOST_VALUES`."""
        rows = dict(itertools.islice(rows.items(), MOST_VALUES // max(1, len(self.finished))))
        methods = [m for m in self.by_method if any(self.values(m, value) for value in rows.values())]
        cells = [[name, *(_cell(self.values(method, value), 2) for method in methods)] for name, value in rows.items()]
        return [Table(title, [of, *methods], cells)] if rows else []


def one_sided_notes(runs: Sequence[Run]) -> Iterator[str]:
    """For each method, the pairs whose λ ended at 0 or 1 in some of the runs, and what to try."""
    for method in dict.fromkeys(run.method for run in runs):
        trained = [run for run in runs if run.method == method]
        ends = Counter(end for run in trained for end in run.one_sided.items())
        named = [f"{' × '.join(pair)} ({alone} alone, {n} of {len(trained)} runs)" for (pair, alone), n in ends.items()]
        more = [f"{len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
        if named:
            yield f"{method}: λ ended at 0 or 1 for {', '.join(named[:MOST_NAMED] + more)}. {ADVICE}"


def _modalities(run: Run) -> list[str]:
    return [] if run.method.startswith("unimodal") else [head for head in run.heads if head != "mix"]


def comparisons(runs: Sequence[Run]) -> Iterator[Comparison]:
    """One comparison per folder that holds runs as <method>/seed=<k>."""
    folders: dict[Path, list[Run]] = {}
    for run in runs:
        folders.setdefault(run.folder.parent.parent, []).append(run)
    budget = Budget()
    return (Comparison(folder, found) for folder, found in folders.items() if settings_of_comparison(folder, budget))


def _cell(values: Sequence[float], digits: int) -> str:
    """mean ±standard deviation."""
    if not values:
        return ABSENT
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(table: Table) -> str:
    lines = [table.head, ["---", *("---:" for _ in table.head[1:])], *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def write(comparison: Comparison) -> None:
    """Writes summary.md, runs.csv and history.csv into the folder of the comparison; replaces existing files."""
    first, *others = comparison.tables
    parts = [f"# {comparison.title}\n\n{markdown(first)}", *(f"## {table.title}\n\n{markdown(table)}" for table in others)]
    parts += ["".join(f"Note: {note}\n" for note in comparison.notes)] if comparison.notes else []
    parts += ["## Failed\n\n" + "".join(f"- {run}\n" for run in comparison.failed)] if comparison.failed else []
    write_atomically(comparison.folder / "summary.md", "\n".join(parts))
    _write_csv(comparison.folder / "runs.csv", [_run_row(run) for run in comparison.finished])
    _write_csv(comparison.folder / "history.csv", [row for run in comparison.finished for row in _epoch_rows(run)])


def _run_row(run: Run) -> dict[str, Any]:
    test = {f"test_{name}": value for name, value in run.test.items()}
    last = {name: run.last(name) for name in run.measures if name.startswith("weight")}
    place = {"method": run.method, "seed": run.seed}
    return place | test | last | {"best_epoch": run.best_epoch, "seconds_per_epoch": run.seconds}


def _epoch_rows(run: Run) -> Iterator[dict[str, Any]]:
    for epoch in run.epochs:
        metrics = {name: course[epoch] for name, course in run.courses.items() if epoch in course}
        yield {"method": run.method, "seed": run.seed, "epoch": epoch, **metrics}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as file:
        csv.writer(file).writerows([[*map(cell, names)], *([cell(row.get(name)) for name in names] for row in rows)])
