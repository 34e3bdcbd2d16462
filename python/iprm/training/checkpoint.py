"""Checkpoint files: atomic writes, reads that run no code, and the saved states that a run resumes from."""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from iprm.errors import InputError, UnreadableError, check_whole
from iprm.files import reading, remove_abandoned, replacing

from .archive import Sealing, check_archive

STATES = "states"
#: Key of the state that `RunState` saves in a checkpoint.
RUN_STATE = "RunState"
#: Largest counter of a state; Lightning adds to them, and stores them in 64 bits.
MOST_COUNTED = 2**53


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes single-file checkpoints atomically: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    A checkpoint is written to a temporary file in the same folder, flushed to disk, and renamed: a run killed at any moment
    leaves either the old file or the new one. Temporary files of killed saves are removed by later saves in that folder, an
    hour after their last write. Files that hold anything but tensors and plain values are refused.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)  # a remote file system
        remove_abandoned(Path(path).parent, "*.ckpt")
        with replacing(Path(path), "wb") as file:
            sealing = Sealing(file)
            torch.save(checkpoint, sealing)  # type: ignore[arg-type]  # torch calls write and flush alone
            sealing.seal()
        return None

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return _read(path, ("state_dict",), "Lightning checkpoint of tensors and plain values alone")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a file ``*.ckpt``, or a link of that name; never a folder, which Lightning would remove with all it has."""
        if "://" in str(path):
            return super().remove_checkpoint(path)
        path = Path(path)
        if path.suffix == ".ckpt" and ".." not in path.parts and (path.is_file() or path.is_symlink()):
            path.unlink()
        return None


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Loads a checkpoint of a `FusionClassifier` on the CPU, without running any code that the file may hold.

    Args:
        path: the file.
        mmap: map tensors from the file instead of copying them into memory.

    Raises:
        InputError: the file is missing, truncated, no such checkpoint, or holds more than tensors and plain values.
    """
    return _read(path, ("hyper_parameters", "state_dict"), "checkpoint of iprm fit", mmap=mmap)


def _read(path: str | Path, parts: Sequence[str], what: str, *, mmap: bool = False) -> dict[str, Any]:
    """Loads a checkpoint file and verifies that each key in `parts` is a dict. `what` names the file type in errors."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise InputError(f"{path}: there is no such checkpoint" + ("; it is a folder" if path.is_dir() else ""))
    content, reason = None, ""
    # the readers raise many errors for broken archives and pickles: BadZipFile, IndexError, AttributeError, AssertionError
    try:
        with reading(path), path.open("rb") as file:
            if zipfile.is_zipfile(file):  # for other files torch.load would try its legacy formats
                check_archive(path, file)
                file.seek(0)
                mapped = mmap and str(path).isprintable()  # torch opens a path of UTF-8 alone
                content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except InputError:
        raise
    except Exception as error:
        reason = f": {str(error) or type(error).__name__}" if type(error) is ValueError else ""
    if not (isinstance(content, dict) and all(isinstance(content.get(name), dict) for name in parts)):
        raise InputError(f"{path}: not a {what}, or a part of one{reason}")
    return content


def logged_steps(checkpoint: Mapping[str, Any]) -> int:
    """The step at which the loggers of a resumed run write their next row.

    Raises:
        InputError: the checkpoint has no such number.
    """
    try:
        steps = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"the checkpoint is not the state of a run: it has no {error}") from error
    return check_whole("the checkpoint's number of steps", steps, 0, MOST_COUNTED)


def check_counters(name: str, found: Any, known: Any) -> None:
    """Raises InputError unless the counters of Lightning's loops are whole numbers from 0 up, under names that it knows itself:
    it would set any other name as an attribute."""
    if not isinstance(known, dict):
        check_whole(f"the checkpoint's {name}", int(found) if isinstance(found, bool) else found, 0, MOST_COUNTED)
        return
    if not isinstance(found, dict) or not found.keys() <= known.keys():
        raise InputError(f"the checkpoint's {name}: expected {', '.join(known)}, got {found!r}")
    for part, value in found.items():
        check_counters(f"{name}.{part}", value, known[part])


def saved_states(run: Path) -> list[Path]:
    """The saved states of a run, oldest first: file names have the number of batches in eight digits."""
    return sorted((run / STATES).glob("batch=*.ckpt"))


def state_to_resume(run: Path, previous: bool = False) -> Path:
    """The last saved state of a run, or with `previous` the one before it, after checking that it can be read.

    Raises:
        InputError: there is no such run or state, or the state cannot be read.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: there is no such run; expected the folder of one, such as runs/digits/fit/version_0")
    states = saved_states(run)
    if len(states) < 1 + previous:
        which = "no state before the last" if states else "no state"
        raise InputError(f"{run}: {which} was saved to resume from")
    state = states[-2 if previous else -1]
    try:
        callbacks = read_checkpoint(state).get("callbacks")
    except InputError as error:
        command = shlex.join(["iprm", "resume", str(run), "--previous"])
        damaged = not isinstance(error, UnreadableError)
        other = f"; to resume from the state before it: {command}" if damaged and not previous and states[1:] else ""
        raise InputError(f"{error}{other}") from error
    if not isinstance(callbacks, dict) or not isinstance(callbacks.get(RUN_STATE), dict):
        raise InputError(f"{state}: not the state of a run: it has no entry of {RUN_STATE}")
    return state
