"""What `python -m iprm_kernels verify` found on a device: kept in the user's cache folder, and read by `backends`.

One JSON file per device and build. Its key has everything that a kernel's result or time depends on; a file with another key is
never used. Everything in a file is checked, and a file that is damaged counts as none.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .convention import OPERATORS
from .dtypes import FLOATING

FOLDER = Path(__file__).parent
FORMAT = 1
#: Largest file that is read.
LARGEST = 1 << 20

#: Sizes, by the work of a call: the elements of one feature or logit matrix, or B·D·C for head steps.
SIZES = ("small", "medium", "large")
#: A call with fewer is small, or medium. Small steps are bound by launches: (64, 512) features, heads of 31 classes.
ROW_BOUNDS, HEAD_BOUNDS = (1 << 16, 1 << 21), (1 << 21, 1 << 28)


def size_class(work: int, head: bool) -> str:
    """The size of a call. work: B·D of features or B·C of logits; head: work is B·D·C of a head step."""
    small, medium = HEAD_BOUNDS if head else ROW_BOUNDS
    return "small" if work < small else "medium" if work < medium else "large"


class Case(NamedTuple):
    """A kind of call that one backend is verified for and another may be faster at."""

    operator: str
    dtype: str  #: "float32"
    size: str


class Result(NamedTuple):
    """What was found for a backend in one case."""

    backend: str
    case: Case
    reason: str  #: why it failed; empty if it passed
    ratio: float | None  #: its time over that of the reference, forward and backward; None if it was not timed


def key(device: torch.device) -> dict[str, str]:
    """What the kernels of this machine depend on: device, driver, versions, and the kernels themselves."""
    found = {
        "device": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "capability": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else _capability(device),
        "driver": "none" if device.type == "cpu" else _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    return {**found, "kernels": kernels_hash()}


@functools.cache
def kernels_hash() -> str:
    """A hash of the package, whose checks a verdict depends on as well, and of the extension."""
    digest = hashlib.sha256()
    for file in sorted([*FOLDER.rglob("*.py"), *FOLDER.glob("_C*.so"), *FOLDER.glob("_C*.pyd")]):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _capability(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"


def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    return torch.version.hip or torch.version.cuda or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def folder() -> Path:
    """IPRM_KERNELS_CACHE, or iprm-kernels in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("IPRM_KERNELS_CACHE") or os.path.join(cache, "iprm-kernels"))


def _file(of: Mapping[str, str]) -> Path:
    return folder() / f"verdict-{hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]}.json"


#: Verdicts that this process made, by file; also those that could not be written.
_made: dict[Path, list[Result]] = {}


def read(device: torch.device) -> list[Result] | None:
    """The results kept for a device; None if there are none for these kernels, versions and driver."""
    if not _made and not (folder().is_absolute() and any(folder().glob("verdict-*.json"))):
        return None  # without the key, which takes some milliseconds
    of = key(device)
    return list(_known(_file(of), of).values()) or None


def _known(path: Path, of: Mapping[str, str], added: Iterable[Result] = ()) -> dict[tuple[str, Case], Result]:
    """The results in the file, those made by this process, and new ones, which replace earlier ones of the same case."""
    return {(result.backend, result.case): result for result in (*(_read(path, of) or ()), *_made.get(path, ()), *added)}


def _read(path: Path, of: Mapping[str, str]) -> list[Result] | None:
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            return None
        content = json.loads(text)
        if content["format"] != FORMAT or content["key"] != of:
            return None
        return [_result(entry) for entry in content["results"]]
    except (OSError, ValueError, TypeError, LookupError, RecursionError, OverflowError):
        return None


def _result(entry: Any) -> Result:
    backend, operator, dtype, size, reason, ratio = entry
    known = operator in OPERATORS and dtype in {name_of(dtype) for dtype in FLOATING} and size in SIZES
    if not known or not isinstance(backend, str) or not isinstance(reason, str):
        raise ValueError("not a result")
    if ratio is not None and not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and ratio > 0):
        raise ValueError("not a ratio")
    return Result(backend, Case(operator, dtype, size), reason, ratio)


def keep(device: torch.device, results: Iterable[Result]) -> str:
    """Adds results to those kept for a device; they replace those of the same backend and case.

    The file is written beside the old one, flushed and renamed: several processes that do this at once leave the file of one of
    them.

    Returns:
        The path, or why it cannot be written; the results then hold in this process alone.
    """
    of = key(device)
    path = _file(of)
    kept = list(_known(path, of, results).values())
    _made[path] = kept
    rows = [[result.backend, *result.case, result.reason, result.ratio] for result in kept]
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {"format": FORMAT, "made": made, "key": of, "results": rows}
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    if not path.is_absolute():
        return f"{path}: expected an absolute path; set IPRM_KERNELS_CACHE"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("x", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        return f"{path}: cannot be written: {error.strerror}"
    return str(path)


@contextlib.contextmanager
def alone(patience: float) -> Iterator[None]:
    """Context in which no other process verifies, for its own times and so that it can use what the other has found.

    Waits for `patience` seconds at most; without locks, or where the cache folder cannot be written, it does not wait.
    """
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle = os.open(folder() / ".lock", os.O_RDWR | os.O_CREAT, 0o666) if fcntl and folder().is_absolute() else -1
    except OSError:
        handle = -1
    until = time.monotonic() + patience
    try:
        while handle >= 0:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system if this process is killed
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    break
                time.sleep(0.1)
            except OSError:  # no locks on this file system
                break
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def fastest(results: Iterable[Result], case: Case) -> list[str]:
    """The backends that passed and were measured faster than the reference, fastest first.

    Args:
        results: those of all operators that the kernel in question serves, in the type and size of the case; a backend that
            failed in one of them is left out.
        case: the kind of call; its operator's own times precede those of the others.
    """
    found: dict[str, float] = {}
    failed = set()
    for result in results:
        if result.case[1:] != case[1:]:
            continue
        if result.reason:
            failed.add(result.backend)
        elif result.ratio is not None and (result.case == case or result.backend not in found):
            found[result.backend] = result.ratio
    return sorted((name for name, ratio in found.items() if ratio < 1 and name not in failed), key=found.__getitem__)


def summary(results: Iterable[Result]) -> str:
    """What was found for an operator of a backend, in a line: times relative to the reference, and failures."""
    passed: dict[str, list[str]] = {}
    failed: dict[str, list[str]] = {}
    for result in results:
        _, dtype, size = result.case
        if result.reason:
            failed.setdefault(result.reason, []).append(f"{dtype} {size}")
        else:
            passed.setdefault(dtype, []).append(size if result.ratio is None else f"{size} {result.ratio:.2f}")
    parts = [f"{dtype} {', '.join(sizes)}" for dtype, sizes in passed.items()]
    good = f"verified, time over the reference's: {'; '.join(parts)}" if parts else ""
    bad = "; ".join(f"failed for {', '.join(cases)}: {reason}" for reason, cases in failed.items())
    return "; ".join(filter(None, (good, bad))) or "not verified on this device: python -m iprm_kernels verify"


def name_of(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")
