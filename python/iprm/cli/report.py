"""The command `iprm report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iprm.compare.runs import read_runs
from iprm.environment import versions
from iprm.files import check_output, write_atomically
from iprm.report.render import render
from iprm.streams import say

from .parser import Parser

DESCRIPTION = """\
Writes one HTML file about runs of iprm fit and comparisons of iprm compare: test metrics by method; accuracy of every head,
losses, λ and ω over the epochs; confusion matrix, angles between the modalities and strength by class on validation; settings
and versions. The file opens in any browser, without a network. Unfinished runs are reported up to their last epoch.
"""

EXAMPLES = """\
examples:
  iprm report runs/digits/fit/version_0
  iprm report runs/digits/fit/version_* --output digits.html
  iprm report runs/compare-digits-20261129-120000
"""


def parser() -> Parser:
    """The arguments of `iprm report`."""
    p = Parser("iprm report", description=DESCRIPTION, epilog=EXAMPLES)
    p.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="the folder of a run, .../fit/version_N, or a folder that contains runs, such as a comparison",
    )
    p.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    return p


def report_command(arguments: Sequence[str]) -> int:
    """Runs `iprm report` and returns the exit code.

    Raises:
        InputError: a folder does not exist or holds no run.
    """
    given = parser().parse_args(arguments)
    runs = read_runs(given.runs)
    check_output(given.output, "iprm report</title>")
    write_atomically(given.output, render(runs, versions()["iprm-kernels"]))
    for run in runs:
        for word in run.missing:
            say(f"{run.folder}: {word}")
    print(f"report: {given.output}")
    return 0
