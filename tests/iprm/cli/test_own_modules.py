"""Where the modules that a setting names are imported from: the folder where the command was started, and no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import iprm
from feature_files import arrays, save
from forked import run_commands

RUN = "runs/fit/version_0"
OPTIONS = ("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false")
MINE = """
from pathlib import Path
from iprm.data.datasets.features import Features

class Data(Features):
    def __init__(self, path: str = "features.npz"):
        super().__init__(path)

Path(__file__).with_suffix(".ran").touch()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder where a run of the user's own dataset was started."""
    folder = tmp_path_factory.mktemp("mine")
    save(folder, arrays())
    (folder / "mine.py").write_text(MINE)
    assert run_commands([(folder, ("fit", "--data", "mine.Data", "--data.path", "features.npz", *OPTIONS))]) == [0]
    return folder


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `iprm ARGUMENTS` in a folder by a script as pip installs it, whose own folder is the first on sys.path."""
    paths = [str(Path(path).absolute()) for path in sys.path if path]
    (folder.parent / "bin").mkdir(exist_ok=True)
    entry = folder.parent / "bin/iprm"
    entry.write_text(f"import sys; sys.path += {paths!r}; from iprm.cli.main import main; sys.exit(main())")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, entry, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "command", ["resume", pytest.param("test", marks=pytest.mark.slow), pytest.param("predict", marks=pytest.mark.slow)]
)
def test_a_run_of_ones_own_dataset_is_read_again_by_the_installed_script(folder, command):
    best = next((folder / RUN / "checkpoints").glob("*.ckpt"))
    read_again = ("--config", f"{RUN}/config.yaml", "--ckpt_path", str(best))
    ended = script(folder, command, *((RUN, "--trainer.max_epochs", "2") if command == "resume" else read_again))
    assert ended.returncode == 0, ended.stderr


def test_no_module_of_a_run_is_imported_from_another_folder(folder, tmp_path):
    """The parser enters the folder of a configuration: what lies there must not be found."""
    (tmp_path / "theirs").symlink_to(folder / RUN)
    (folder / RUN / "mine.py").write_text(MINE)
    for command in (
        "resume theirs --trainer.max_epochs 9",
        f"test --config theirs/config.yaml --ckpt_path {folder / RUN}/states/batch=00000003.ckpt",
    ):
        code, _, err = iprm(tmp_path, *command.split())
        assert (code, "No module named 'mine'" in err) == (2, True), err
    assert not (folder / RUN / "mine.ran").exists()


def test_the_search_path_is_absolute_while_a_command_runs_and_as_before_afterwards(tmp_path, monkeypatch):
    """The current folder is the last, so that it shadows no other module."""
    seen = []
    monkeypatch.setattr(sys, "path", ["", "relative", *filter(None, sys.path)])
    monkeypatch.setattr("iprm.cli.main._dispatch", lambda arguments: seen.extend(sys.path) or 0)
    before = sys.path[:]
    assert iprm(tmp_path, "info").code == 0
    assert sys.path == before
    assert seen[:2] == [str(tmp_path), str(tmp_path / "relative")]
    assert all(map(os.path.isabs, seen))
    monkeypatch.setattr(sys, "path", [path for path in before[2:] if path != str(tmp_path)])
    seen.clear()
    iprm(tmp_path, "fit")
    assert seen == list(dict.fromkeys([*sys.path, str(tmp_path)]))
    seen.clear()
    iprm(tmp_path, "report", ".")
    assert str(tmp_path) not in seen
