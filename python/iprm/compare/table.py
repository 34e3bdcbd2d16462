"""The report of a comparison: a table, the same as CSV and Markdown, a plot, and the settings it came from."""

from __future__ import annotations

import csv
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import iprm_kernels as ik
from iprm.environment import versions

from .run import Result

ABSENT = "–"
ACCURACY = "accuracy"
SECONDS = "s/epoch"


class Summary:
    """Mean and standard deviation over seeds, by method.

    columns: title -> method -> values, a value a seed; accuracies in percent. A method without a quantity has no values.
    """

    def __init__(self, results: Sequence[Result], modalities: Sequence[str]) -> None:
        self.methods = list(dict.fromkeys(result.method for result in results))
        by_method = {m: [r for r in results if r.method == m] for m in self.methods}

        def column(values: Any) -> dict[str, list[float]]:
            return {m: [v for r in by_method[m] if (v := values(r)) is not None] for m in self.methods}

        def percent(name: str) -> dict[str, list[float]]:
            return column(lambda r: None if name not in r.test else 100 * r.test[name])

        self.columns = {ACCURACY: percent("accuracy"), "mAP": percent("map"), "macro-F1": percent("macro_f1")}
        for modality in modalities:
            self.columns[f"{modality} head"] = percent(f"accuracy_{modality}")
        for name in weights_in(results):
            self.columns["λ" if name == "weight" else f"λ {name.removeprefix('weight_')}"] = column(
                lambda r, name=name: r.history[-1].get(name)
            )
        self.columns[SECONDS] = column(lambda r: r.seconds_per_epoch)

    def cells(self, method: str) -> list[str]:
        """One row of the table: ``mean ±std`` a column."""
        return [_cell(title, column[method]) for title, column in self.columns.items()]


def weights_in(results: Sequence[Result]) -> list[str]:
    """The names under which λ was logged: "weight", or one a pair."""
    return sorted({name for r in results for name in r.history[-1] if name == "weight" or name.startswith("weight_")})


def _cell(title: str, values: Sequence[float]) -> str:
    if not values:
        return ABSENT
    digits = 2 if title == SECONDS or title.startswith("λ") else 1
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 and title != SECONDS else mean


def rich_table(summary: Summary, title: str) -> Table:
    """The table for the terminal, 80 columns wide for two modalities, the best accuracy in bold."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    table.add_column("method", overflow="fold", min_width=max(len(word) for m in summary.methods for word in m.split("-")) + 1)
    for name in summary.columns:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    accuracy = {m: statistics.fmean(values) for m, values in summary.columns[ACCURACY].items()}
    for method in summary.methods:
        table.add_row(method, *summary.cells(method), style="bold" if accuracy[method] == max(accuracy.values()) else None)
    return table


def write_report(
    folder: Path, results: Sequence[Result], modalities: Sequence[str], settings: Mapping[str, Any], title: str
) -> Summary:
    """Writes summary.md, runs.csv, history.csv, plot.png and settings.json into `folder`, and returns the summary.

    Args:
        folder: created if it is not there; files of an earlier report are replaced.
        results: all runs.
        modalities: of the dataset.
        settings: whatever else is to be kept in settings.json, beside versions and backends.
        title: of the table and the plot.
    """
    from .figures import plot

    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary(results, modalities)
    (folder / "summary.md").write_text(_markdown(summary, title), encoding="utf-8")
    _write_csv(folder / "runs.csv", [_run_row(result) for result in results])
    _write_csv(folder / "history.csv", [_epoch_row(result, epoch) for result in results for epoch in result.history])
    record = {**settings, "versions": versions(), "platform": platform.platform(), "backends": _backends()}
    (folder / "settings.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(folder / "plot.png", summary, results, title)
    return summary


def _backends() -> dict[str, str]:
    return {name: str(status) for name, status in ik.backends().items()}


def _markdown(summary: Summary, title: str) -> str:
    head = ["method", *summary.columns]
    rows = [head, ["---", *("---:" for _ in summary.columns)], *([m, *summary.cells(m)] for m in summary.methods)]
    return f"# {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _run_row(result: Result) -> dict[str, Any]:
    row = {"method": result.method, "seed": result.seed, **{f"test_{name}": value for name, value in result.test.items()}}
    last = {name: value for name, value in result.history[-1].items() if name in weights_in([result])}
    return row | last | {"best_epoch": result.best_epoch, "seconds_per_epoch": result.seconds_per_epoch}


def _epoch_row(result: Result, epoch: Mapping[str, float]) -> dict[str, Any]:
    return {"method": result.method, "seed": result.seed, "epoch": int(epoch["epoch"]), **epoch}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
