"""The command `iprm check`: a dataset, read through and reported on."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from iprm.data import DATASETS
from iprm.data.quality import Report, check
from iprm.errors import InputError

from .options import dataset_of
from .parser import Parser, add_dataset_options

DESCRIPTION = """\
Reads a dataset through and reports the classes of every split, shape and type of every modality, and what is wrong.

problems   files that cannot be read, each by name; values that are not finite; rows whose modality is missing (every value 0 or
           NaN); a modality that is the same in all rows of a split; classes missing in a split, labels beyond those of train;
           leakage: rows of one split identical to rows of another, in every modality or in one alone, and items of the source
           that two splits share
remarks    features without variance in train, rows that repeat another of their split, labels that no row has

Rows count from 0 within their split; an item is the place that a row has in its source: the row of the file, the recording in
order of name. Exit code: 0 without problems, 1 with some, 2 where the dataset cannot be used at all.
"""

EXAMPLES = """\
examples:
  iprm check digits
  iprm check features --path my_features.npz
  iprm check av-digits --path recordings/ --set noise=0.4
  iprm check runs/digits/fit/version_0/config.yaml
"""

#: Classes that get a line of their own; the others share the last.
MOST_CLASSES = 40


def parser() -> Parser:
    """The arguments of `iprm check`."""
    p = Parser("iprm check", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("data", metavar="DATA", help=f"{', '.join(DATASETS)}, or a YAML configuration, such as iprm fit writes")
    add_dataset_options(p)
    return p


def check_command(arguments: Sequence[str]) -> int:
    """Runs `iprm check` and returns the exit code."""
    given = parser().parse_args(arguments)
    data = dataset_of(given.data, dict(given.set) | ({} if given.path is None else {"path": given.path}))
    faults: list[str] = []
    try:
        report = check(data.source, data.inspect(faults))
    except InputError as error:
        raise InputError("\n".join([*faults, str(error)])) from error
    console = Console()
    for table in (class_table(report), modality_table(report)):
        console.print(table)
    problems = [*faults, *(finding.what for finding in report.findings if finding.problem)]
    remarks = [finding.what for finding in report.findings if not finding.problem]
    for kind, lines in (("problem", problems), ("remark", remarks)):
        for line in lines:
            console.print(f"{kind}: {line}", highlight=False, soft_wrap=True, markup=False)
    verdict = f"{_count(len(problems), 'problem')}, {_count(len(remarks), 'remark')}" if problems or remarks else "clean"
    console.print(f"{data.source}: {verdict}", highlight=False, soft_wrap=True, markup=False)
    return 1 if problems else 0


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def class_table(report: Report) -> Table:
    """Rows by class and split."""
    table = _table("class", *report.counts)
    shown = len(report.classes) if len(report.classes) <= MOST_CLASSES else MOST_CLASSES - 1
    for place, label in enumerate(report.classes[:shown]):
        table.add_row(str(label), *(str(count[place]) for count in report.counts.values()))
    if shown < len(report.classes):
        others = (_span(count[shown:]) for count in report.counts.values())
        table.add_row(f"{len(report.classes) - shown} more", *others, end_section=True)
    table.add_section()
    table.add_row("all", *(str(count.sum()) for count in report.counts.values()))
    return table


def _span(counts: np.ndarray) -> str:
    return f"{counts.min()} to {counts.max()} each"


def modality_table(report: Report) -> Table:
    """What a modality is, and the rows and features of it in each split that something is to be said of."""
    table = _table("modality", "split", "shape", "type", "missing", "not finite", "constant features")
    for modality, scans in report.scans.items():
        for name, found in scans.items():
            counts = (len(found.missing), len(found.non_finite), len(found.constant))
            table.add_row(modality, name, found.shape, found.dtype, *map(str, counts))
        table.add_section()
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in ("class", "modality", "split", "shape", "type") else "right")
    return table
