"""Files that are written completely or not at all, folders that one process creates or locks, and the removal of what a command
that failed has added."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where no folder is locked
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary file in the same folder and renames it: other processes see the old content or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def new_folder(candidates: Iterable[Path]) -> Path:
    """Creates the first of these folders that does not exist, and those above it. Two processes never get the same folder."""
    for folder in candidates:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise ValueError("candidates: expected at least one that does not exist")


@contextlib.contextmanager
def created(folder: Path, *, anew: bool = False) -> Iterator[Path]:
    """Creates the folder, with `anew` under a name that does not exist yet: NAME, NAME-1, ...

    If an exception leaves the context, the new folders in which nothing was written are removed.
    """
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(1)))
    absent = _absent(folder)
    if anew:
        folder = new_folder(names)
    else:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        _remove_empty([folder, *absent] if anew else absent)
        raise


def check_output(path: Path, *marks: str) -> None:
    """Checks that a file can be written to `path`, by a temporary file in its folder, of which nothing remains.

    Args:
        path: the file; it may exist.
        marks: texts, one of which begins every file that may be replaced, within its first 4 KiB.

    Raises:
        InputError: `path` is a file without any of the marks.
        OSError: `path` is a folder, or its folder cannot be created or written to.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.is_file():
        with path.open("rb") as file:
            beginning = file.read(4096)
        if beginning and not any(mark.encode() in beginning for mark in marks):
            raise InputError(f"{path}: this file was not written by this command, and is not replaced; choose another --output")
    elif path.exists():
        return  # a device or pipe
    absent = _absent(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    finally:
        _remove_empty(absent)


def check_outputs(folder: Path, described: str, mark: str, *others: str) -> None:
    """Checks that several files can be written to a folder. They may replace those of an earlier call, of which the file
    `described` has the mark; without it, none of them may exist.

    Raises:
        InputError, OSError: see `check_output`.
    """
    earlier = (folder / described).is_file()
    check_output(folder / described, mark)
    for name in others:
        check_output(folder / name, *([""] if earlier else []))


def _absent(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, the lowest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


class Added:
    """Knows what exists in a folder, and removes what was added to it later.

    Args:
        folder: a folder that only this process writes to; it may be absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before, self._absent = set(folder.rglob("*")), _absent(folder)

    def remove(self, folder: Path) -> None:
        """Removes what was added to the folder, or to another that this process has created beside it."""
        for path in sorted(set(folder.rglob("*")) - self._before, reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        _remove_empty(self._absent if folder == self.folder else [folder, *self._absent])


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Within the context, no other process can lock the folder. The system releases the lock if this process is killed.

    On Windows, and on file systems without locks, every process gets the lock.

    Args:
        folder: the folder; it is not locked if it does not exist.
        what: what uses it, for the message: "run".

    Raises:
        InputError: another process has locked the folder.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _handles.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another process is using this {what}; wait until it has ended") from error
        except OSError:  # no locks on this file system
            pass
        yield
    finally:
        _handles.discard(handle)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked just now may not have closed its copy yet
        os.close(handle)


_handles: set[int] = set()  # a forked process, such as a worker of a DataLoader, would keep the lock of a killed parent


def _close_handles() -> None:
    for handle in _handles:
        os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_handles)
