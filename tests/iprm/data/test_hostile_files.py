"""Malicious files: each raises `InputError`; none runs code, ends the interpreter or exhausts memory."""

from __future__ import annotations

import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_files import arrays, save
from hostile_arrays import DECLARED, archive, npy, whole
from iprm.data import make_data
from iprm.errors import InputError
from iprm.training.checkpoint import read_checkpoint

MIB = 2**20


class Payload:
    """Unpickling it creates a file, which no test may find."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a file ran its code"


def test_the_payload_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def read(path: Path) -> Any:
    return make_data("features", path=str(path)).splits


@pytest.mark.parametrize("entry", ["x_audio.npy", "y.npy", "split.npy"])
@pytest.mark.parametrize("kind", DECLARED)
def test_an_array_that_declares_what_it_does_not_hold(tmp_path: Path, kind: str, entry: str) -> None:
    path = archive(tmp_path / "f.npz", whole() | {entry: DECLARED[kind]})
    tracemalloc.start()
    with pytest.raises(InputError, match=r"f\.npz: array '\w+' (is broken|cannot be read)"):
        read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB
    assert not Path("canary").exists()


def test_pickled_arrays_run_nothing(tmp_path: Path, canary: Path) -> None:
    objects = np.array([Payload(canary)] * 60, dtype=object)
    for place in ("x_audio.npy", "y.npy", "split.npy"):
        path = archive(tmp_path / "f.npz", whole() | {place: npy(objects, allow_pickle=True)})
        with pytest.raises(InputError, match="cannot be read without running code"):
            read(path)
    (tmp_path / "f.npz").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(InputError, match="not a readable"):
        read(tmp_path / "f.npz")


def test_an_archive_that_unpacks_to_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of zeros compressed to 64 kB, on a machine with 32 MB."""
    path = archive(tmp_path / "f.npz", whole() | {"x_audio.npy": npy(np.zeros((60, 2**18), np.float32))})
    assert path.stat().st_size < MIB
    monkeypatch.setattr("iprm.data.npz.available_memory", lambda: 32 * MIB)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"its arrays would take \d+ bytes, and 33554432 bytes of memory are available"):
        read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB


@pytest.mark.parametrize(("size", "message"), [(100, "is broken"), (2**32 - 2, "of memory are available")])
def test_a_directory_that_lies_about_a_size(tmp_path: Path, size: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zip directory declares a megabyte of zeros as a few bytes, or as four gigabytes."""
    path = archive(tmp_path / "f.npz", whole() | {"x_audio.npy": npy(np.zeros((60, 2**12), np.float32))})
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(b"x_audio.npy"))
    content[place + 24 : place + 28] = struct.pack("<I", size)
    path.write_bytes(content)
    monkeypatch.setattr("iprm.data.npz.available_memory", lambda: 1024 * MIB)
    with pytest.raises(InputError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (6, 100, r"not a readable \.npz file: zip file version 10\.0"),
        (10, 97, r"array 'x_audio' is broken: expected it as numpy"),
    ],
    ids=["version", "compression"],
)
def test_an_archive_of_a_kind_that_zipfile_does_not_implement(tmp_path: Path, offset: int, value: int, message: str) -> None:
    """A later version of the format, and a compression without a decompressor here."""
    path = archive(tmp_path / "f.npz", whole())
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"x_audio.npy"))
    content[entry + offset : entry + offset + 2] = struct.pack("<H", value)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(path)


def test_names_that_leave_the_folder_write_nothing(tmp_path: Path) -> None:
    names = ["../../escaped.npy", "/tmp/escaped.npy", "x_../../escaped.npy", "..\\escaped.npy", "x_a/b.npy", "folder/"]
    before = set(tmp_path.parent.rglob("*"))
    path = archive(tmp_path / "f.npz", whole() | {name: npy(np.zeros((60, 2))) for name in names})
    read(path)
    assert set(tmp_path.parent.rglob("*")) - before == {path}
    assert not Path("/tmp/escaped.npy").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    content = Path(save(tmp_path, arrays())).read_bytes()
    for tenth in range(10):
        (tmp_path / "cut.npz").write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(InputError):
            read(tmp_path / "cut.npz")


def flipped(content: bytes, rng: random.Random) -> bytes:
    copy = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
    return bytes(copy)


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_compression_that_numpy_never_writes_is_refused(tmp_path: Path, compression: int) -> None:
    """zipfile unpacks 4 KiB of them at once, to 80 MB of zeros."""
    with pytest.raises(InputError, match=r"is broken: expected it as numpy\.savez or numpy\.savez_compressed stores it"):
        read(archive(tmp_path / "f.npz", whole(), compression))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bits_are_refused_or_harmless(tmp_path: Path, compression: int) -> None:
    rng, refused = random.Random(0), 0
    content = archive(tmp_path / "f.npz", whole(), compression).read_bytes()
    for _ in range(150):
        (tmp_path / "flipped.npz").write_bytes(flipped(content, rng))
        try:
            splits = read(tmp_path / "flipped.npz")
        except InputError:
            refused += 1
        else:
            assert sum(len(split) for split in splits.values()) == 60
    assert refused > 75


# checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "whole.ckpt"
    torch.save({"hyper_parameters": {"alpha": 0.5}, "state_dict": {"weight": torch.ones(64, 64)}}, path)
    read_checkpoint(path)
    return path


def refuse(path: Path) -> None:
    with pytest.raises(InputError):
        read_checkpoint(path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, canary: Path) -> None:
    path, payload = tmp_path / "evil.ckpt", Payload(canary)
    path.write_bytes(pickle.dumps(payload))
    refuse(path)
    torch.save({"hyper_parameters": payload}, path)
    refuse(path)
    torch.save({"hyper_parameters": payload}, path, _use_new_zipfile_serialization=False)
    refuse(path)
    archive(path, {"archive/data.pkl": pickle.dumps(payload), "archive/version": b"3"}, zipfile.ZIP_STORED)
    refuse(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.ckpt"))
    refuse(tmp_path / "script.ckpt")
    (tmp_path / "empty.ckpt").touch()
    refuse(tmp_path / "empty.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    refuse(tmp_path / "folder.ckpt")
    for content in ([1, 2], 3, {"hyper_parameters": 1, "state_dict": 2}):
        torch.save(content, tmp_path / "other.ckpt")
        refuse(tmp_path / "other.ckpt")
    refuse(archive(tmp_path / "zip.ckpt", {"../../escaped": b"x", "data.pkl": b"\x80\x02."}))
    refuse(Path(save(tmp_path, arrays())))


def test_a_truncated_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    for tenth in range(10):
        (tmp_path / "cut.ckpt").write_bytes(content[: len(content) * tenth // 10])
        refuse(tmp_path / "cut.ckpt")


@pytest.mark.parametrize("mmap", [False, True])
def test_flipped_bits_of_a_checkpoint_are_refused_or_change_nothing_that_is_read(
    tmp_path: Path, checkpoint: Path, mmap: bool
) -> None:
    """Most of the file holds weights. torch.load ignores the checksums of the archive; `read_checkpoint` verifies them."""
    rng, content, original, refused = random.Random(0), checkpoint.read_bytes(), read_checkpoint(checkpoint), 0
    for _ in range(200):
        (tmp_path / "flipped.ckpt").write_bytes(flipped(content, rng))
        try:
            found = read_checkpoint(tmp_path / "flipped.ckpt", mmap=mmap)
        except InputError:
            refused += 1
        else:
            torch.testing.assert_close(found, original, rtol=0, atol=0)
    assert 160 < refused < 200


def test_a_changed_weight_is_distinguished_from_a_foreign_file(tmp_path: Path, checkpoint: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[content.index(torch.ones(8).numpy().tobytes())] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(InputError, match=r"whole\.ckpt: damaged: the content of \S+/data/0 does not match its checksum"):
        read_checkpoint(checkpoint)
