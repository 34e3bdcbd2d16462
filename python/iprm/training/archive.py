"""The archive of a checkpoint: a checksum of the whole file, and what is checked before torch reads it."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

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


def check_archive(path: Path, file: BinaryIO) -> None:
    """Checks that a file is a whole archive of tensors and plain values; see `check_pickle`.

    torch's reader ignores checksums, maps compressed bytes as weights, and reads past the end of a member whose storage is
    declared longer. Every byte is therefore verified first, against the checksum of the whole file, or, in a file that
    `Sealing` has not written, of each member. Python's reader must then find the same members at the same places as torch's.

    Raises:
        InputError: the file is damaged.
        ValueError: it holds something else.
        Exception: it is broken.
    """
    end, sealed = _check_end(path, file)
    count = _check_directory(file, end)
    with zipfile.ZipFile(file) as archive:
        if count != len(archive.filelist):
            raise ValueError(f"its directory has {len(archive.filelist)} members, and states {count}")
        folder = archive.namelist()[0].partition("/")[0]
        sizes = _check_members(archive, file, folder)
        if not sealed and (damaged := archive.testzip()):
            raise InputError(f"{path}: damaged: the content of {damaged} does not match its checksum")
        storages = {name.removeprefix("data/"): size for name, size in sizes.items() if name.startswith("data/")}
        check_pickle(archive.read(f"{folder}/data.pkl"), storages)


def _check_end(path: Path, file: BinaryIO) -> tuple[int, bool]:
    """The place of zip's record of the end, and whether the file has a checksum, which is verified.

    Raises:
        InputError: it does not match, or other bytes follow the archive.
    """
    whole = file.seek(0, os.SEEK_END)
    file.seek(max(0, whole - _END - _LENGTH))
    end = file.read()
    if end.rfind(b"PK\5\6") == len(end) - _END and end.endswith(b"\0\0"):
        return whole - _END, False
    rest, checksum = whole - _LENGTH - 2, 0
    file.seek(0)
    chunk = memoryview(bytearray(1 << 20))
    while rest > 0 and (count := file.readinto(chunk[: min(rest, len(chunk))])):  # type: ignore[attr-defined]
        checksum, rest = zlib.crc32(chunk[:count], checksum), rest - count
    if end.rfind(b"PK\5\6") != 0 or end[_END - 2 :] != _seal(zlib.crc32(b"\0\0", checksum)):
        raise InputError(f"{path}: damaged: its content does not match its checksum")
    return whole - _END - _LENGTH, True


def _check_directory(file: BinaryIO, end: int) -> int:
    """The number of members that the directory states.

    The records of the end state twice where the directory is. zipfile trusts the place of the record, torch what it states:
    two archives in one file, unless both are the same.

    Raises:
        ValueError: they are not.
    """
    file.seek(max(0, end - 76))
    *_, count, size, offset = struct.unpack("<4s4H2L", (records := file.read(min(76, end) + 20))[-20:])
    signature, _, place, _ = struct.unpack("<4sLQL", records[-40:-20])
    if signature == b"PK\6\7":
        end -= 76
        signature, *_, count, size, offset = struct.unpack("<4sQ2H2L4Q", records[:56])
        if place != end or signature != b"PK\6\6":
            raise ValueError("its records of the end are not directly before each other")
    if offset + size != end:
        raise ValueError("its directory is not directly before the record of its end")
    return count


def _check_members(archive: zipfile.ZipFile, file: BinaryIO, folder: str) -> dict[str, int]:
    """The sizes of the members, by name within the folder.

    Raises:
        ValueError: a member is compressed, of the name of another, has bytes in common with another or the directory, or is
            another one to torch.
    """
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    if not members or members[0].header_offset:
        raise ValueError("it does not begin with a member")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
            raise ValueError(f"its member {member.filename} is compressed or encrypted; torch would take its bytes for weights")
    if len({member.filename.lower() for member in members}) != len(members):  # torch looks them up regardless of case
        raise ValueError("two of its members have the same name")
    file.seek(0)
    reader: Any = torch._C.PyTorchFileReader(file)
    found = {f"{folder}/{name}": name for name in reader.get_all_records()}
    free = 0
    for member in members:
        name = found.pop(member.filename, "")
        place = member.header_offset, member.file_size
        if not name or place != (reader.get_record_header_offset(name), _record_size(reader, name, member)):
            raise ValueError(f"its member {member.filename} is another one to torch")
        if member.header_offset < free:
            raise ValueError(f"its member {member.filename} has bytes in common with another")
        free = reader.get_record_offset(name) + member.file_size
    if found or free > archive.start_dir:
        raise ValueError("its members are larger than the file")
    return {member.filename.removeprefix(f"{folder}/"): member.file_size for member in members}


def _record_size(reader: Any, name: str, member: zipfile.ZipInfo) -> int:
    """The size of a member to torch's reader."""
    if hasattr(reader, "get_record_size"):
        return reader.get_record_size(name)
    # torch 2.10: both readers take the 32 bits of the directory, unless an extra field replaces them
    return len(reader.get_record(name)) if member.extra else member.file_size
