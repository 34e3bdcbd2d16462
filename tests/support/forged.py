"""Checkpoint files that no `iprm fit` writes, and how much time and memory it takes to read them."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 2**20
ROOT = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["iprm.cli.fit", "iprm.cli.predict", "iprm.cli.export"])


class Call:
    """Pickled as a call of `function`; with `state`, followed by a change of the attributes of what it returns."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.function, self.arguments) if self.state is None else (self.function, self.arguments, self.state)


class Stored(NamedTuple):
    """Pickled as a reference to a storage of the archive."""

    key: str
    numel: int
    kind: Any = torch.FloatStorage


class _Pickler(pickle._Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.numel) if isinstance(obj, Stored) else None


def pickled(content: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()


def tensor(stored: Stored, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, stored, offset, size, stride, False, Call(dict))


def forge(
    path: Path, content: bytes, storages: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """Writes an archive as torch.save does, of any pickle and any storages."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", b"little")
        for key, values in (storages or {}).items():
            file.writestr(f"archive/data/{key}", values)
        file.writestr("archive/version", b"3\n")
    return path


def checkpoint_with(**more: Any) -> bytes:
    """The pickle of a checkpoint with these entries."""
    return pickled({"hyper_parameters": {}, "state_dict": {}, **more})


class Cost(NamedTuple):
    """What a function returned, or the error that it raised, and the seconds of a core and the MiB that it took; `outcome` is
    None if it did not end in time."""

    outcome: Any
    seconds: float
    mib: float


def cost_of(function: Callable[..., Any], *arguments: Any, timeout: float = 40) -> Cost:
    """Runs a function in a process of its own, which is killed after `timeout` seconds."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_measured, args=(theirs, function, arguments))
    sys.path.append(str(ROOT))  # modules of tests are `tests.iprm...` to pytest, and this process finds them by that name
    try:
        process.start()
    finally:
        sys.path.remove(str(ROOT))
    theirs.close()
    try:
        found = ours.recv() if ours.poll(timeout) else None
    except EOFError:  # it was killed
        found = None
    process.kill()
    process.join()
    return Cost(None, float("inf"), float("inf")) if found is None else Cost(*found)


def _measured(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begun = _resident("VmRSS"), time.process_time()
    try:
        outcome = function(*arguments)
    except Exception as error:
        outcome = error
    took = time.process_time() - begun, (_resident("VmHWM") - before) / 1024
    try:
        pipe.send((outcome, *took))
    except Exception:
        pipe.send((repr(outcome)[:1000], *took))


def _resident(line: str) -> int:
    """KiB."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{line}:") + 1])
