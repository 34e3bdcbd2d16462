"""Run folders of anyone whose links lead to files elsewhere: `iprm resume` refuses them, and writes and deletes nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from command import iprm
from feature_files import arrays, save
from hostile_runs import LINKS, NO_FILES
from iprm.locks import LOCK, locked

RUN = Path("runs/fit/version_0")
OPTIONS = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
FIT = ("fit", "--data", "features", "--data.path", "features.npz", *OPTIONS, "--trainer.max_epochs", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(folder, arrays())
    assert iprm(folder, *FIT).code == 0
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """The run as `got`, beside the user's own run and other files."""
    for name in ("got", "own"):
        shutil.copytree(run / RUN, tmp_path / name)
    shutil.copy(run / "features.npz", tmp_path)
    (tmp_path / "thesis.txt").write_text("years")
    for batch in range(1, 4):
        shutil.copy(next((tmp_path / "own/states").iterdir()), tmp_path / f"own/states/batch={batch:08}.ckpt")
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("kind", [*LINKS, *NO_FILES])
def test_a_run_is_not_resumed_through_links_that_lead_out_of_it(folder: Path, kind: str) -> None:
    {**LINKS, **NO_FILES}[kind](folder / "got")
    before = contents(folder)
    code, _, err = iprm(folder, "resume", "got", "--trainer.max_epochs", "2", *OPTIONS)
    assert contents(folder) == before
    assert code == 2
    assert err.startswith("iprm: got/")
    assert ("a link to" if kind in LINKS else "got a device or pipe") in err
    assert err.count("\n") == 1


def test_a_run_with_links_within_it_is_resumed(folder: Path) -> None:
    (folder / "got/checkpoints").rename(folder / "got/kept")
    (folder / "got/checkpoints").symlink_to("kept")
    (folder / "linked").symlink_to("got")
    assert iprm(folder, "resume", "linked", "--trainer.max_epochs", "2", *OPTIONS).code == 0


def test_a_lock_that_is_another_name_of_a_file_does_not_change_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("years")
    os.link(tmp_path / "thesis.txt", tmp_path / "run" / LOCK)
    with locked(tmp_path / "run", "run"):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years"
