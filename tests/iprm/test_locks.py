"""One process at a time continues a run or a comparison."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest
from command import iprm
from feature_files import arrays, save
from forked import run_at_once
from holder import held
from iprm import locks
from iprm.errors import InputError
from iprm.locks import LOCK, locked
from rights import without_rights


def test_the_message_names_the_holder(tmp_path):
    since = time.strftime("%Y-%m-%d")
    with held(tmp_path) as process, pytest.raises(InputError) as refused, locked(tmp_path, "run"):
        pass
    message = str(refused.value)
    before = (
        f"{tmp_path}: another process is using this run; wait until it has ended (process {process.pid} on {platform.node()}"
    )
    assert message.startswith(f"{before} since {since}")
    assert message.endswith(": iprm resume 'a run')")


def test_a_killed_process_releases_its_lock_and_the_file_it_leaves_is_no_obstacle(tmp_path):
    with held(tmp_path) as process:
        process.kill()
        process.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "run"):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_within_a_lock_of_the_same_folder_has_no_effect(tmp_path):
    with locked(tmp_path, "run"):
        with locked(tmp_path / "." / "", "run"):
            pass
        assert (tmp_path / LOCK).exists()
        assert len(locks._handles) == 1
    assert not (tmp_path / LOCK).exists()


def test_the_file_of_an_ended_lock_that_another_process_had_opened_is_not_locked_in_its_place(tmp_path, monkeypatch):
    """If it were, two processes could hold the lock at once: one on the removed file, the other on the file made after it."""
    flock = locks.fcntl.flock
    opened = []

    def removed_meanwhile(handle: int, operation: int) -> None:
        opened.append(handle)
        if len(opened) == 1:
            (tmp_path / LOCK).unlink()
        flock(handle, operation)

    monkeypatch.setattr(locks.fcntl, "flock", removed_meanwhile)
    with locked(tmp_path, "run"):
        assert (tmp_path / LOCK).exists()
        assert locks._is(locks._handles[tmp_path.resolve()], tmp_path / LOCK)


def test_the_file_of_another_process_is_not_removed(tmp_path):
    with locked(tmp_path, "run"):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text("theirs")
    assert (tmp_path / LOCK).read_text() == "theirs"


def test_a_patient_process_gets_the_lock_when_it_is_released(tmp_path):
    with held(tmp_path) as process:
        began = time.monotonic()
        with pytest.raises(InputError), locked(tmp_path, "run", patience=0.3):
            pass
        assert time.monotonic() - began >= 0.3
        process.kill()
        with locked(tmp_path, "run", patience=30):
            pass


def test_what_is_locked_is_a_file_that_is_open_for_writing(tmp_path, monkeypatch):
    """NFS locks nothing else."""
    modes = []
    monkeypatch.setattr(locks.fcntl, "flock", lambda handle, _: modes.append(locks.fcntl.fcntl(handle, locks.fcntl.F_GETFL)))
    with locked(tmp_path, "run"):
        pass
    assert {mode & os.O_ACCMODE for mode in modes} == {os.O_RDWR}


def test_without_locks_on_the_file_system_every_process_gets_one(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", without)
    with locked(tmp_path, "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_file_of_another_is_written_to_or_waited_for(tmp_path):
    """A run folder may come from others."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / LOCK).symlink_to("precious")
    with pytest.raises(OSError, match=str(tmp_path / LOCK)), locked(tmp_path, "run"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / LOCK).unlink()
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(InputError, match=f"{tmp_path / LOCK}: expected a file"), locked(tmp_path, "run"):
        pass


def test_what_a_holder_is_called_cannot_reach_the_terminal_as_control_characters(tmp_path):
    with held(tmp_path):
        (tmp_path / LOCK).write_bytes(b"\x1b[2J\n\xff" + b"x" * 10_000)
        with pytest.raises(InputError) as refused, locked(tmp_path, "run"):
            pass
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000


# runs


RUN = "runs/fit/version_0"
DATA = ("--data", "feature_files.NoisyFeatures", "--data.path", "features.npz")
SETTINGS = ("--model.feature_dim", "8", "--trainer.enable_progress_bar", "false")


@pytest.fixture
def run(tmp_path) -> Path:
    save(tmp_path, arrays())
    assert iprm(tmp_path, "fit", *DATA, *SETTINGS, "--trainer.max_epochs", "2").code == 0
    return tmp_path / RUN


def test_no_lock_is_left_in_a_run_and_one_that_a_killed_run_has_left_is_no_part_of_its_report(run):
    assert not list(run.rglob(LOCK))
    assert iprm(run.parents[2], "report", RUN).code == 0
    page = (run.parents[2] / "report.html").read_text()
    (run / LOCK).write_text("process 1 on elsewhere")
    (run.parent / LOCK).write_text("process 1 on elsewhere")
    assert iprm(run.parents[2], "report", RUN).code == 0
    assert (run.parents[2] / "report.html").read_text() == page


def test_a_report_needs_no_right_to_write_to_the_run(run):
    folder = run.parents[2]
    (folder / "out").mkdir()
    with held(run):
        for path in (run, *run.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        assert without_rights(folder, "resume", RUN).code == 2
        assert without_rights(folder, "report", RUN, "--output", "out/report.html").code == 0


def test_of_two_processes_that_resume_a_run_one_is_refused(run):
    folder = run.parents[2]
    resume = ["resume", RUN, "--trainer.max_epochs", "60"]
    codes = run_at_once([(folder, resume), (folder, resume)])
    assert sorted(codes) == [0, 2]
    log = (folder / f"log{codes.index(2)}.txt").read_text()
    assert log.startswith(f"iprm: {RUN}: another process is using this run; wait until it has ended (process ")
    assert f": iprm resume {RUN} --trainer.max_epochs 60)\n" in log
    assert log.count("\n") == 1


def test_the_state_to_resume_from_is_looked_for_under_the_lock(run):
    """Otherwise another process could remove it meanwhile."""
    last = max((run / "states").iterdir())
    last.write_bytes(b"damaged")
    with held(run):
        code, _, err = iprm(run.parents[2], "resume", RUN)
    assert (code, "another process is using this run" in err) == (2, True)
