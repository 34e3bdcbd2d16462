"""Small data files that declare, unpack to, or lead to much: each is refused or read within 10 s and twice what it declares."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_files import arrays
from hostile_recordings import RATE, RECORDINGS
from iprm.data import make_data
from iprm.data.datasets import recordings
from iprm.data.datasets.spectrogram import LogMel
from iprm.data.npz import map_array
from iprm.errors import InputError

MIB = 2**20
#: Memory beside what is declared: modules, messages, pieces of files.
BESIDE = 12 * MIB


def bounded(call: Callable[[], Any], needed: int) -> Any:
    """The result, or the InputError as text, of a call that takes at most 10 s and twice what is needed."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        result = call()
    except InputError as error:
        result = str(error)
    taken, (_, peak) = time.monotonic() - begun, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 10
    assert peak < 2 * needed + BESIDE
    return result


def header(shape: object, dtype: str = "|i1", by_columns: bool = False, version: int = 1, length: int | None = None) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': {by_columns}, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def save(path: Path, entries: dict[str, bytes | tuple[bytes, int, bytes]]) -> Path:
    """An archive of members: bytes, or a beginning, the number of bytes after it, and the bytes that are repeated there."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            start, count, unit = content if isinstance(content, tuple) else (content, 0, b"\0")
            with file.open(f"{name}.npy", "w") as member:
                member.write(start)
                for first in range(0, count, MIB):
                    member.write((unit * (MIB // len(unit)))[: min(MIB, count - first)])
    assert path.stat().st_size < MIB
    return path


ROWS = {name: npy(array) for name, array in arrays().items()}  # 60 rows of 3 classes
#: 32 MiB of each, in files of 40 kB.
MUCH = 32 * MIB
WIDE = MUCH // 60
PICKLED = npy(np.array(["a", "b"] * 30, dtype=object))
#: A tuple within tuples, 40 times twice in the next, whose hash would take 2⁴⁰ steps.
NESTED = b")q\0" + b"".join(b"0h%ch%c\x86q%c" % (level, level, level + 1) for level in range(40)) + b"0"
#: What replaces a member of a file of 60 rows -> what it declares, in the type that it ends in; and what is said about it.
FILES: dict[str, tuple[dict[str, Any], int, str]] = {
    "zeros after an array": ({"x_audio": (header((60, 2), "<f4"), 60 * 8 + MUCH, b"\0")}, 0, "takes 480 bytes, got"),
    "zeros after labels": ({"y": (header((60,), "<i8"), 60 * 8 + MUCH, b"\0")}, 0, "takes 480 bytes, got"),
    "zeros after a split": ({"split": (header((60,), "<i8"), 60 * 8 + MUCH, b"\0")}, 0, "takes 480 bytes, got"),
    "a header of 32 MiB": ({"x_audio": (header((60, 2), version=2, length=MUCH), MUCH, b" ")}, 0, "is broken"),
    "a header of 4 GiB": ({"x_audio": (header((60, 2), version=2, length=2**32 - 1), MUCH, b" ")}, 0, "is broken"),
    "a header of brackets": ({"x_audio": (b"\x93NUMPY\1\0\xff\x3f", 2**14 - 1, b"(")}, 0, "is broken"),
    "too few bytes": ({"x_audio": (header((60, 2 * WIDE)), 60 * WIDE, b"\1")}, 0, "got"),
    "letters without size": ({"y": header((2**60,), "<U0")}, 0, "is broken"),
    "structures without size": ({"y": header((2**60,), "|V0")}, 0, "is broken"),
    "two negative dimensions": ({"x_audio": (header((-60, -2)), 120, b"\1")}, 0, "is broken"),
    "2**60 rows of no columns": ({"x_audio": header((2**60, 0))}, 0, "D of at least 1"),
    "no rows of 2**60 columns": ({"x_audio": header((0, 2**60))}, 0, "as many rows as y"),
    "true rows": ({"x_audio": header((True, 2**60, 0))}, 0, "expected shape"),
    "200 dimensions": ({"x_audio": (header((60,) + (1,) * 200), 60, b"\1")}, 0, "expected shape"),
    "small numbers by rows": ({"x_audio": (header((60, WIDE)), 60 * WIDE, b"\1")}, 4 * MUCH, ""),
    "small numbers by columns": ({"x_audio": (header((60, WIDE), by_columns=True), 60 * WIDE, b"\1")}, 4 * MUCH, ""),
    "large numbers": ({"x_audio": (header((60, WIDE // 16), "<f8"), 60 * (WIDE // 16) * 8, b"\0")}, MUCH // 2, ""),
    "large numbers by columns": (
        {"x_audio": (header((60, WIDE // 8), "<f8", by_columns=True), 60 * (WIDE // 8) * 8, b"\0")},
        MUCH,
        "",
    ),
    "not finite": (
        {"x_audio": (header((60, WIDE // 4), "<f4"), 60 * (WIDE // 4) * 4, b"\xff")},
        MUCH,
        "and 59",
    ),
    "complex numbers": ({"x_audio": (header((60, WIDE // 8), "<c8"), 60 * (WIDE // 8) * 8, b"\0")}, 0, "expected numbers"),
    "dates": ({"x_audio": (header((60, WIDE // 8), "<M8[s]"), 60 * (WIDE // 8) * 8, b"\0")}, 0, "expected numbers"),
    "a number per label": ({"y": (header((MUCH // 8,)), MUCH // 8, b"\1")}, 20 * MUCH // 8, "expected as many rows as y"),
    "labels by columns": ({"y": (header((60, WIDE)), 60 * WIDE, b"\1")}, MUCH, "expected shape"),
    "long words": (
        {"y": (header((60,), f"<U{WIDE // 4}"), 60 * (WIDE // 4) * 4, b"a\0\0\0")},
        MUCH,
        "letters; expected at most 1000",
    ),
    "long bytes": ({"y": (header((60,), f"|S{WIDE}"), 60 * WIDE, b"a")}, MUCH, "letters; expected at most 1000"),
    "long bytes as splits": ({"split": (header((60,), f"|S{WIDE}"), 60 * WIDE, b"a")}, MUCH, 'expected "train", "val" or'),
    "long empty words": ({"y": (header((60,), f"<U{WIDE // 4}"), 60 * (WIDE // 4) * 4, b"\0")}, MUCH, "has no label"),
    "a million classes of words": (
        {"y": npy(np.arange(2**20 + 1).astype("<U7")), "x_audio": header((2**20 + 1, 1))},
        150 * 2**20,
        "x_audio' is broken",
    ),
    "objects of many steps": ({"y": (header((60,), "|O") + b"\x80\x02", MUCH, b"N0")}, MUCH, "more steps than its elements"),
    "objects of a long text": (
        {"y": (header((60,), "|O") + b"\x80\x02X" + struct.pack("<I", MUCH), MUCH, b"a")},
        MUCH,
        "cannot be read without running code",
    ),
    "objects of a large index": ({"y": header((60,), "|O") + b"\x80\x02Nr\xff\xff\xff\xff."}, 0, "cannot be read without"),
    "objects of nested keys": ({"y": header((60,), "|O") + b"\x80\x02" + NESTED + b"}h\x28K\1s."}, 0, "it has a dict or a set"),
    "objects of nested lists": ({"y": (header((60,), "|O") + b"\x80\x02", 2**20, b"(")}, 0, "cannot be read without"),
    "objects in features": ({"x_audio": PICKLED}, 0, "it is of objects"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_small_archive_takes_no_more_than_it_declares(tmp_path: Path, kind: str) -> None:
    entries, needed, message = FILES[kind]
    path = save(tmp_path / "f.npz", {**ROWS, **entries}) if kind != "a million classes of words" else tmp_path / "f.npz"
    if not path.exists():
        np.savez(path, **{name: np.load(io.BytesIO(content)) for name, content in ROWS.items()})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in entries.items():
                file.writestr(f"{name}.npy", content)
    found = bounded(lambda: make_data("features", path=str(path)).splits, needed)
    if message:
        assert isinstance(found, str)
        assert message in found
    else:
        assert sum(len(split) for split in found.values()) == 60
        value = 1.0 if "small" in kind else 0.0
        assert all(bool((split.inputs["audio"] == value).all()) for split in found.values())


@pytest.mark.parametrize("wide", [False, True])
def test_an_archive_of_a_million_empty_members_is_refused(tmp_path: Path, wide: bool) -> None:
    """Its directory of 46 MB took 700 MB and 10 s. `wide`: the size is in the record of 64 bits."""
    count = 10**6
    directory = (b"PK\1\2" + bytes(42)) * count
    size = len(directory)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, 0)
    record += struct.pack("<4sIQI", b"PK\6\7", 0, size, 1)
    stated = (0xFFFF, 0xFFFF, 0xFFFFFFFF) if wide else (count & 0xFFFF, count & 0xFFFF, size)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *stated, 0xFFFFFFFF if wide else 0, 0)
    (tmp_path / "f.npz").write_bytes(directory + (record if wide else b"") + end)
    found = bounded(lambda: make_data("features", path=str(tmp_path / "f.npz")).splits, 0)
    assert f"f.npz: not a readable .npz file: its directory takes {size} bytes" in found


@pytest.mark.parametrize("kind", ["zeros", "header", "short", "pipe"])
def test_a_mapped_array_is_as_long_as_its_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "audio.npy"
    if kind == "pipe":
        import os

        os.mkfifo(path)
    else:
        length = MUCH if kind == "header" else None
        path.write_bytes(header((60, 2), version=2 if kind == "header" else 1, length=length) + b"\0" * 100)
        with path.open("r+b") as file:
            file.truncate(2**31 if kind != "short" else path.stat().st_size)
    assert "audio.npy cannot be read" in bounded(lambda: map_array(path), 0)


# recordings


@pytest.mark.parametrize("kind", RECORDINGS)
def test_a_recording_is_read_as_far_as_the_spectrogram_needs_it(tmp_path: Path, kind: str) -> None:
    write, message = RECORDINGS[kind]
    write(tmp_path / "0_ann_0.wav")
    found = bounded(lambda: recordings._spectrogram(tmp_path / "0_ann_0.wav", LogMel(RATE)), 0)
    if message:
        assert isinstance(found, str)
        assert message in found
        assert found.startswith(str(tmp_path / "0_ann_0.wav"))
    elif not isinstance(found, str):
        assert found.shape == (1, 40, 64)
    else:
        assert "0_ann_0.wav: " in found
