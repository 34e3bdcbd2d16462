"""New samples, without labels, in .npz or .npy files: found, checked by their headers, and read a few rows at a time."""

from __future__ import annotations

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from iprm.errors import InputError, closest

PREFIX = "x_"
Shapes = Mapping[str, Sequence[int]]
#: What a file that is no archive, no array, or a part of one, makes numpy and zipfile raise.
BROKEN = (ValueError, OSError, EOFError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class Header(NamedTuple):
    """What the header of an array says."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype


class Piece(NamedTuple):
    """Consecutive rows of a source: modality -> (N, *shape) float32, all finite."""

    source: str
    first_row: int
    inputs: dict[str, np.ndarray]

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Array:
    """An array that a header speaks of: in a file of its own, or a member of an archive. `count` is its number of rows."""

    file: Path
    member: str | None
    dtype: np.dtype
    shape: tuple[int, ...]
    count: int
    by_columns: bool

    @property
    def label(self) -> str:
        return f"{self.file}" if self.member is None else f"{self.file}: array {self.member!r}"

    def read(self, rows: int) -> Generator[np.ndarray, None, None]:
        """The rows in float32, at most `rows` at a time.

        Raises:
            InputError: the file is broken, or a value is not finite in float32.
        """
        first = 0
        blocks = self._mapped(rows) if self.member is None else self._unpacked(rows, self.member)
        while first < self.count:
            try:
                block = next(blocks)
            except BROKEN as error:
                raise InputError(f"{self.label} is broken: {error}") from error
            if len(block) != min(rows, self.count - first):
                raise InputError(f"{self.label} is broken: it ends after row {first + len(block)} of {self.count}")
            with np.errstate(over="ignore"):  # what does not fit float32 becomes infinite, and is named below
                block = block.astype(np.float32)
            wrong = ~np.isfinite(block.reshape(len(block), -1)).all(axis=1)
            if wrong.any():
                row = first + int(wrong.argmax())
                raise InputError(f"{self.label}: row {row} has a value that is not finite in float32; nothing was written")
            yield block
            first += len(block)

    def _mapped(self, rows: int) -> Iterator[np.ndarray]:
        whole = np.load(self.file, mmap_mode="r", allow_pickle=False).reshape(self.count, *self.shape)
        for start in range(0, self.count, rows):
            yield whole[start : start + rows]

    def _unpacked(self, rows: int, member: str) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(self.file) as archive, archive.open(f"{member}.npy") as file:
            _read_header(file)
            if self.by_columns:  # its rows lie apart: it is read whole
                whole = np.frombuffer(file.read(), self.dtype).reshape(*self.shape[::-1], self.count).T
                for start in range(0, self.count, rows):
                    yield whole[start : start + rows]
                return
            size = math.prod(self.shape) * self.dtype.itemsize
            for start in range(0, self.count, rows):
                content = file.read(size * min(rows, self.count - start))
                yield np.frombuffer(content, self.dtype).reshape(-1, *self.shape)


@dataclass(frozen=True)
class Source:
    """Samples that belong together: the arrays of an .npz, or the .npy files of a folder. modality -> array."""

    name: str
    arrays: dict[str, Array]

    def read(self, rows: int) -> Iterator[Piece]:
        with contextlib.ExitStack() as stack:
            readers = {m: stack.enter_context(contextlib.closing(array.read(rows))) for m, array in self.arrays.items()}
            first = 0
            for blocks in zip(*readers.values(), strict=True):
                yield Piece(self.name, first, dict(zip(readers, blocks, strict=True)))
                first += len(blocks[0])


def find_samples(path: Path, shapes: Shapes) -> list[Source]:
    """The sources at `path`, in order of name, all of whose headers fit.

    Args:
        path: an .npz file, a folder of such files, or a folder of a ``<modality>.npy`` a modality.
        shapes: modality -> shape of one row.

    Raises:
        InputError: nothing is there, a modality is missing, or an array is of another shape, type or number of rows.
    """
    if path.is_file():
        if path.suffix != ".npz":
            raise InputError(f"{path}: expected an .npz file, or a folder of .npz files or of <modality>.npy files")
        return [_of_archive(path, shapes)]
    if not path.is_dir():
        raise InputError(f"{path}: there is no such file or folder")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    archives = [file for file in files if file.suffix == ".npz"]
    arrays = [file for file in files if file.suffix == ".npy"]
    if archives and arrays:
        raise InputError(f"{path}: expected .npz files or .npy files, got {len(archives)} of those and {len(arrays)} of these")
    if not archives and not arrays:
        raise InputError(f"{path}: there are no .npz files here, and no .npy files")
    return [_of_archive(file, shapes) for file in archives] or [_of_folder(path, arrays, shapes)]


def _of_archive(file: Path, shapes: Shapes) -> Source:
    try:
        archive = zipfile.ZipFile(file)
    except BROKEN as error:
        raise InputError(f"{file}: not a readable .npz file: {error}") from error
    with archive:
        held = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        names = _required({m: f"{PREFIX}{m}" for m in shapes}, held, f"{file}: there is no array", "the file has")
        return _alike(Source(file.name, {m: _member(archive, file, name, shapes[m]) for m, name in names.items()}))


def _of_folder(folder: Path, files: Sequence[Path], shapes: Shapes) -> Source:
    held = {file.name for file in files}
    names = _required({m: f"{m}.npy" for m in shapes}, held, f"{folder}: there is no file", "the folder has")
    return _alike(Source(folder.resolve().name, {m: _alone(folder / name, shapes[m]) for m, name in names.items()}))


def _required(names: dict[str, str], held: Iterable[str], absence: str, presence: str) -> dict[str, str]:
    held = sorted(held)
    for modality, name in names.items():
        if name not in held:
            match = closest(name, held)
            hint = f" (did you mean {match!r} to be it?)" if match and match not in names.values() else ""
            raise InputError(f"{absence} {name!r} of modality {modality!r}; {presence} {', '.join(held) or 'none'}{hint}")
    return names


def _member(archive: zipfile.ZipFile, file: Path, name: str, shape: Sequence[int]) -> Array:
    try:
        with archive.open(f"{name}.npy") as content:
            header = _read_header(content)
            held = archive.getinfo(f"{name}.npy").file_size - content.tell()
    except BROKEN as error:
        raise InputError(f"{file}: array {name!r} cannot be read: {error}") from error
    return _checked(file, name, header, held, shape)


def _alone(file: Path, shape: Sequence[int]) -> Array:
    try:
        with file.open("rb") as content:
            header = _read_header(content)
            held = file.stat().st_size - content.tell()
    except BROKEN as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    return _checked(file, None, header, held, shape)


def _read_header(file: IO[bytes]) -> Header:
    """Of the array itself nothing is read, and no object of it is made.

    Raises:
        ValueError: it is no header. What numpy lets through of its parser's own errors is among them.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return Header(*read(file))
    except (TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f"its header is not one of an array ({error})") from error


def _checked(file: Path, member: str | None, header: Header, held: int, shape: Sequence[int]) -> Array:
    """The array, if it is one of samples of the given shape, and all of its bytes are there."""
    found, by_columns, dtype = header
    shape = tuple(shape)
    count = 1 if found == shape else found[0] if found[1:] == shape else -1
    array = Array(file, member, dtype, shape, count, by_columns and len(found) > 1)
    if not (np.issubdtype(dtype, np.floating) or np.issubdtype(dtype, np.integer)):
        raise InputError(f"{array.label}: expected numbers, got {dtype}")
    if count < 0:
        many = f"(N, {', '.join(map(str, shape))})"
        raise InputError(f"{array.label}: expected shape {shape} of one sample or {many} of several, got {found}")
    if count == 0:
        raise InputError(f"{array.label}: there are no rows, its shape is {found}")
    expected = math.prod(found) * dtype.itemsize
    if held < expected:
        raise InputError(f"{array.label} is broken: {found} of {dtype} takes {expected} bytes, there are {held}")
    return array


def _alike(source: Source) -> Source:
    first, *others = source.arrays.values()
    for other in others:
        if other.count != first.count:
            like = first.member or first.file.name
            raise InputError(f"{other.label}: expected as many samples as {like} has, {first.count}, got {other.count}")
    return source


def gathered(pieces: Iterable[Piece], rows: int) -> Iterator[list[Piece]]:
    """Consecutive pieces that have at most `rows` rows together: many files of one sample make one batch."""
    held: list[Piece] = []
    for piece in pieces:
        if held and sum(p.rows for p in held) + piece.rows > rows:
            yield held
            held = []
        held.append(piece)
    if held:
        yield held
