"""The README's code runs, its commands exist, and its files are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^\$ (.+)$", README, re.MULTILINE)
IPRM = [command for command in COMMANDS if command.startswith("iprm ")]


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) >= 2
    assert len(IPRM) >= 3


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_code_runs(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("command", IPRM)
def test_command_runs(command: str, tmp_path: Path) -> None:
    """In an empty folder but for the features that the README speaks of; longer runs cut to an epoch."""
    y = np.arange(60) % 3
    rows = np.random.default_rng(0).normal(size=(60, 4)) + y[:, None]
    np.savez(tmp_path / "my_features.npz", x_audio=rows, x_text=-rows, y=y)
    arguments = shlex.split(command)[1:]
    if arguments[0] == "compare" and "--epochs" not in arguments:
        arguments += ["--epochs", "1", "--seeds", "1"]
    subprocess.run([sys.executable, "-m", "iprm.cli", *arguments], cwd=tmp_path, check=True, timeout=300)


def test_pip_commands_name_extras_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r'pip install "?\.\[(\w+)\]', README):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_links_and_folders_exist() -> None:
    paths = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"^\| `([\w/]+/)`", README, re.MULTILINE)
    assert len(paths) >= 5
    for path in paths:
        assert (ROOT / path).exists(), path


def test_make_targets_exist() -> None:
    for target in set(re.findall(r"`make ([\w-]+)`", README)):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
