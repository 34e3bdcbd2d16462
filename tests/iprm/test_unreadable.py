"""What cannot be read is named with the cause: nobody is told that a good file is damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from command import iprm
from iprm.cli import export as command
from iprm.compare.run import _refuse_other_data
from iprm.data.datasets.features import Features
from iprm.errors import InputError, UnreadableError
from iprm.files import reading
from iprm.training import checkpoint as checkpoints
from iprm.training.checkpoint import read_checkpoint, state_to_resume
from rights import without_rights
from run_folders import write_comparison


def denied(path: Path) -> None:
    path.chmod(0)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def broken_disk(path: Path) -> None:
    """The memory of this process has no page at address 0: reading it is an I/O error."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


CAUSES = {
    denied: "cannot be read: Permission denied",
    folder: "there is no such checkpoint; it is a folder",
    pipe: "expected a file, got a device or pipe",
    broken_disk: "cannot be read: Input/output error",
}


@pytest.fixture
def model(tmp_path) -> Path:
    return checkpoint(tmp_path)[0]


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
@pytest.mark.parametrize("command", ["export", "predict"])
def test_a_checkpoint_that_cannot_be_read_is_told_with_the_cause(model, command, cause):
    cause(model)
    arguments = {"export": ("--output", "new"), "predict": ("--input", "x.npz")}[command]
    outcome = without_rights(model.parent, command, "--ckpt_path", "model.ckpt", *arguments)
    assert outcome == (2, "", f"iprm: model.ckpt: {CAUSES[cause]}\n")


ERRORS = {
    "Python": MemoryError(),
    "numpy": np._core._exceptions._ArrayMemoryError((2**40,), np.dtype(float)),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    "mmap": RuntimeError("unable to mmap 4096 bytes from file <model.ckpt>: Cannot allocate memory (12)"),
}


def raising(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_lack_of_memory_is_told_as_one(model, monkeypatch, error):
    monkeypatch.setattr(torch, "load", raising(error))
    with pytest.raises(UnreadableError, match=f"{model}: cannot be read: not enough memory"):
        read_checkpoint(model)


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamReader failed"), OSError(errno.EINVAL, "Invalid argument")])
def test_another_error_of_torch_is_one_of_the_content(model, monkeypatch, error):
    monkeypatch.setattr(torch, "load", raising(error))
    with pytest.raises(InputError, match="not a checkpoint of iprm fit") as raised:
        read_checkpoint(model)
    assert not isinstance(raised.value, UnreadableError)


def test_the_state_before_is_offered_if_the_last_is_damaged_alone(tmp_path, monkeypatch):
    """A lack of memory would only be met again."""
    (tmp_path / "states").mkdir()
    (tmp_path / "config.yaml").touch()
    for batch in range(2):
        checkpoint(tmp_path)[0].rename(tmp_path / f"states/batch={batch:08d}.ckpt")
    monkeypatch.setattr(checkpoints.torch, "load", raising(MemoryError()))
    with pytest.raises(InputError) as raised:
        state_to_resume(tmp_path)
    assert str(raised.value) == f"{tmp_path}/states/batch=00000001.ckpt: cannot be read: not enough memory"


def test_a_lack_of_memory_anywhere_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_inference", raising(ERRORS["numpy"]))
    code, out, err = iprm(tmp_path, "export", "--ckpt_path", "model.ckpt", "--output", "new")
    assert (code, out) == (2, "")
    assert err.startswith("iprm: not enough memory: Unable to allocate 8.00 TiB for an array")
    assert err.count("\n") == 1


def test_a_recording_that_cannot_be_read_is_told_with_the_cause(tmp_path):
    import soundfile

    (tmp_path / "recordings").mkdir()
    path = tmp_path / "recordings/0_a_0.wav"
    soundfile.write(path, np.zeros(8000), 8000)
    path.chmod(0)
    code, out, err = without_rights(tmp_path, "check", "av-digits", "--path", "recordings")
    assert code != 0
    assert "recordings/0_a_0.wav: cannot be read: Permission denied" in out + err


def test_a_comparison_whose_files_cannot_be_read_is_not_taken_for_another(tmp_path, features):
    write_comparison(tmp_path / "report")
    (tmp_path / "report/settings.json").chmod(0)
    outcome = without_rights(tmp_path, "compare", "--data", "features", "--path", "features.npz", "--output", "report")
    assert outcome == (2, "", "iprm: report/settings.json: cannot be read: Permission denied\n")
    test = tmp_path / "report/iprm/seed=0/test.json"
    test.unlink()
    test.symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=r"test\.json: cannot be read: Input/output error"):
        _refuse_other_data(test.parent, Features(features))


def test_a_folder_is_not_read_as_a_file(tmp_path):
    with pytest.raises(UnreadableError, match=f"{tmp_path}: cannot be read: Is a directory"), reading(tmp_path):
        pass


def test_a_file_that_can_be_read_is(tmp_path):
    (tmp_path / "a").write_text("a")
    with reading(tmp_path / "a"):
        assert (tmp_path / "a").read_text() == "a"
