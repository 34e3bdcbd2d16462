"""Unlabelled samples in .npz or .npy files: located, checked by their headers, and read in chunks of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iprm.data.npz import PREFIX, StoredArray, open_archive, stored_file, stored_member
from iprm.encoders.description import Description, InputSpec, flat, nested
from iprm.errors import InputError, closest

Specs = Mapping[str, InputSpec]


class Piece(NamedTuple):
    """Consecutive rows of a source: label of a tensor -> (N, ...); floating-point values are float32 and finite."""

    source: str
    first_row: int
    arrays: dict[str, np.ndarray]

    @property
    def rows(self) -> int:
        return len(next(iter(self.arrays.values())))


@dataclass(frozen=True)
class Array:
    """`count` rows of one tensor of an input."""

    stored: StoredArray
    spec: InputSpec
    count: int

    def read(self, rows: int) -> Generator[np.ndarray, None, None]:
        """Yields at most `rows` rows at a time, floating-point values in float32, others in the dtype of the input.

        Raises:
            InputError: the file is broken, or a value is not finite in float32 or not representable in that dtype.
        """
        first = 0
        for block in self.stored.blocks(rows, (self.count, *self.spec.shape)):
            with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported below
                values = block.astype(np.float32 if self.spec.floating else self.spec.dtype)
            right = np.isfinite(values) if self.spec.floating else values == block
            right = right.reshape(len(block), -1).all(axis=1)
            if not right.all():
                row, what = (
                    first + int(right.argmin()),
                    "finite in float32" if self.spec.floating else f"one of {self.spec.dtype}",
                )
                raise InputError(f"{self.stored.label}: row {row} has a value that is not {what}; nothing was written")
            yield values
            first += len(block)


@dataclass(frozen=True)
class Source:
    """Samples from one .npz file, or from one folder of .npy files. arrays: label of a tensor -> array."""

    name: str
    arrays: dict[str, Array]

    def read(self, rows: int) -> Iterator[Piece]:
        with contextlib.ExitStack() as stack:
            readers = {m: stack.enter_context(contextlib.closing(array.read(rows))) for m, array in self.arrays.items()}
            first = 0
            for blocks in zip(*readers.values(), strict=True):
                yield Piece(self.name, first, dict(zip(readers, blocks, strict=True)))
                first += len(blocks[0])


def find_samples(path: Path, inputs: Mapping[str, Description]) -> list[Source]:
    """The sources at `path`, sorted by name, after checking all headers.

    Args:
        path: an .npz file, a folder of .npz files, or a folder with one ``<modality>.npy`` per modality.
        inputs: modality -> description of its input. The array of a tensor ``ids`` of a modality ``text`` is called
            ``x_text.ids``, its file ``text.ids.npy``.

    Raises:
        InputError: there are no samples, a modality is missing, or an array has a wrong shape, dtype or number of rows.
    """
    specs = flat(inputs)
    if path.is_file():
        if path.suffix != ".npz":
            raise InputError(f"{path}: expected an .npz file, or a folder of .npz files or of <modality>.npy files")
        return [_of_archive(path, specs)]
    if not path.is_dir():
        raise InputError(f"{path}: there is no such file or folder")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    archives = [file for file in files if file.suffix == ".npz"]
    arrays = [file for file in files if file.suffix == ".npy"]
    if archives and arrays:
        raise InputError(f"{path}: expected .npz files or .npy files, got {len(archives)} of those and {len(arrays)} of these")
    if not archives and not arrays:
        raise InputError(f"{path}: there are no .npz files here, and no .npy files")
    return [_of_archive(file, specs) for file in archives] or [_of_folder(path, arrays, specs)]


def _of_archive(file: Path, specs: Specs) -> Source:
    with open_archive(file) as archive:
        held = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        names = _required({m: f"{PREFIX}{m}" for m in specs}, held, f"{file}: there is no array", "the file has")
        return _alike(Source(file.name, {m: _checked(stored_member(archive, file, n), specs[m]) for m, n in names.items()}))


def _of_folder(folder: Path, files: Sequence[Path], specs: Specs) -> Source:
    held = {file.name for file in files}
    names = _required({m: f"{m}.npy" for m in specs}, held, f"{folder}: there is no file", "the folder has")
    return _alike(Source(folder.resolve().name, {m: _checked(stored_file(folder / n), specs[m]) for m, n in names.items()}))


def _required(names: dict[str, str], held: Iterable[str], absence: str, presence: str) -> dict[str, str]:
    held = sorted(held)
    for modality, name in names.items():
        if name not in held:
            match = closest(name, held)
            hint = f" (did you mean {match!r} to be it?)" if match and match not in names.values() else ""
            raise InputError(f"{absence} {name!r} of modality {modality!r}; {presence} {', '.join(held) or 'none'}{hint}")
    return names


def _checked(stored: StoredArray, spec: InputSpec) -> Array:
    """Checks that an array holds samples of this description, and that the file holds all of its bytes."""
    found, _, dtype = stored.header
    count = 1 if found == spec.shape else found[0] if found[1:] == spec.shape else -1
    whole = np.issubdtype(dtype, np.integer) or (spec.dtype == "bool" and dtype == np.bool_)
    if not whole and not (spec.floating and np.issubdtype(dtype, np.floating)):
        raise InputError(f"{stored.label}: expected {'numbers' if spec.floating else f'values of {spec.dtype}'}, got {dtype}")
    if count < 0:
        many = f"(N, {', '.join(map(str, spec.shape))})"
        raise InputError(f"{stored.label}: expected shape {spec.shape} of one sample or {many} of several, got {found}")
    if count == 0:
        raise InputError(f"{stored.label}: there are no rows, its shape is {found}")
    if stored.held < stored.header.size:
        takes = f"{found} of {dtype} takes {stored.header.size} bytes"
        raise InputError(f"{stored.label} is broken: {takes}, there are {stored.held}")
    return Array(stored, spec, count)


def _alike(source: Source) -> Source:
    first, *others = source.arrays.values()
    for other in others:
        if other.count != first.count:
            like = first.stored.member or first.stored.file.name
            raise InputError(f"{other.stored.label}: expected as many samples as {like} has, {first.count}, got {other.count}")
    return source


def gathered(pieces: Iterable[Piece], rows: int) -> Iterator[list[Piece]]:
    """Groups consecutive pieces of at most `rows` rows in all, so that many files of one sample make one batch."""
    held: list[Piece] = []
    for piece in pieces:
        if held and sum(p.rows for p in held) + piece.rows > rows:
            yield held
            held = []
        held.append(piece)
    if held:
        yield held


def joined(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The inputs of one batch: modality -> (N, ...), or a dict of such arrays."""
    return nested({label: np.concatenate([piece.arrays[label] for piece in pieces]) for label in pieces[0].arrays})
