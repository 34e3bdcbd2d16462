"""Zip archives record by record, also of forms that no program writes."""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

from iprm.training.archive import SEAL


class Member(NamedTuple):
    name: bytes
    checksum: int
    size: int
    offset: int


class RawZip(bytearray):
    """The bytes of an archive; each method appends one record."""

    def member(self, name: str, data: bytes) -> Member:
        found = Member(name.encode(), zlib.crc32(data), len(data), len(self))
        sizes = struct.pack("<3L2H", found.checksum, len(data), len(data), len(found.name), 0)
        self += b"PK\3\4" + struct.pack("<5H", 45, 0, 0, 0, 0x21) + sizes + found.name + data
        return found

    def directory(self, *entries: bytes) -> tuple[int, int, int]:
        """Its entries, size and offset, as the records of the end state them."""
        offset = len(self)
        self += b"".join(entries)
        return len(entries), len(self) - offset, offset

    def end64(self, count: int, size: int, offset: int) -> int:
        """Its place."""
        self += b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, offset)
        return len(self) - 56

    def locator(self, place: int) -> None:
        self += b"PK\6\7" + struct.pack("<LQL", 0, place, 1)

    def end(self, count: int, size: int, offset: int, comment: bytes = b"") -> None:
        self += b"PK\5\6" + struct.pack("<4H2LH", 0, 0, count, count, size, offset, len(comment)) + comment

    def seal(self) -> None:
        """As `iprm.training.archive.Sealing` does."""
        seal = SEAL + b"%08x" % zlib.crc32(self)
        self[-2:] = struct.pack("<H", len(seal)) + seal


def entry(member: Member, *, extra: bytes = b"", comment: bytes = b"", shift: int = 0, **changed: Any) -> bytes:
    """The entry of a member in the directory."""
    name, checksum, size, offset = member._replace(**changed)
    record = struct.pack("<6H3L3H", 45, 45, 0, 0, 0, 0x21, checksum, size, size, len(name), len(extra), len(comment))
    return b"PK\1\2" + record + struct.pack("<2H2L", 0, 0, 0, offset + shift) + name + extra + comment
