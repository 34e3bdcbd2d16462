"""Files that are written completely or not at all, folders that one process creates, and the removal of what a command that
failed has added."""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import InputError, UnreadableError

#: Errors of a full disk or quota.
FULL = (errno.ENOSPC, errno.EDQUOT)
#: Seconds without a write after which a temporary file is considered abandoned: a running save writes continually.
ABANDONED = 3600


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yields a new file, which replaces `path` when the context ends; after an exception, `path` is as it was.

    The file is written beside `path`, flushed to disk and renamed. Other processes, and those after a kill at any moment, see
    the old content or the new. The mode is that of the file that is replaced, or follows the umask. A link remains one, and its
    target is replaced. A device or pipe is written to directly. Missing folders are created.

    A temporary file that a killed process has left is removed by a later write of the same file, see `ABANDONED`.

    Args:
        path: the file.
        mode: as in `open`: "w" for text in UTF-8, whose line ends are not translated; "wb" or "w+b" for bytes.

    Raises:
        OSError: the file cannot be written, for example to a full disk; the error names `path`.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if path.exists() and not path.is_file():
        with path.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    name = os.fsdecode(os.fsencode(target.name)[:200])  # so that the temporary name is no longer than a name may be
    remove_abandoned(target.parent, glob.escape(name))
    part = target.with_name(f".{name}.{secrets.token_hex(4)}.part")
    try:
        with part.open(mode.replace("w", "x"), **text) as file:  # type: ignore[call-overload]
            if target.exists():
                part.chmod(target.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):  # torch.save raises one while it handles the error of the file
            cause = cause.__context__
        if isinstance(cause, OSError) and cause.errno and (cause.filename is None or str(cause.filename) == str(part)):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file by this text or these bytes; see `replacing`."""
    with replacing(path, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)


def remove_abandoned(folder: Path, names: str) -> None:
    """Removes temporary files that killed processes have left in a folder, of files whose names match the pattern."""
    for part in folder.glob(f".{names}.????????.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


#: Parts of the messages of torch's errors of memory, which are RuntimeErrors.
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context in which a file is read.

    Raises:
        UnreadableError: the path is that of a folder, or of a device or pipe, which a reader would wait for; or the system or a
            lack of memory prevents reading. The message states the cause.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise UnreadableError(f"{path}: expected a file, got a device or pipe")
        with path.open("rb") as file:
            file.read(1)
        yield
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # of a position that damaged content has named
            raise
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(part in str(error) for part in NO_MEMORY):
            raise
        raise UnreadableError(f"{path}: cannot be read: not enough memory") from error


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


def check_received(folder: Path) -> None:
    """Checks that a folder, which may come from anyone, holds only files, folders, and links to those. A command that writes to
    the folder would replace or delete files elsewhere through other links, and wait for the reader of a pipe.

    Raises:
        InputError: there is such a link, or a device or pipe. The message names it.
        OSError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    top = Path(os.path.realpath(folder))
    for place, folders, files in os.walk(top, onerror=refuse):
        for path in (Path(place, name) for name in (*folders, *files)):
            shown = folder / path.relative_to(top)
            if path.is_symlink():
                if not Path(target := os.path.realpath(path)).is_relative_to(top):
                    raise InputError(f"{shown}: a link to {target}, which is not in {folder}; nothing is written through it")
            elif not path.is_dir() and not path.is_file() and path.exists():
                raise InputError(f"{shown}: expected a file, got a device or pipe")


def check_output(path: Path, *marks: str) -> None:
    """Checks that a file can be written to `path`, by a temporary file in its folder, of which nothing remains.

    A link to another folder is refused, except in /dev: the link may come from anyone.

    Args:
        path: the file; it may exist.
        marks: texts, one of which begins every file that may be replaced, within its first 4 KiB.

    Raises:
        InputError: `path` is a file without any of the marks, or a link to another folder.
        OSError: `path` is a folder, or its folder cannot be created or written to.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    target, here = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    if path.is_symlink() and target.parent != here and not path.absolute().is_relative_to("/dev"):
        raise InputError(f"{path}: a link to {target}, in another folder; choose another --output")
    if path.is_file():
        with path.open("r+b") as file:  # refused if it is not writable
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
