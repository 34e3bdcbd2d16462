"""The archive of a checkpoint: a checksum of the whole file, and what is checked before torch reads it."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO

from iprm.errors import InputError

from .plain_pickle import check_pickle

#: The comment of an archive, followed by the checksum in 8 digits. Its length is no power of two: no single flipped bit turns
#: it into 0, the length of an archive without a comment.
SEAL = b"iprm: crc32 of this archive: "
_LENGTH = len(SEAL) + 8
_END = 22  # bytes of zip's record of the end without a comment; the last two are the length of the comment


def _seal(checksum: int) -> bytes:
    return _LENGTH.to_bytes(2, "little") + SEAL + b"%08x" % checksum


class Sealing:
    """A binary file to which torch writes an archive; then `seal` adds the checksum of all bytes as the archive's comment."""

    def __init__(self, file: IO[bytes] | Any) -> None:
        self._file, self._checksum = file, 0

    def write(self, content: bytes) -> int:
        self._checksum = zlib.crc32(content, self._checksum)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> None:
        """The checksum is of the archive as torch has written it, which ends in the length of its comment, 0."""
        self._file.seek(-2, os.SEEK_END)
        self._file.write(_seal(self._checksum))


def check_archive(path: Path) -> None:
    """Checks that a file is a whole archive of tensors and plain values; see `check_pickle`.

    torch's reader ignores checksums, maps compressed bytes as weights, and reads past the end of a member whose storage is
    declared longer. Every byte is therefore verified first, against the checksum of the whole file, or, in a file that
    `Sealing` has not written, of each member.

    Raises:
        InputError: the file is damaged.
        ValueError: it holds something else.
        Exception: it is broken.
    """
    with path.open("rb") as file:
        sealed = _check_end(path, file)
        with zipfile.ZipFile(file) as archive:
            sizes = _check_members(archive, file)
            if not sealed and (damaged := archive.testzip()):
                raise InputError(f"{path}: damaged: the content of {damaged} does not match its checksum")
            folder = archive.namelist()[0].partition("/")[0]
            storages = {name.removeprefix(f"{folder}/data/"): size for name, size in sizes.items() if f"{folder}/data/" in name}
            check_pickle(archive.read(f"{folder}/data.pkl"), storages)


def _check_end(path: Path, file: BinaryIO) -> bool:
    """Whether the file has a checksum, which is verified.

    Raises:
        InputError: it does not match, or other bytes follow the archive.
    """
    whole = file.seek(0, os.SEEK_END)
    file.seek(max(0, whole - _END - _LENGTH))
    end = file.read()
    if end[-_END:].startswith(b"PK\5\6") and end.endswith(b"\0\0"):
        return False
    rest, checksum = whole - _LENGTH - 2, 0
    file.seek(0)
    chunk = memoryview(bytearray(1 << 20))
    while rest > 0 and (count := file.readinto(chunk[: min(rest, len(chunk))])):  # type: ignore[attr-defined]
        checksum, rest = zlib.crc32(chunk[:count], checksum), rest - count
    if end[_END - 2 :] != _seal(zlib.crc32(b"\0\0", checksum)):
        raise InputError(f"{path}: damaged: its content does not match its checksum")
    return True


def _check_members(archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, int]:
    """The sizes of the members, by name.

    Raises:
        ValueError: a member is compressed, of the name of another, or has bytes in common with another or the directory.
    """
    free = 0
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    if not members or members[0].header_offset:
        raise ValueError("it does not begin with a member")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
            raise ValueError(f"its member {member.filename} is compressed or encrypted; torch would take its bytes for weights")
        file.seek(member.header_offset)
        header = file.read(30)
        begin = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if member.header_offset < free or not header.startswith(b"PK\3\4"):
            raise ValueError(f"its member {member.filename} has bytes in common with another")
        free = begin + member.file_size
    if free > archive.start_dir:
        raise ValueError("its members are larger than the file")
    names = [member.filename for member in archive.infolist()]
    if len({name.lower() for name in names}) != len(names):  # torch looks them up regardless of case
        raise ValueError("two of its members have the same name")
    return {member.filename: member.file_size for member in archive.infolist()}
