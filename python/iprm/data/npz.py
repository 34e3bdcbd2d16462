"""Arrays in .npz and .npy files. No more is read than an array declares, and no code of a file is run."""

from __future__ import annotations

import collections
import contextlib
import io
import math
import sys
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from iprm.errors import InputError
from iprm.memory import available_memory

from .plain_objects import read_plain_objects

#: Prefix of the array of a modality: ``x_<modality>``.
PREFIX = "x_"
#: Bytes that are read and converted at a time.
PIECE = 2**20
#: Bytes that a header is read from. numpy refuses one of more than 10,000, but only after it has read as many as the file says.
LONGEST_HEADER = 2**14
#: Bytes of the longest directory of an archive, of about 50 bytes for each array. It takes 15 times as much in memory.
LONGEST_DIRECTORY = 2**22
#: Methods by which numpy compresses. Python's zipfile unpacks a block of the others at once, however large it is.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Header(NamedTuple):
    """Header of an .npy file. start: bytes before the content; size: bytes of the content, unless it is of objects."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, content: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """The array, or with `shape` some rows of it, in the memory of `content`."""
        return np.ndarray(self.shape if shape is None else shape, self.dtype, content, order="F" if self.by_columns else "C")


def read_header(stream: IO[bytes], length: int) -> Header:
    """The header of an .npy file of `length` bytes; raises an error, of any type, if it is broken."""
    start = io.BytesIO(stream.read(LONGEST_HEADER))
    version = np.lib.format.read_magic(start)
    if version not in HEADERS:
        raise ValueError(f"version {version} of the .npy format is none of arrays of numbers")
    header = Header(*HEADERS[version](start), start.tell())
    if min(header.shape, default=0) < 0 or header.dtype.itemsize == 0:
        raise ValueError(f"shape {header.shape} of {header.dtype}")
    if not header.dtype.hasobject and header.start + header.size != length:
        raise ValueError(f"shape {header.shape} of {header.dtype} takes {header.size} bytes, got {length - header.start}")
    return header


class Archive:
    """An .npz file, open within a context.

    path: the file; names: of its arrays, in the order of the file. Other members, such as notes, are left out.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing, no readable archive, or has several arrays of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: there is no such file")
        try:
            _check_directory(path)
            self._file = zipfile.ZipFile(path)
        # zipfile raises NotImplementedError for members of a version of the format that it does not read
        except (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
            if isinstance(error, OSError) and error.errno is not None and error.strerror:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            with path.open("rb") as start:
                if start.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                    message = f"{path}: expected an .npz of several arrays (numpy.savez), got a single array"
                    raise InputError(message) from error
            raise InputError(f"{path}: not a readable .npz file: {error}") from error
        self.names = [name.removesuffix(".npy") for name in self._file.namelist() if name.endswith(".npy")]
        if len(set(self.names)) < len(self.names):  # numpy and zipfile would read the last
            name, _ = collections.Counter(self.names).most_common(1)[0]
            self._file.close()
            raise InputError(f"{path}: it has several arrays {name!r}, expected one")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def arrays(self, names: Collection[str]) -> dict[str, StoredArray]:
        """The arrays of these names, of which the headers alone are read.

        Raises:
            InputError: a header is broken, or is not followed by the bytes that it declares; or the arrays exceed the memory.
        """
        check_memory(self.path, sum(self._file.getinfo(f"{name}.npy").file_size for name in names))
        return {name: StoredArray(self.path, self._file, name) for name in names}


class StoredArray:
    """An array of an open archive. header: its `Header`.

    Raises:
        InputError: the header is broken, or is not followed by the bytes that it declares.
    """

    def __init__(self, path: Path, file: zipfile.ZipFile, name: str) -> None:
        self.path, self.name, self._file = path, name, file
        self._member = file.getinfo(f"{name}.npy")
        with self._named():
            if self._member.compress_type not in METHODS:
                raise ValueError("expected it as numpy.savez or numpy.savez_compressed stores it")
            with file.open(self._member) as stream:
                self.header = read_header(stream, self._member.file_size)

    def read(self, *, plain_objects: bool = False) -> np.ndarray:
        """The whole array.

        Args:
            plain_objects: the array may be of objects, if each is a plain value: see `read_plain_objects`.

        Raises:
            InputError: the array is broken, or of objects.
        """
        dtype = self.header.dtype
        if not dtype.hasobject or (plain_objects and dtype == np.dtype(object)):
            with self._named(), self._content() as stream:
                content = np.empty(self._member.file_size - self.header.start, np.uint8)
                _fill(stream, content)
                if dtype.kind == "U":
                    _check_letters(content, dtype)
                if not dtype.hasobject:
                    return self.header.array(content)
        why = "it is of objects"
        if plain_objects and dtype == np.dtype(object):
            try:
                return read_plain_objects(content.data, self.header.shape)
            except Exception as error:  # the content may be anything
                why = f"it is of objects, and {str(error) or type(error).__name__}"
                if "stringdtype" in why:  # numpy saves text of this type by pickling it
                    what = f"array {self.name!r} is of StringDType; save {self.name}.astype(str)"
                    raise InputError(f"{self.path}: {what}") from error
        raise InputError(f"{self.path}: array {self.name!r} cannot be read without running code it holds: {why}")

    def blocks(self) -> Iterator[np.ndarray]:
        """Consecutive rows of an array of numbers, in blocks of `PIECE` bytes or of one row. An array in Fortran order is read
        whole before its first block.

        Raises:
            InputError: see `read`.
        """
        (count, *row), by_columns = self.header.shape, self.header.by_columns
        step = max(1, PIECE // max(1, math.prod(row) * self.header.dtype.itemsize))
        if by_columns or self.header.dtype.hasobject:
            whole = self.read()
            yield from (whole[first : first + step] for first in range(0, count, step))
            return
        with self._named(), self._content() as stream:
            for first in range(0, count, step):
                shape = (min(step, count - first), *row)
                content = np.empty(math.prod(shape) * self.header.dtype.itemsize, np.uint8)
                _fill(stream, content)
                yield self.header.array(content, shape)

    @contextlib.contextmanager
    def _content(self) -> Iterator[IO[bytes]]:
        """The bytes after the header; at the end of the context, that all of them were read, and their checksum."""
        with self._file.open(self._member) as stream:
            stream.read(self.header.start)
            yield stream
            if stream.read(1):
                raise ValueError("it holds more than it declares")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            raise InputError(f"{self.path}: array {self.name!r}: there is not enough memory to read it") from error
        except Exception as error:  # zipfile, its decompressors and numpy each raise their own errors for broken files
            what = str(error) or type(error).__name__
            raise InputError(f"{self.path}: array {self.name!r} is broken: {what}") from error


def _check_directory(path: Path) -> None:
    """Raises zipfile.BadZipFile if the directory of an archive is longer than `LONGEST_DIRECTORY`; zipfile reads all of it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 100))
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    size = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if tail[max(0, end - 20) : max(0, end)].startswith(b"PK\6\7"):  # a second record, of 64 bits, before the first
        size = max(size % (2**32 - 1), int.from_bytes(tail[max(0, end - 36) : end - 28], "little"))
    if size > LONGEST_DIRECTORY:
        raise zipfile.BadZipFile(f"its directory takes {size} bytes, expected at most {LONGEST_DIRECTORY}")


def _check_letters(content: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Raises ValueError unless every letter of an array of text is one of Unicode: Python ends with a SystemError at others."""
    letters = content.view(np.dtype(np.uint32).newbyteorder(dtype.byteorder))
    if letters.max(initial=0) > sys.maxunicode:
        raise ValueError(f"it has the letter {letters.max():#x}, which is none of Unicode")


def _fill(stream: IO[bytes], content: np.ndarray) -> None:
    """Reads as many bytes as `content` has, a piece at a time: `stream.readinto` would keep a second copy of all of them."""
    view = content.data
    done = 0
    while done < len(view):
        piece = stream.read(min(PIECE, len(view) - done))
        if not piece:
            raise ValueError(f"it ends after {done} of {len(view)} bytes")
        view[done : done + len(piece)] = piece
        done += len(piece)


def check_memory(path: Path, needed: int) -> None:
    """Raises InputError if arrays of so many bytes, of a file, exceed the memory that is available."""
    available = available_memory()
    if needed > available:
        raise InputError(f"{path}: its arrays would take {needed} bytes, and {available} bytes of memory are available")


def map_array(path: Path) -> np.ndarray:
    """The array of an .npy file, mapped into memory.

    Raises:
        InputError: the file is broken, or of objects.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            raise ValueError("expected a file")
        with path.open("rb") as file:
            header = read_header(file, path.stat().st_size)
        if header.dtype.hasobject:
            raise ValueError("it is of objects")
        order = "F" if header.by_columns else "C"
        return np.memmap(path, header.dtype, "r", header.start, header.shape, order)  # type: ignore[call-overload]
    except Exception as error:  # of Python's parser for a broken header, among others
        raise InputError(f"{path} cannot be read: {error}") from error
