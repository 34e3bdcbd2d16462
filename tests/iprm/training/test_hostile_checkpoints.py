"""Hostile checkpoints: each is refused in 10 seconds, in little memory, and neither runs, deletes nor is believed."""

from __future__ import annotations

import codecs
import os
import random
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TWO, checkpoint, inputs_of
from command import iprm
from forged import MIB, Call, Stored, checkpoint_with, cost_of, forge, pickled, tensor
from iprm.errors import InputError, plain_values
from iprm.training.checkpoint import AtomicCheckpointIO, read_checkpoint

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


HOSTILE: dict[str, Callable[[Path], Path]] = {
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


def read(path: Path) -> Any:
    """The message if the checkpoint is refused; of one that is read, what any command does with its values."""
    try:
        found = read_checkpoint(path, mmap=path.stem == "mapped")
    except InputError as error:
        return str(error)
    plain_values({name: value for name, value in found.items() if name != "state_dict"})
    return found["state_dict"].keys() or "read"


@pytest.mark.parametrize("name", ["read.ckpt", "mapped.ckpt"])
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_checkpoint_is_refused_in_time_and_memory(tmp_path, monkeypatch, make, name):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / name)
    outcome, seconds, mib = cost_of(read, path)
    assert isinstance(outcome, str), outcome
    assert outcome.startswith((f"{path}: not a checkpoint of iprm fit, or a part of one", f"{path}: damaged: "))
    assert seconds < 10
    assert mib < 2 * path.stat().st_size / MIB + 150
    assert os.listdir(tmp_path) == [name], "it runs nothing"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    """A checkpoint as `iprm fit` writes it."""
    path, _ = checkpoint(tmp_path_factory.mktemp("sealed"))
    AtomicCheckpointIO().save_checkpoint(torch.load(path, weights_only=True), path)
    assert set(read_checkpoint(path)) == set(torch.load(path, weights_only=True, mmap=True))
    return path


def damaged(content: bytes) -> list[bytes]:
    """300 flipped bits, every one in the last 64 bytes, 32 lost pages, and truncations."""
    rng = random.Random(0)
    bits = [*rng.sample(range(8 * len(content)), 300), *range(8 * (len(content) - 64), 8 * len(content))]
    found = [(int.from_bytes(content, "little") ^ (1 << bit)).to_bytes(len(content), "little") for bit in bits]
    places = [*rng.sample(range(len(content) // 512), 31), (len(content) - 1) // 512]
    found += [content[: 512 * n] + bytes(len(content[512 * n : 512 * n + 512])) + content[512 * n + 512 :] for n in places]
    found += [content[:-size] for size in range(1, 80)]
    return found


@pytest.mark.parametrize("mmap", [False, True])
def test_no_flipped_bit_lost_page_or_truncation_is_accepted(sealed, tmp_path, mmap):
    content = sealed.read_bytes()
    accepted = []
    for number, part in enumerate(damaged(content)):
        assert part != content
        (tmp_path / "damaged.ckpt").write_bytes(part)
        try:
            read_checkpoint(tmp_path / "damaged.ckpt", mmap=mmap)
            accepted.append(number)
        except InputError:
            pass
    assert accepted == []


def test_every_plain_value_and_tensor_is_read_as_it_was_saved(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    content = {
        "state_dict": OrderedDict(a=shared, b=shared[1:], c=torch.empty(0, 3), d=torch.tensor(3, dtype=torch.uint16)),
        "hyper_parameters": {"text": "ü\ud800", "bytes": b"\x00\xff", "array": bytearray(b"ab"), "set": {1, "a"}, "none": None},
        "numbers": [True, -1, 2**70, 1e-300, float("inf"), 1 + 2j, torch.Size([2]), torch.device("cpu"), torch.float8_e4m3fn],
        "types": [torch.zeros(3, dtype=dtype) for dtype in (torch.bfloat16, torch.bool, torch.complex64, torch.float8_e5m2)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "module": torch.nn.BatchNorm1d(3).state_dict(),
        "schedule": Counter([3, 3, 5]),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        5: random.Random(0).getstate(),
    }
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "all.ckpt")
    for mmap in (False, True):
        found = read_checkpoint(tmp_path / "all.ckpt", mmap=mmap)
        assert str(found) == str(torch.load(tmp_path / "all.ckpt", weights_only=True))
        assert str(found["numbers"]) == str(content["numbers"])


MODALITIES = {f"m{n}": {"shape": [1], "dtype": "float32"} for n in range(100_000)}
HEAD = "fusion.mix_heads.image_sound.weight"


def filled(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["state_dict"].update({HEAD: torch.full_like(content["state_dict"][HEAD], value)})


MODELS = {
    "weights that are not a number": (
        lambda c: c["state_dict"].update({HEAD: c["state_dict"][HEAD] * float("nan")}),
        "not finite",
    ),
    "weights without bound": (filled(3e38), "not finite"),
    "a hundred thousand modalities": (lambda c: c["hyper_parameters"].update(inputs=MODALITIES), "at most 256 modalities"),
    "a billion classes": (lambda c: c["hyper_parameters"].update(num_classes=10**9, classes=None), "cannot be made"),
    "features of a trillion": (lambda c: c["hyper_parameters"].update(feature_dim=10**12), "cannot be made"),
    "an encoder of theirs": (lambda c: c["hyper_parameters"].update(encoders={"image": "theirs.Encoder"}), "imported and run"),
}


@pytest.mark.parametrize("command", ["predict", "export"])
@pytest.mark.parametrize(("edit", "message"), MODELS.values(), ids=MODELS.keys())
def test_a_hostile_model_is_refused_and_nothing_written(sealed, tmp_path, edit, message, command):
    content = read_checkpoint(sealed)
    edit(content)
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "model.ckpt")
    np.savez(tmp_path / "new.npz", **{f"x_{name}": x.numpy() for name, x in inputs_of(TWO, 9).items()})
    options = ("--input", "new.npz", "--output", "p.csv") if command == "predict" else ("--output", "exported")
    outcome, seconds, mib = cost_of(iprm, tmp_path, command, "--ckpt_path", "model.ckpt", *options)
    assert (outcome.code, outcome.err.count("\n"), message in outcome.err) == (2, 1, True), outcome
    assert seconds < 10
    assert mib < 300
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.ckpt", "new.npz"]
