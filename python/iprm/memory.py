"""The memory that this process can still allocate, within the limits of the machine and of its container."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

#: Mounts of control groups below /sys/fs/cgroup -> files of the limit, of the use, and the entry of memory.stat that counts
#: cached pages of files, which the kernel drops when memory is short. Version 1, version 2, and version 2 beside version 1.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
MOUNTS = {"memory": VERSION_1, ".": VERSION_2, "unified": VERSION_2}


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be allocated: the least of what the machine has available and of what the control groups of this
    process leave, such as the limit of a container. The arguments are for tests."""
    return min([_of_machine(proc), *_of_groups(proc, groups)])


def _of_machine(proc: Path) -> int:
    available = _entry(proc / "meminfo", "MemAvailable:")
    if available is not None:
        return 1024 * available
    try:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def _of_groups(proc: Path, groups: Path) -> Iterator[int]:
    """What every limited group leaves that this process is in."""
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in ("memory",) if controllers else (".", "unified"):
            limit, use, cached = MOUNTS[mount]
            root = groups / mount
            own = root / path.lstrip("/")
            for folder in (own, *(above for above in own.parents if above.is_relative_to(root))):
                most, used = _text(folder / limit).strip(), _text(folder / use).strip()
                if most.isdecimal() and used.isdecimal():  # "max" without a limit
                    yield max(0, int(most) - int(used) + (_entry(folder / "memory.stat", cached) or 0))


def _entry(path: Path, name: str) -> int | None:
    """The number that follows a name in a file of names and numbers."""
    words = _text(path).split()
    return int(words[words.index(name) + 1]) if name in words else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
