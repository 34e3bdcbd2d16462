"""The command `iprm check`: reads a dataset and reports problems."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lightning.pytorch.cli import instantiate_class

from iprm.compare.table import Table
from iprm.data import DATASETS
from iprm.data.quality import Report, check
from iprm.errors import InputError, counted
from iprm.streams import say

from .console import print_table
from .fit import fit_settings
from .parser import PATH, Parser, dataset_arguments, divided

DESCRIPTION = """\
Reads all rows of a dataset and reports the classes of every split, the shape and type of every modality, and problems.

problems   unreadable and truncated files, each by name; non-finite values; rows without a modality (all values 0 or NaN); a
           modality with the same values in all rows of a split; classes missing from a split, labels beyond those of train;
           leakage: rows of one split identical to rows of another, in all modalities or in one, and source items shared by two
           splits
remarks    features without variance in train, repeated rows within a split, classes without a row, rows without a label

Rows are counted from 0 within their split. An item is the position of a row in the source: its row in the file, or the
position of its recording in order of name. Exit code: 0 without problems, 1 with problems, 2 if the dataset cannot be used.
"""

EXAMPLES = """\
examples:
  iprm check digits
  iprm check features --path my_features.npz
  iprm check av-digits --path recordings/ --data.noise 0.4
  iprm check runs/digits/fit/version_0/config.yaml
"""

#: Largest number of lines for classes; if there are more classes, the last line gives the range of the rest.
MOST_CLASSES = 40


def parser() -> Parser:
    """The arguments of `iprm check`."""
    p = Parser("iprm check", description=DESCRIPTION, epilog=EXAMPLES)
    p.add_argument("data", metavar="DATA", help=f"{', '.join(DATASETS)}, or a YAML configuration, for example of iprm fit")
    p.add_argument("--path", help=PATH)
    return p


def check_command(arguments: Sequence[str]) -> int:
    """Runs `iprm check` and returns the exit code."""
    own, settings = divided(arguments)
    data = instantiate_class((), fit_settings([*dataset_arguments(parser().parse_args(own)), *settings])["data"])
    faults: list[str] = []
    try:
        report = check(data.source, data.inspect(faults))
    except InputError as error:
        raise InputError(*faults, str(error)) from error
    classes, modalities = class_table(report), modality_table(report)
    print_table(classes, ruled=[len(classes.rows) - 2])
    lasts = [place for place, (row, after) in enumerate(itertools.pairwise(modalities.rows)) if row[0] != after[0]]
    print_table(modalities, names=2, left=4, ruled=lasts)
    problems = [*faults, *(finding.what for finding in report.findings if finding.problem)]
    remarks = [finding.what for finding in report.findings if not finding.problem]
    for kind, lines in (("problem", problems), ("remark", remarks)):
        for line in lines:
            say(f"{kind}: {line}")
    say(f"{data.source}: {counted(len(problems), 'problem')}, {counted(len(remarks), 'remark')}")
    return 1 if problems else 0


def class_table(report: Report) -> Table:
    """Number of rows per class and split; the last row is their sum."""
    shown = len(report.classes) if len(report.classes) <= MOST_CLASSES else MOST_CLASSES - 1
    rows = [
        [str(label), *(str(count[place]) for count in report.counts.values())]
        for place, label in enumerate(report.classes[:shown])
    ]
    if shown < len(report.classes):
        others = (f"{count[shown:].min()} to {count[shown:].max()} each" for count in report.counts.values())
        rows.append([f"{len(report.classes) - shown} more", *others])
    rows.append(["all", *(str(count.sum()) for count in report.counts.values())])
    return Table("", ["class", *report.counts], rows)


def modality_table(report: Report) -> Table:
    """Shape and type of each modality, and the number of suspicious rows and features per split."""
    rows = [
        [modality, split, found.shape, found.dtype, *map(str, (len(found.missing), len(found.non_finite), found.still.sum()))]
        for modality, scans in report.scans.items()
        for split, found in scans.items()
    ]
    return Table("", ["modality", "split", "shape", "type", "missing", "not\nfinite", "constant\nfeatures"], rows)
