"""Unlabelled samples in .npz or .npy files: located, checked, and read in chunks of rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iprm.data.npz import PREFIX, Archive, map_array
from iprm.encoders.description import Description, InputSpec, flat, nested
from iprm.errors import InputError, closest
from iprm.names import file_name

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
class Source:
    """Samples from one .npz file, or from one folder of .npy files. specs: label of a tensor -> its description."""

    path: Path
    specs: Specs

    @property
    def name(self) -> str:
        return self.path.name if self.path.is_file() else self.path.resolve().name

    def read(self, rows: int) -> Iterator[Piece]:
        """Yields at most `rows` rows at a time, floating-point values in float32, others in the dtype of the input.

        Raises:
            InputError: see `arrays`; or a value is not finite in float32, or not representable in that dtype.
        """
        arrays = self.arrays()
        for first in range(0, len(next(iter(arrays.values()))), rows):
            parts = {label: self._values(label, first, x[first : first + rows]) for label, x in arrays.items()}
            yield Piece(self.name, first, parts)

    def arrays(self) -> dict[str, np.ndarray]:
        """label -> (N, *shape) in the dtype of the file. An .npy is mapped, an array of an .npz is read.

        Raises:
            InputError: an array is missing or broken, or has a wrong shape, dtype or number of rows.
        """
        arrays = {label: self._samples(label, x) for label, x in self._stored().items()}
        first, *others = arrays
        for other in others:
            if len(arrays[other]) != len(arrays[first]):
                expected = f"expected as many samples as {self._file(first)} has, {len(arrays[first])}"
                raise InputError(f"{self._place(other)}: {expected}, got {len(arrays[other])}")
        return arrays

    def _stored(self) -> dict[str, np.ndarray]:
        if self.path.is_dir():
            self._require({file.name for file in self.path.iterdir()}, "file", "the folder has")
            return {label: map_array(self.path / self._file(label)) for label in self.specs}
        with Archive(self.path) as archive:
            self._require(set(archive.names), "array", "the file has")
            stored = archive.arrays([self._file(label) for label in self.specs])
            return {label: stored[self._file(label)].read() for label in self.specs}

    def _file(self, label: str) -> str:
        """The name of the array of a tensor, in an archive or as a file."""
        return f"{file_name(label)}.npy" if self.path.is_dir() else f"{PREFIX}{label}"

    def _place(self, label: str) -> str:
        file = self._file(label)
        return str(self.path / file) if self.path.is_dir() else f"{self.path}: array {file!r}"

    def _require(self, held: Collection[str], what: str, presence: str) -> None:
        names = {label: self._file(label) for label in self.specs}
        for label, name in names.items():
            if name not in held:
                match = closest(name, held)
                hint = f" (did you mean {match!r} to be it?)" if match and match not in names.values() else ""
                there = f"{presence} {', '.join(sorted(held)) or 'none'}{hint}"
                raise InputError(f"{self.path}: there is no {what} {name!r} of modality {label!r}; {there}")

    def _samples(self, label: str, x: np.ndarray) -> np.ndarray:
        """Checks the dtype and shape of an array, and adds the batch dimension of a single sample."""
        spec, found, place = self.specs[label], x.shape, self._place(label)
        kinds = "iuf" if spec.floating else "iub" if spec.dtype == "bool" else "iu"
        if x.dtype.kind not in kinds:
            raise InputError(f"{place}: expected {'numbers' if spec.floating else f'values of {spec.dtype}'}, got {x.dtype}")
        if found == spec.shape:
            return x[None]
        if found[1:] != spec.shape or not found:
            many = f"(N, {', '.join(map(str, spec.shape))})"
            raise InputError(f"{place}: expected shape {spec.shape} of one sample or {many} of several, got {found}")
        if len(x) == 0:
            raise InputError(f"{place}: there are no rows, its shape is {found}")
        return x

    def _values(self, label: str, first: int, block: np.ndarray) -> np.ndarray:
        spec = self.specs[label]
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported below
            values = block.astype(np.float32 if spec.floating else spec.dtype)
        right = np.isfinite(values) if spec.floating else values == block
        right = right.reshape(len(block), -1).all(axis=1)
        if not right.all():
            row, what = first + int(right.argmin()), "finite in float32" if spec.floating else f"one of {spec.dtype}"
            raise InputError(f"{self._place(label)}: row {row} has a value that is not {what}; nothing was written")
        return values


def find_samples(path: Path, inputs: Mapping[str, Description]) -> list[Source]:
    """The sources at `path`, sorted by name, after checking the arrays of every file.

    Args:
        path: an .npz file, a folder of .npz files, or a folder with one ``<modality>.npy`` per modality.
        inputs: modality -> description of its input. The array of a tensor ``ids`` of a modality ``text`` is called
            ``x_text.ids``, its file ``text.ids.npy``; in names of files, ``/``, ``\\`` and ``%`` are percent-encoded.

    Raises:
        InputError: there are no samples, a modality is missing, or an array has a wrong shape, dtype or number of rows.
    """
    if path.is_file() and path.suffix != ".npz":
        raise InputError(f"{path}: expected an .npz file, or a folder of .npz files or of <modality>.npy files")
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    files = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else [path]
    archives, arrays = ([file for file in files if file.suffix == suffix] for suffix in (".npz", ".npy"))
    if archives and arrays:
        raise InputError(f"{path}: expected .npz files or .npy files, got {len(archives)} of those and {len(arrays)} of these")
    if not archives and not arrays:
        raise InputError(f"{path}: there are no .npz files here, and no .npy files")
    sources = [Source(file, flat(inputs)) for file in archives or [path]]
    for source in sources:
        source.arrays()
    return sources


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


def joined(pieces: Sequence[Piece], inputs: Mapping[str, Description]) -> dict[str, Any]:
    """The inputs of one batch: modality -> (N, ...), or a dict of such arrays, as `inputs` describes."""
    return nested({label: np.concatenate([piece.arrays[label] for piece in pieces]) for label in pieces[0].arrays}, inputs)
