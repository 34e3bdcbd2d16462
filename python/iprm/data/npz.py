"""Arrays in .npz and .npy files. Memory of the size that a header declares is never allocated; no code of a file is run."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from iprm.errors import InputError

from .plain_objects import read_plain_objects

#: Prefix of the array of a modality: ``x_<modality>``.
PREFIX = "x_"


def open_archive(path: Path) -> zipfile.ZipFile:
    """Opens an .npz archive.

    Raises:
        InputError: the file is missing or no readable archive.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        return zipfile.ZipFile(path)
    except (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        with path.open("rb") as start:
            if start.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                raise InputError(f"{path}: expected an .npz of several arrays (numpy.savez), got a single array") from error
        raise InputError(f"{path}: not a readable .npz file: {error}") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """The names of the arrays of an archive, in the order of the file. Other members, such as notes, are left out."""
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_arrays(
    path: Path, needed: Callable[[str], bool], plain_objects: Collection[str] = ()
) -> tuple[list[str], Mapping[str, np.ndarray]]:
    """The names of all arrays of an .npz file, and those arrays whose names are `needed`. No other array is read.

    Args:
        path: the file.
        needed: name -> whether the array is read.
        plain_objects: names of arrays that may be of objects, if these are plain values such as words.

    Raises:
        InputError: see `open_archive` and `read_array`; or the arrays exceed the memory.
    """
    with open_archive(path) as archive:
        names = array_names(archive)
        read = [name for name in names if needed(name)]
        check_memory(path, archive, read)
        return names, {name: read_array(path, archive, name, plain_objects=name in plain_objects) for name in read}


def check_memory(path: Path, archive: zipfile.ZipFile, names: Collection[str]) -> None:
    """Raises InputError if the arrays of these names exceed the memory of this machine."""
    unpacked, there = sum(archive.getinfo(f"{name}.npy").file_size for name in names), memory()
    if unpacked > there:
        raise InputError(f"{path}: its arrays would take {unpacked} bytes, and this machine has {there}")


def read_array(path: Path, archive: zipfile.ZipFile, name: str, *, plain_objects: bool = False) -> np.ndarray:
    """An array of an archive that was opened from `path`; read-only, unless it is of objects.

    Args:
        path: the file, for messages.
        archive: the open archive.
        name: of the array, without ".npy".
        plain_objects: the array may be of objects, if each is a plain value: see `read_plain_objects`.

    Raises:
        InputError: the array is broken, or of objects.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with archive.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            if version not in readers:
                raise ValueError(f"version {version} of the .npy format is none of arrays of numbers")
            shape, by_columns, dtype = readers[version](stream)
            content = b"" if dtype.hasobject and not plain_objects else stream.read()
            if not dtype.hasobject:
                return np.ndarray(shape, dtype, content, order="F" if by_columns else "C")
    except Exception as error:  # zipfile, its decompressors and numpy each raise their own errors for broken files
        raise InputError(f"{path}: array {name!r} is broken: {str(error) or type(error).__name__}") from error
    why = "it is of objects"
    if plain_objects and dtype == np.dtype(object):
        try:
            return read_plain_objects(content, shape)
        except Exception as error:  # the content may be anything
            why = f"it is of objects, and {str(error) or type(error).__name__}"
            if "stringdtype" in why:  # numpy saves text of this type by pickling it
                raise InputError(f"{path}: array {name!r} is of StringDType; save {name}.astype(str)") from error
    raise InputError(f"{path}: array {name!r} cannot be read without running code it holds: {why}")


def map_array(path: Path) -> np.ndarray:
    """The array of an .npy file, mapped into memory.

    Raises:
        InputError: the file is broken, or of objects.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of Python's parser for a broken header, among others
        raise InputError(f"{path} cannot be read: {error}") from error


def memory() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
