"""Locks of folders: one process at a time continues a run or a comparison."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where no folder is locked
    fcntl = None  # type: ignore[assignment]

#: The file that is locked: NFS locks no folder, and a file only if it is open for writing.
LOCK = ".iprm.lock"


@contextlib.contextmanager
def locked(folder: Path, what: str, patience: float = 0) -> Iterator[None]:
    """Within the context, no other process can lock the folder, on this machine or another that shares the folder.

    The file `LOCK` in the folder is locked, names the holder, and is removed at the end. The system releases the lock if this
    process is killed; the file that then remains is locked by the next. A context within another of the same process and folder
    has no effect. On Windows, and on file systems without locks, every process gets the lock.

    Args:
        folder: the folder; it is not locked if it does not exist.
        what: what uses it, for the message: "run".
        patience: seconds to wait for another process.

    Raises:
        InputError: another process has locked the folder. The message names it.
        OSError: the folder cannot be written to.
    """
    key = folder.resolve()
    if fcntl is None or not folder.is_dir() or key in _handles:
        yield
        return
    path = folder / LOCK
    handle = _handles[key] = _lock(path, folder, what, time.monotonic() + patience)
    try:
        yield
    finally:
        if _handles.pop(key, None) is not None:
            with contextlib.suppress(OSError):
                if _is(handle, path):
                    path.unlink()  # before the lock is released: `_lock` notices that the file it has opened is gone
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked just now may not have closed its copy yet
            os.close(handle)


def _lock(path: Path, folder: Path, what: str, deadline: float) -> int:
    """Locks the file, which is created if it is missing; returns its handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise InputError(f"{path}: expected a file, which is locked while a process uses this {what}")
            held = False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = True
            except OSError:  # no locks on this file system
                pass
            if not held and _is(handle, path):
                if os.fstat(handle).st_nlink == 1:  # in a folder of anyone, it may be another name of any file
                    with contextlib.suppress(OSError):  # the disk may be full
                        os.ftruncate(handle, 0)
                        os.pwrite(handle, _this_process(), 0)
                return handle
            holder, late = _holder(handle), time.monotonic() - deadline
            if held and (late > 1 or (late >= 0 and holder)):  # a process that has just locked it has not written yet
                raise InputError(f"{folder}: another process is using this {what}; wait until it has ended{holder}")
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if held:
            time.sleep(0.05)


def _is(handle: int, path: Path) -> bool:
    """Whether the path is still that of the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _this_process() -> bytes:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {platform.node()} since {now}: {command}".encode("utf-8", "backslashreplace")


def _holder(handle: int) -> str:
    """The content of the locked file, for a message; it may be empty for a moment, or foreign."""
    text = os.pread(handle, 400, 0).decode("utf-8", "replace")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return f" ({text})" if text else ""


_handles: dict[Path, int] = {}  # a forked process, such as a worker of a DataLoader, would keep the lock of a killed parent


def _close_handles() -> None:
    for handle in _handles.values():
        os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_handles)
