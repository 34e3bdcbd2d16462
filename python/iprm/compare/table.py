"""The tables of a comparison, computed from the folders of its runs; as text, Markdown and CSV."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .runs import Run, label, settings_of_comparison

ABSENT = "–"
SECONDS = "s/epoch"


class Table(NamedTuple):
    """A title, the names of the columns, rows of cells (the first cell names the row), and the indices of the bold rows."""

    title: str
    head: list[str]
    rows: list[list[str]]
    bold: frozenset[int] = frozenset()


class Comparison:
    """Runs of several methods and seeds.

    by_method: method -> its runs; finished: the runs with test metrics; tables: test metrics by method, as mean and standard
    deviation over seeds, accuracies in percent; and, if there are measures other than one λ and its ω, these at the last epoch.
    """

    def __init__(self, folder: Path, runs: Sequence[Run]) -> None:
        settings = settings_of_comparison(folder)
        self.folder = folder
        self.by_method = {run.method: [r for r in runs if r.method == run.method] for run in runs}
        self.finished = [run for run in runs if run.test]
        self.failed = [f"{run.method}, seed {run.seed}: {run.failure}" for run in runs if run.failure]
        seeds = len({run.seed for run in runs})
        epochs = max((run.max_epochs or len(run.epochs) for run in runs), default=0)
        self.title = f"{settings.get('data', folder.name)}: {seeds} seeds, {epochs} epochs"
        expected = max(len(runs), len(settings.get("methods", [])) * len(settings.get("seeds", [])))
        if len(self.finished) < expected:
            self.title += f"; {len(self.finished)} of {expected} runs"
        self.modalities = max((_modalities(run) for run in runs), key=len, default=[])
        self.tables = [self._accuracies(), *self._measures()]

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

    def _measures(self) -> list[Table]:
        names = dict.fromkeys(
            n for run in self.finished for n in run.measures if n != "weight" and not n.startswith("strength")
        )
        methods = [m for m, runs in self.by_method.items() if any(r.test and r.courses.keys() & names.keys() for r in runs)]
        rows = [
            [label(name, self.modalities), *(_cell(self.values(m, lambda r, n=name: r.last(n)), 2) for m in methods)]  # type: ignore[misc]
            for name in names
        ]
        return [Table("At the last epoch", ["measure", *methods], rows)] if rows else []


def _modalities(run: Run) -> list[str]:
    return [] if run.method.startswith("unimodal") else [head for head in run.heads if head != "mix"]


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """One comparison per folder that holds runs as <method>/seed=<k>."""
    folders = dict.fromkeys(run.folder.parent.parent for run in runs)
    return [
        Comparison(folder, [run for run in runs if run.folder.parent.parent == folder])
        for folder in folders
        if settings_of_comparison(folder)
    ]


def _cell(values: Sequence[float], digits: int) -> str:
    """mean ±standard deviation."""
    if not values:
        return ABSENT
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def text(table: Table, width: int | None) -> Iterator[tuple[str, bool]]:
    """The lines of the table, each with whether it is bold. Columns beyond `width` follow below, in further blocks that
    repeat the first column; with None, all columns are in one block."""
    heads = [name.rpartition(" ") for name in table.head]
    lines = [[above for above, _, _ in heads], [below for *_, below in heads], *table.rows]
    columns = list(zip(*([cell.replace(" ±", "±") for cell in line] for line in lines), strict=True))
    widths = [max(map(len, column)) for column in columns]
    start = 1
    while start < len(columns):
        end = start + 1
        while end < len(columns) and (width is None or sum(w + 1 for w in (widths[0], *widths[start : end + 1])) <= width + 1):
            end += 1
        for k, line in enumerate(zip(*(columns[0], *columns[start:end]), strict=True)):
            cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[start:end], strict=True))]
            yield " ".join(cells).rstrip(), k - 2 in table.bold
            if k == 1:
                yield "─".join("─" * w for w in (widths[0], *widths[start:end])), False
        yield "", False
        start = end


def markdown(table: Table) -> str:
    lines = [table.head, ["---", *("---:" for _ in table.head[1:])], *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def write(comparison: Comparison) -> None:
    """Writes summary.md, runs.csv and history.csv into the folder of the comparison; replaces existing files."""
    first, *others = comparison.tables
    parts = [f"# {comparison.title}\n\n{markdown(first)}", *(f"## {t.title}\n\n{markdown(t)}" for t in others)]
    parts += ["## Failed\n\n" + "".join(f"- {run}\n" for run in comparison.failed)] if comparison.failed else []
    (comparison.folder / "summary.md").write_text("\n".join(parts), encoding="utf-8")
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
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
