"""Hostile checkpoints, by what is hostile in them: each writes a file that must be refused."""

from __future__ import annotations

import codecs
import os
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forged import MIB, Call, Stored, checkpoint_with, forge, pickled, tensor
from raw_zip import Member, RawZip, entry

HEAVY = 500 * MIB  # what the heavy ones would take
ONE = {"0": bytes(4)}


def nested(levels: int, of: Callable[[Any], Any], value: Any) -> Any:
    for _ in range(levels):
        value = of(value)
    return value


def spliced(opcodes: bytes) -> bytes:
    """A checkpoint that holds the value of these opcodes, which Python's own pickler could not write."""
    return re.sub(rb"X\x06\0\0\0SPLICEq.", lambda _: opcodes, checkpoint_with(more="SPLICE"), flags=re.DOTALL)


def tuple_as_key(levels: int) -> bytes:
    """A dict whose key is a tuple of one tuple twice, and so on: its hash takes 2^levels steps."""
    twice = b"".join(b"r%bj%b\x86" % (struct.pack("<I", 1000 + n), struct.pack("<I", 1000 + n)) for n in range(levels))
    return spliced(b"})" + twice + b"K\x01s")


def colliding(count: int) -> bytes:
    """A dict of integers of the same hash, each of which is compared with all before it."""
    keys = (((2**61 - 1) * n).to_bytes(10, "little") for n in range(1, count))
    return spliced(b"}(" + b"".join(b"\x8a\x0a" + key + b"N" for key in keys) + b"u")


def containing_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def encoded(levels: int) -> Any:
    return nested(levels, lambda value: Call(codecs.encode, value, "hex"), Call(codecs.encode, "a", "latin1"))


def with_a_tensor(path: Path, weight: Any, storages: dict[str, bytes] = ONE) -> Path:
    return forge(path, pickled({"hyper_parameters": {}, "state_dict": {"weight": weight}}), storages)


def overlapping(path: Path) -> Path:
    """A second entry of the directory points to the bytes of the first."""
    with_a_tensor(path, [tensor(Stored("0", 1), (1,), (1,)), tensor(Stored("1", 1), (1,), (1,))])
    with zipfile.ZipFile(path, "a") as file:
        twin = zipfile.ZipInfo("archive/data/1")
        first = file.getinfo("archive/data/0")
        for name in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
            setattr(twin, name, getattr(first, name))
        file.filelist.append(twin)
        file._didModify = True
    return path


def named_twice(path: Path) -> Path:
    """torch looks names up regardless of case."""
    with_a_tensor(path, tensor(Stored("0", 1), (1,), (1,)))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as file:
        file.writestr("archive/DATA.PKL", checkpoint_with(other=1))
    return path


def behind_another(path: Path) -> Path:
    """An archive that follows another: which of the two is read depends on the reader."""
    first = with_a_tensor(path, tensor(Stored("0", 1), (1,), (1,))).read_bytes()
    path.write_bytes(first + with_a_tensor(path, tensor(Stored("0", 1), (1,), (1,))).read_bytes())
    return path


def with_a_comment(path: Path) -> Path:
    with_a_tensor(path, tensor(Stored("0", 1), (1,), (1,)))
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"iprm: crc32 of this archive: 00000000"
    return path


def with_two_pickles(file: RawZip) -> tuple[Member, Member, list[Member]]:
    """The members of an archive with two pickles: the plain one, the heavy one, and the others."""
    version = file.member("a/version", b"3\n")
    plain = file.member("a/data.pkl", checkpoint_with())
    heavy = file.member("a/data.pkl", checkpoint_with(more=Call(bytearray, HEAVY)))
    return plain, heavy, [version, file.member("a/byteorder", b"little")]


def write_zip(path: Path, file: RawZip, sealed: bool = True) -> Path:
    if sealed:
        file.seal()
    path.write_bytes(file)
    return path


def of_two_ends(path: Path, sealed: bool) -> Path:
    """torch reads the directory whose end the zip64 locator names; zipfile the one whose end is just before the locator."""
    file = RawZip()
    plain, heavy, others = with_two_pickles(file)
    hidden = file.end64(*file.directory(*map(entry, [heavy, *others])))
    seen = file.directory(*map(entry, [plain, *others]))
    file.end64(*seen)
    file.locator(hidden)
    file.end(*seen)
    return write_zip(path, file, sealed)


def of_an_end_in_a_comment(path: Path, sealed: bool) -> Path:
    """The locator is in the comment of the last entry of the directory that zipfile reads, without an end just before it."""
    file = RawZip()
    plain, heavy, others = with_two_pickles(file)
    hidden = file.end64(*file.directory(*map(entry, [heavy, *others])))
    count, size, offset = file.directory(*map(entry, [plain, others[0]]), entry(others[1], comment=bytes(76)))
    del file[-20:]
    file.locator(hidden)
    file.end(count, size, offset)
    return write_zip(path, file, sealed)


def with_a_shifted_directory(path: Path) -> Path:
    """The last record names a place within the directory, in the comment of its first entry: torch reads on from there;
    zipfile reads the whole, and shifts the places of all members."""
    file = RawZip()
    plain, heavy, (version, byteorder) = with_two_pickles(file)
    shift = len(entry(version))
    hidden = b"".join(map(entry, [version, heavy, byteorder]))
    first = entry(version, comment=hidden, shift=shift)
    count, size, offset = file.directory(first, entry(plain, shift=shift), entry(byteorder, shift=shift))
    file.end(count, size, offset + shift)
    return write_zip(path, file)


def with_an_end(path: Path, change: Callable[..., object]) -> Path:
    """A plain checkpoint with other records of the end: `change` receives the file, and the number of entries, the size and the
    place of its directory."""
    file = RawZip()
    members = [file.member(name, content) for name, content in PLAIN.items()]
    change(file, *file.directory(*map(entry, members)))
    return write_zip(path, file)


def naming_another_place(file: RawZip, *found: int) -> None:
    """A locator of a place where no zip64 record is: torch reads the last record then, zipfile the zip64 record."""
    file.end64(*found)
    file.locator(1)
    file.end(*found)


def within_the_end(file: RawZip, *found: int) -> None:
    """The last record has the signature of one within it."""
    file.locator(file.end64(*found))
    file.end(found[0], int.from_bytes(b"PK\5\6", "little"), 0)


def with_two_fields_of_zip64(path: Path) -> Path:
    """zipfile takes the size from both, torch from the first."""
    file = RawZip()
    first, *others = [file.member(name, content) for name, content in PLAIN.items()]
    field = struct.pack("<2HQQ", 1, 16, 2**64 - 1, first.size) + struct.pack("<2HQ", 1, 8, first.size)
    file.end(*file.directory(entry(first, size=2**32 - 1, extra=field), *map(entry, others)))
    return write_zip(path, file)


PLAIN = {
    "archive/data.pkl": checkpoint_with(),
    "archive/byteorder": b"little",
    "archive/version": b"3\n",
    "archive/data/0": b"",
}
ZIPS: dict[str, Callable[[Path], Path]] = {
    "two ends": lambda path: of_two_ends(path, False),
    "two ends, with a checksum": lambda path: of_two_ends(path, True),
    "an end in a comment": lambda path: of_an_end_in_a_comment(path, False),
    "an end in a comment, with a checksum": lambda path: of_an_end_in_a_comment(path, True),
    "a shifted directory": with_a_shifted_directory,
    "a locator of nothing": lambda path: with_an_end(path, naming_another_place),
    "more members than counted": lambda path: with_an_end(path, lambda file, _, *found: file.end(3, *found)),
    "fewer members than counted": lambda path: with_an_end(path, lambda file, _, *found: file.end(5, *found)),
    "an end within the end": lambda path: with_an_end(path, within_the_end),
    "two fields of zip64": with_two_fields_of_zip64,
}
HOSTILE: dict[str, Callable[[Path], Path]] = {
    **ZIPS,
    # exhausting
    "a tensor larger than its storage": lambda path: with_a_tensor(path, tensor(Stored("0", 1), (HEAVY // 4,), (1,))),
    "a tensor of one number, repeated": lambda path: with_a_tensor(path, tensor(Stored("0", 1), (2**40,), (0,))),
    "a storage longer than its member": lambda path: with_a_tensor(path, tensor(Stored("0", HEAVY // 4), (4,), (1,))),
    "a thousand tensors of one storage": lambda path: with_a_tensor(
        path, [tensor(Stored("0", 10**5), (10**5 - n,), (1,), n) for n in range(1000)], {"0": bytes(4 * 10**5)}
    ),
    "an array of bytes": lambda path: forge(path, checkpoint_with(more=Call(bytearray, HEAVY))),
    "text that doubles 29 times": lambda path: forge(path, checkpoint_with(more=encoded(29))),
    "three million empty lists": lambda path: forge(path, spliced(b"](" + b"]" * (3 * 10**6) + b"e")),
    "lists of one list twice, forty levels": lambda path: forge(
        path, checkpoint_with(more=nested(40, lambda value: [value, value], []))
    ),
    "a key of one tuple twice, forty levels": lambda path: forge(path, tuple_as_key(40)),
    "integers of one hash as keys": lambda path: forge(path, colliding(10**5)),
    "a list that contains itself": lambda path: forge(path, checkpoint_with(more=containing_itself())),
    "a hundred thousand levels": lambda path: forge(path, spliced(b"]" * 10**5 + b"a" * (10**5 - 1))),
    # running
    "a command": lambda path: forge(path, checkpoint_with(more=Call(os.system, "touch ran"))),
    "a group of processes": lambda path: forge(
        path, checkpoint_with(more=Call(torch.distributed.device_mesh.DeviceMesh, "cpu", [0]))
    ),
    "attributes of a dict": lambda path: forge(path, checkpoint_with(more=Call(OrderedDict, state={"items": 3}))),
    "a tensor with hooks": lambda path: with_a_tensor(
        path, Call(torch._utils._rebuild_tensor_v2, Stored("0", 1), 0, (1,), (1,), True, {0: "hook"})
    ),
    # misleading
    "compressed members": lambda path: forge(
        path,
        pickled({"hyper_parameters": {}, "state_dict": {"weight": tensor(Stored("0", 100), (100,), (1,))}}),
        {"0": bytes(400)},
        zipfile.ZIP_DEFLATED,
    ),
    "members that overlap": overlapping,
    "two members of one name": named_twice,
    "one storage of two types": lambda path: with_a_tensor(
        path,
        [tensor(Stored("0", 1), (1,), (1,)), tensor(Stored("0", 4, torch.ByteStorage), (4,), (1,))],
    ),
    "an archive behind another": behind_another,
    "the checksum of another file": with_a_comment,
    "a tensor without memory": lambda path: forge(
        path, checkpoint_with(more=Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**40,), (1,), False))
    ),
}
