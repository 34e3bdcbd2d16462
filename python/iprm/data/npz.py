"""Arrays in .npz and .npy files. Headers are checked before memory of the declared size is allocated; objects are never
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

#: Prefix of the array of a modality: ``x_<modality>``.
PREFIX = "x_"
#: Errors that numpy and zipfile raise for foreign or truncated files.
BROKEN = (ValueError, OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class Header(NamedTuple):
    """The header of an array. by_columns: Fortran order."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> Header:
    """Reads the header alone.

    Raises:
        ValueError: it is not the header of a numeric array. Errors of Python's parser, which numpy passes on, are included.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the .npy format is none of arrays of numbers")
    try:
        return Header(*read[version](stream))
    except (TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f"its header does not describe an array ({error})") from error


def open_archive(path: Path) -> zipfile.ZipFile:
    """Opens an .npz archive.

    Raises:
        InputError: the file is not a readable archive.
    """
    try:
        return zipfile.ZipFile(path)
    except BROKEN as error:
        raise InputError(f"{path}: not a readable .npz file: {error}") from error


# whole arrays


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, by name.

    Raises:
        InputError: the file is missing or not an .npz, an array is broken or of objects, or they exceed the memory.
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
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _whole(path: Path, archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo) -> np.ndarray:
    try:
        with archive.open(entry) as stream:
            header = read_header(stream)
        if not header.dtype.hasobject and header.size > entry.file_size:
            raise EOFError(f"it declares a shape {header.shape} of {header.dtype}, and holds {entry.file_size} bytes")
        with archive.open(entry) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # zipfile, its decompressors and numpy each raise their own errors for broken files
        if "Object arrays cannot be loaded" in str(error):
            raise InputError(f"{path}: array {name!r} cannot be read without running code it holds: {error}") from error
        raise InputError(f"{path}: array {name!r} is broken: {str(error) or type(error).__name__}") from error


# arrays in parts


@dataclass(frozen=True)
class StoredArray:
    """An array in an .npy file or in a member of an .npz archive. `held` bytes follow its header."""

    file: Path
    member: str | None
    header: Header
    held: int

    @property
    def label(self) -> str:
        return f"{self.file}" if self.member is None else f"{self.file}: array {self.member!r}"

    def blocks(self, rows: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yields the array, viewed as `shape`, at most `rows` rows at a time. An array in Fortran order is read at once.

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
    """The array `name` of an archive opened from `file`.

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
