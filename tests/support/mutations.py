"""Hostile files made from others: bytes changed, lost, repeated and exchanged, also in archives whose checksums are right."""

from __future__ import annotations

import io
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

#: Integers at which readers overflow, allocate or divide by zero.
NUMBERS = (0, 1, 2**7, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**36, 2**62, 2**63 - 1, 2**64 - 1)
#: The same of text: numbers, names and structures.
WORDS = ["-1", "0", "1e308", "-1e999", "NaN", "Infinity", "3000000000", "9" * 400, "0x" + "f" * 40, "true", "null", '""']
WORDS += ["[]", "{}", "[" * 200, "&a [*a, *a]", "!!python/name:os.system", "\\u0000", "\udcff", "\x1b[2J", "../..", "=1+2"]
WORDS += ["x" * 3000, ",", "\n"]


def mutated(content: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """One to three changes of bytes; `others` are files of which parts may take the place of parts of this one."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        content = draw.choice(_CHANGES)(content, others, draw)
    return content


def mutated_text(content: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """The same of a text file, or one to three of its words replaced by hostile ones."""
    if draw.random() < 0.3:
        return mutated(content, others, draw)
    text = content.decode(errors="surrogateescape")
    for _ in range(draw.choice([1, 1, 2, 3])):
        found = list(re.finditer(r"[\w.+-]+", text)) or [re.search("", text)]
        match = draw.choice(found)
        text = text[: match.start()] + draw.choice([*WORDS, draw.choice(found).group()]) + text[match.end() :]
    return text.encode(errors="surrogateescape")


def mutated_archive(content: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """The same of an archive, or of one of its members; its directory and checksums then fit."""
    members = _members(content) if draw.random() < 0.7 else {}
    if not members:
        return mutated(content, others, draw)
    name = draw.choice(sorted(members))
    match draw.randrange(8):
        case 0:
            members.pop(name)
        case 1:
            members[draw.choice(sorted(members))] = members[name]
        case 2:
            members[draw.choice([name.upper(), f"../{name}", f"{name}/x", "y.npy", "x_\x1b[2J.npy"])] = members[name]
        case _:
            parts = [part for other in others for part in _members(other).values()]
            members[name] = mutated(members[name], parts, draw)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        for name, part in members.items():
            file.writestr(name, part)
    return stream.getvalue()


def _members(content: bytes) -> dict[str, bytes]:
    """Name -> content; empty for an archive that zipfile refuses, with NotImplementedError if it is of a later version."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            return {name: file.read(name) for name in file.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, zlib.error):
        return {}


def _span(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, start + min(draw.choice([1, 4, 16, 64, 512]), len(content) - start)


def _bits(content: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    copy = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8]) if copy else 0):
        copy[draw.randrange(len(copy))] ^= 1 << draw.randrange(8)
    return bytes(copy)


def _number(content: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    kind = draw.choice("BHIQ")
    number = struct.pack(draw.choice("<>") + kind, draw.choice(NUMBERS) % 2 ** (8 * struct.calcsize(kind)))
    place = draw.randrange(len(content) + 1)
    return content[:place] + number + content[place + len(number) :]


def _lost(content: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    return content[:start] + content[end:]


def _zeroed(content: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    return content[:start] + bytes(end - start) + content[end:]


def _cut(content: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _repeated(content: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    return content[:end] + content[start:end] * draw.choice([1, 3, 1000]) + content[end:]


def _exchanged(content: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    other = draw.choice(others)
    start, end = _span(content, draw)
    first, last = _span(other, draw)
    return content[:start] + other[first:last] + content[end:]


def _noise(content: bytes, _: Sequence[bytes], draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.randbytes(draw.choice([1, 8, 100])) + content[place:]


_CHANGES: tuple[Callable[[bytes, Sequence[bytes], random.Random], bytes], ...]
_CHANGES = (_bits, _bits, _number, _number, _lost, _zeroed, _cut, _repeated, _exchanged, _noise)
