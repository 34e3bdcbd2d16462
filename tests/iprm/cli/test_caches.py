"""Caches where there is no home, or none that can be written: commands run, and say in one line that they keep no caches."""

from __future__ import annotations

import atexit
import getpass
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from iprm.cli.caches import provide_caches
from iprm.data.datasets import recordings

CACHES = ("MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
NAMES = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TRITON_HOME")


@pytest.fixture
def environment(monkeypatch, tmp_path) -> pytest.MonkeyPatch:
    """Without any of the variables; what is done at the end of the process is done at the end of the test."""
    for name in (*CACHES, *NAMES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return monkeypatch


def nobody(*_) -> None:
    raise KeyError("uid not found")


def replaced(capsys) -> tuple[set[str], str]:
    """The variables that `provide_caches` sets, and what it says."""
    before = dict(os.environ)
    provide_caches()
    return {name for name in CACHES if os.environ.get(name) != before.get(name)}, capsys.readouterr().err


def test_a_user_with_a_home_keeps_what_there_is(environment, tmp_path, capsys):
    environment.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert replaced(capsys) == (set(), "")
    assert list((tmp_path / "home").iterdir()) == []


def test_without_a_home_and_a_name_every_cache_has_a_folder_of_the_run(environment, tmp_path, capsys):
    environment.setattr(pwd, "getpwuid", nobody)
    names, said = replaced(capsys)
    assert names == {"MPLCONFIGDIR", "TRITON_CACHE_DIR"}
    folders = "~/.config/matplotlib, ~/.triton/cache"
    assert said == f"iprm: caches in {folders} cannot be written; temporary ones are used and deleted at the end\n"
    assert all(Path(os.environ[name]).parent.parent == tmp_path for name in names)
    assert getpass.getuser() == f"uid_{os.getuid()}"
    assert replaced(capsys) == (set(), ""), "the processes of this run have the same"


@pytest.mark.parametrize("variable", ["HOME", *CACHES])
def test_folders_that_cannot_be_written_are_named(environment, tmp_path, capsys, variable):
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    environment.setenv("HOME", str(tmp_path / "home"))
    environment.setenv(variable, str(tmp_path / "file/below"))
    names, said = replaced(capsys)
    assert names == ({"MPLCONFIGDIR", "TRITON_CACHE_DIR"} if variable == "HOME" else {variable})
    assert str(tmp_path / "file/below") in said
    assert said.count("\n") == 1


def test_folders_of_a_read_only_home_are_not_taken_for_writable(environment, tmp_path, capsys):
    environment.setenv("HOME", str(tmp_path))
    environment.setattr(os, "access", lambda path, mode: not str(path).startswith(str(tmp_path)))
    assert replaced(capsys)[0] == set(CACHES)


def test_the_folders_are_deleted_at_the_end(environment, tmp_path):
    done = []
    environment.setattr(atexit, "register", lambda *call, **options: done.append((call, options)))
    environment.setattr(pwd, "getpwuid", nobody)
    provide_caches()
    (((function, *arguments), options),) = done
    Path(os.environ["MPLCONFIGDIR"]).mkdir(parents=True)
    function(*arguments, **options)
    assert function is shutil.rmtree
    assert not Path(os.environ["MPLCONFIGDIR"]).exists()


def test_recordings_are_read_without_a_cache_where_there_is_no_home(environment, caplog):
    environment.setattr(pwd, "getpwuid", nobody)
    cache = recordings.default_cache_dir() / "some.npz"
    assert recordings._cached(cache, "key", (1,)) is None
    recordings._store(cache, "key", None)
    assert "the spectrograms cannot be cached: there is no home folder" in caplog.text
    assert not Path("~").exists()


#: Runs a command as a user without an entry in /etc/passwd, who may read every file, as Python may be in the folder of root.
STRANGER = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
STRANGER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv, to run as another user")
@pytest.mark.parametrize("home", [None, "/root"], ids=["no home", "a home of another user"])
@pytest.mark.parametrize(
    "command", [["info"], ["compare", "--data", "digits", "--methods", "sum", "--seeds", "1", "--epochs", "1"]]
)
def test_a_user_whom_the_machine_does_not_know_runs_commands(command, home):
    with tempfile.TemporaryDirectory() as name:  # the folders of pytest are closed to other users
        folder = Path(name)
        folder.chmod(0o777)
        _runs(folder, command, home)


def _runs(folder: Path, command: list[str], home: str | None) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in (*NAMES, *CACHES)}
    variables = kept | ({"HOME": home} if home else {}) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    call = [*STRANGER, sys.executable, "-m", "iprm", *command]
    done = subprocess.run(call, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("\n") == (command != ["info"]), done.stderr
    assert {path.name for path in folder.iterdir()} <= {"runs"}
