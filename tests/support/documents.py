"""The blocks of README.md and docs/*.md, and how each is executed: in order, page by page, each page in its own folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

from iprm.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCED = re.compile(r"^```(?P<language>\w+)?(?: title=\"(?P<title>[\w.]+)\")?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)

#: Starts a command as SLURM would on two nodes with one task each.
SRUN = """#!/usr/bin/env bash
export SLURM_JOB_ID=1 SLURM_JOB_NAME=job SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=2 SLURM_LOCALID=0
export SLURM_JOB_NODELIST=localhost MASTER_ADDR=localhost MASTER_PORT=29512
SLURM_NODEID=1 SLURM_PROCID=1 "$@" & other=$!
SLURM_NODEID=0 SLURM_PROCID=0 "$@" || exit 1
wait $other
"""


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    found = FENCED.finditer(PAGES[page].read_text(encoding="utf-8"))
    return [Block(match["language"] or "", match["title"] or "", match["text"]) for match in found]


def commands(text: str) -> list[str]:
    return [line.removeprefix("$ ").partition("  #")[0].strip() for line in text.splitlines() if line.startswith("$ ")]


def execute(block: Block) -> None:
    """Runs a block in the current folder; blocks that only show output are skipped."""
    if block.title:
        Path(block.title).write_text(block.text)
    if block.language == "python" and not block.title:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, "<document>", "exec"), {"__name__": "__document__"})
    elif block.language == "bash":
        _run_job(block.title)
    elif block.language == "console":
        for command in commands(block.text):
            _executor(command)(command)


def _executor(command: str) -> Callable[[str], None]:
    if command.startswith("make "):
        return lambda command: _run(f"{command} -n -C {ROOT}")
    if command.startswith("pip "):
        return _check_extra
    if "$HEAD_NODE" in command:
        return _run_on_two_nodes
    return _run_iprm if command.startswith("iprm ") and "--trainer.devices" not in command else _run


def _run_iprm(command: str) -> None:
    """In this process: starting another takes longer than most commands do."""
    command, _, output = (part.strip() for part in command.partition(" > "))
    words = [match for word in shlex.split(command)[1:] for match in (sorted(glob(word)) or [word])]
    if words[0] == "compare":  # each method once, in this process
        words += ["--jobs", "1"] if "--epochs" in words else ["--jobs", "1", "--epochs", "1", "--seeds", "1"]
    with _said() as said:
        assert main(words) == 0, (command, said.getvalue())
    if output:
        Path(output).write_text(said.getvalue())


@contextlib.contextmanager
def _said() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        yield said


def _environment() -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    here = {"PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]), "OMP_NUM_THREADS": "1", "HEAD_NODE": "localhost"}
    return {**os.environ, **here, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _run(command: str) -> None:
    done = subprocess.run(["bash", "-c", command], env=_environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, (command, done.stdout, done.stderr)


def _run_on_two_nodes(command: str) -> None:
    nodes = [subprocess.Popen(["bash", "-c", command], env=_environment(), stdout=subprocess.PIPE) for _ in range(2)]
    for node in nodes:
        node.communicate(timeout=180)
    assert [node.returncode for node in nodes] == [0, 0], command


def _run_job(script: str) -> None:
    Path("bin").mkdir()
    srun = Path("bin/srun")
    srun.write_text(SRUN)
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    _run(f"PATH=$PWD/bin:$PATH bash {script}")


def _check_extra(command: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[(\w+)\]", command):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
