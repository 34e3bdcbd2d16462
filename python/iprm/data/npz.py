"""Arrays in .npz and .npy files: a header is checked before memory of the size it declares is taken, and no object is
unpickled."""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from iprm.errors import InputError

#: ``x_<modality>`` is the array of a modality.
PREFIX = "x_"
#: What numpy and zipfile raise of a file that is no archive, no array, or a part of one.
BROKEN = (ValueError, OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class Header(NamedTuple):
    """What the header of an array declares. by_columns: in Fortran order."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> Header:
    """Reads the header alone.

    Raises:
        ValueError: it is not one of an array of numbers. Errors of Python's parser, which numpy lets through, are among them.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the .npy format is none of arrays of numbers")
    try:
        return Header(*read[version](stream))
    except (TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f"its header is not one of an array ({error})") from error


def open_archive(path: Path) -> zipfile.ZipFile:
    """The archive.

    Raises:
        InputError: it is none.
    """
    try:
        return zipfile.ZipFile(path)
    except BROKEN as error:
        raise InputError(f"{path}: not a readable .npz file: {error}") from error


# whole arrays


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, by name.

    Raises:
        InputError: there is no such file, it is none, an array is broken or of objects, or all take more memory than there is.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    with path.open("rb") as start:
        if start.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise InputError(f"{path}: expected an .npz of several arrays (numpy.savez), got a single array")
    with open_archive(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        unpacked, there = sum(entry.file_size for entry in entries.values()), memory()
        if unpacked > there:
            raise InputError(f"{path}: its arrays would take {unpacked} bytes, and this machine has {there}")
        return {name: _whole(path, archive, name, entry) for name, entry in entries.items()}


def memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _whole(path: Path, archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo) -> np.ndarray:
    try:
        with archive.open(entry) as stream:
            header = read_header(stream)
        if not header.dtype.hasobject and header.size > entry.file_size:
            raise EOFError(f"it declares a shape {header.shape} of {header.dtype}, and holds {entry.file_size} bytes")
        with archive.open(entry) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # of a broken file zipfile, its decompressors and numpy each raise errors of their own
        if "Object arrays cannot be loaded" in str(error):
            raise InputError(f"{path}: array {name!r} cannot be read without running code it holds: {error}") from error
        raise InputError(f"{path}: array {name!r} is broken: {str(error) or type(error).__name__}") from error


# arrays in parts


@dataclass(frozen=True)
class StoredArray:
    """An array of numbers or objects that a file holds: alone, or as a member of an archive. `held` bytes follow its header."""

    file: Path
    member: str | None
    header: Header
    held: int

    @property
    def label(self) -> str:
        return f"{self.file}" if self.member is None else f"{self.file}: array {self.member!r}"

    def blocks(self, rows: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The values as an array of `shape`, at most `rows` rows at a time; one in Fortran order is read whole.

        Raises:
            InputError: the file is broken.
        """
        parts = self._mapped(rows, shape) if self.member is None else self._unpacked(rows, shape, self.member)
        for first in range(0, shape[0], rows):
            try:
                block = next(parts)
            except BROKEN as error:
                raise InputError(f"{self.label} is broken: {error}") from error
            if len(block) != min(rows, shape[0] - first):
                raise InputError(f"{self.label} is broken: it ends after row {first + len(block)} of {shape[0]}")
            yield block

    def _mapped(self, rows: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        whole = np.load(self.file, mmap_mode="r", allow_pickle=False).reshape(shape)
        for start in range(0, shape[0], rows):
            yield whole[start : start + rows]

    def _unpacked(self, rows: int, shape: tuple[int, ...], member: str) -> Iterator[np.ndarray]:
        count, *row = shape
        with zipfile.ZipFile(self.file) as archive, archive.open(f"{member}.npy") as file:
            read_header(file)
            if self.header.by_columns and len(self.header.shape) > 1:
                whole = np.frombuffer(file.read(), self.header.dtype).reshape(self.header.shape[::-1]).T.reshape(shape)
                for start in range(0, count, rows):
                    yield whole[start : start + rows]
                return
            size = math.prod(row) * self.header.dtype.itemsize
            for start in range(0, count, rows):
                content = file.read(size * min(rows, count - start))
                yield np.frombuffer(content, self.header.dtype).reshape(-1, *row)


def stored_member(archive: zipfile.ZipFile, file: Path, name: str) -> StoredArray:
    """The array of that name in an archive, which is in `file`.

    Raises:
        InputError: its header cannot be read.
    """
    try:
        with archive.open(f"{name}.npy") as stream:
            header = read_header(stream)
            return StoredArray(file, name, header, archive.getinfo(f"{name}.npy").file_size - stream.tell())
    except BROKEN as error:
        raise InputError(f"{file}: array {name!r} cannot be read: {error}") from error


def stored_file(file: Path) -> StoredArray:
    """The array of an .npy file.

    Raises:
        InputError: its header cannot be read.
    """
    try:
        with file.open("rb") as stream:
            header = read_header(stream)
            return StoredArray(file, None, header, file.stat().st_size - stream.tell())
    except BROKEN as error:
        raise InputError(f"{file} cannot be read: {error}") from error
