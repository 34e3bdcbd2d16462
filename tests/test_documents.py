"""README.md and docs/: every code block and command is executed, page by page; links, folders and targets exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import PAGES, ROOT, Block, blocks, commands, execute

EXECUTED = {"python", "console", "bash", "yaml"}  # YAML blocks are written to files, for later commands
SHOWN = {"text"}  # what a command prints
DISTRIBUTED = "docs/distributed.md"
LONG = ("docs/getting-started.md", "docs/your-data.md", "docs/your-model.md")  # 6 to 14 s each


def parts() -> list[object]:
    """The blocks that one test executes, in order and in one folder: the blocks of a page.

    Each command of docs/distributed.md is a test of its own. They start several processes each, they are independent of each
    other, and test_distributed_fit.py runs the same strategies with assertions; so they belong to the tier `slow`.
    """
    pages = [
        pytest.param(blocks(page), id=page, marks=[pytest.mark.slow] if page in LONG else [])
        for page in PAGES
        if page != DISTRIBUTED
    ]
    pieces = [
        block._replace(text=text)
        for block in blocks(DISTRIBUTED)
        for text in [f"$ {command}\n" for command in commands(block.text)] or [block.text]
    ]
    return pages + [
        pytest.param([piece], id=f"{DISTRIBUTED}-{index}", marks=[pytest.mark.slow] if piece.language != "python" else [])
        for index, piece in enumerate(pieces)
    ]


@pytest.mark.parametrize("executed", parts())
def test_every_block_runs(executed: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    y = np.arange(60) % 3  # what the README calls "your own features"
    rows = np.random.default_rng(0).normal(size=(60, 4)) + y[:, None]
    np.savez(tmp_path / "my_features.npz", x_audio=rows, x_text=-rows, y=y)
    for block in executed:
        execute(block)


def test_there_is_something_to_execute_and_nothing_is_left_out() -> None:
    languages = [block.language for page in PAGES for block in blocks(page)]
    assert set(languages) <= EXECUTED | SHOWN
    assert languages.count("python") >= 12
    assert languages.count("console") >= 15


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (PAGES[page].parent / path).exists(), path


def test_the_folders_and_targets_that_the_readme_names_exist() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    folders = re.findall(r"^\| `([\w/]+/)`", text, re.MULTILINE)
    assert len(folders) >= 5
    assert all((ROOT / folder).is_dir() for folder in folders)
    for target in {target for page in PAGES.values() for target in re.findall(r"`make ([\w-]+)`", page.read_text())}:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "mkdocs"), "build", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    assert (tmp_path / "distributed" / "index.html").is_file()
