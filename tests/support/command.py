"""The command `iprm`, run in this process."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

from iprm.cli.main import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def iprm(folder: Path, *arguments: str) -> Outcome:
    """Exit code and output of `iprm ARGUMENTS`, called in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(arguments)
    finally:
        os.chdir(before)
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(folder: Path, *arguments: str) -> str:
    """The message of a command that is refused, without the program's name: one line, exit code 2, and nothing was written."""
    before = sorted(folder.rglob("*"))
    code, out, err = iprm(folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("iprm: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1, "one line"
    assert sorted(folder.rglob("*")) == before, "nothing was written"
    return err.removeprefix("iprm: ").rstrip("\n")


def table(out: str) -> dict[str, float]:
    """The metrics that `iprm test` printed."""
    return {name: float(value) for name, value in re.findall(r"│ +(test_\w+) +│ +([\d.]+) +│", out)}
