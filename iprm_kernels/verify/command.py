"""The command `python -m iprm_kernels verify`, and its output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

import torch

from ..loading import NAMES
from .plan import REFUSED
from .run import NO_TIME, Outcome, Progress, verify_backends

DESCRIPTION = """\
Compares the kernels of each backend on this machine with float64 results, forward and backward, checks that repeated runs are
bit-identical and that all results are written, and times them beside plain torch and torch.compile. The verdict is kept in
$IPRM_KERNELS_CACHE (default: iprm-kernels in the user's cache folder); from then on the fastest backend that passed serves by
default, per operator, type and size. Exit code 1 if a check failed.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser("python -m iprm_kernels", description="Fused operators for multimodal learning.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", description=DESCRIPTION, help="verify and time the backends on this machine")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    verify.add_argument("--device", default=default, help=f"cpu, cuda or cuda:N (default here: {default})")
    verify.add_argument("--backend", choices=NAMES[1:], help="only this backend (default: all that serve the device)")
    verify.add_argument("--quick", action="store_true", help="one shape per size, in float32 and on a GPU bfloat16; a minute")
    given = parser.parse_args(arguments)
    try:
        found = verify_backends(given.device, backend=given.backend, quick=given.quick, progress=progress_line(sys.stderr))
    except ValueError as error:
        verify.error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; what was found is kept", file=sys.stderr)
        return 130
    if not found.outcomes:
        print(f"no backend but the reference serves {given.device}: see iprm_kernels.backends()")
        return 0
    print_outcomes(found.outcomes)
    print(f"verdict: {found.kept}")
    return int(any(outcome.reason not in ("", NO_TIME) and not outcome.refused for outcome in found.outcomes))


def progress_line(file: TextIO) -> Progress | None:
    """A progress bar on the last line of a terminal; None if the file is none."""
    if not file.isatty():
        return None

    def show(ended: int, total: int, what: str) -> None:
        done = 24 * ended // max(total, 1)
        file.write(f"\r\x1b[Kverifying [{'#' * done}{'.' * (24 - done)}] {ended}/{total} {what}"[:120])
        file.flush()

    return show


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """A table with one line per check, and the reasons of failures below it."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
    head = ("operator", "type", "size", "backend", "", "µs", "reference", "torch.compile")
    rows = []
    for backend, check, reason, times in outcomes:
        state = {"": "ok", NO_TIME: "-"}.get(reason, "refused" if reason.startswith(REFUSED) else "FAILED")
        shown = [f"{times[name]:.0f}" if name in times else "" for name in (backend, "reference", "torch.compile")]
        rows.append((*check.case, backend, state, *shown))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [cell.ljust(w) if k < 5 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print()
    for backend, check, reason, _ in outcomes:
        if reason and reason != NO_TIME:
            print(f"{backend} {' '.join(check.case)}: {reason}")
    if any(reason == NO_TIME for _, _, reason, _ in outcomes):
        print(f"- {NO_TIME}")
