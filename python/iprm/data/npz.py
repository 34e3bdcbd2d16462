"""Arrays in .npz and .npy files. Memory of the size that a header declares is never allocated; objects are never unpickled."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from iprm.errors import InputError

#: Prefix of the array of a modality: ``x_<modality>``.
PREFIX = "x_"


def open_archive(path: Path) -> zipfile.ZipFile:
    """Opens an .npz archive.

    Raises:
        InputError: the file is missing or no readable archive, or its arrays exceed the memory.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        archive = zipfile.ZipFile(path)
    except (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        with path.open("rb") as start:
            if start.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                raise InputError(f"{path}: expected an .npz of several arrays (numpy.savez), got a single array") from error
        raise InputError(f"{path}: not a readable .npz file: {error}") from error
    unpacked, there = sum(entry.file_size for entry in archive.infolist()), memory()
    if unpacked > there:
        raise InputError(f"{path}: its arrays would take {unpacked} bytes, and this machine has {there}")
    return archive


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, by name.

    Raises:
        InputError: see `open_archive` and `read_array`.
    """
    with open_archive(path) as archive:
        return {name.removesuffix(".npy"): read_array(path, archive, name) for name in archive.namelist()}


def read_array(path: Path, archive: zipfile.ZipFile, member: str) -> np.ndarray:
    """The array of a member of an archive that was opened from `path`; read-only.

    Raises:
        InputError: the array is broken, or of objects.
    """
    name = member.removesuffix(".npy")
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in readers:
                raise ValueError(f"version {version} of the .npy format is none of arrays of numbers")
            shape, by_columns, dtype = readers[version](stream)
            if not dtype.hasobject:
                return np.ndarray(shape, dtype, stream.read(), order="F" if by_columns else "C")
    except Exception as error:  # zipfile, its decompressors and numpy each raise their own errors for broken files
        raise InputError(f"{path}: array {name!r} is broken: {str(error) or type(error).__name__}") from error
    raise InputError(f"{path}: array {name!r} cannot be read without running code it holds: it is of objects")


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
