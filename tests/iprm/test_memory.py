"""The memory that is available, of the machine and within the limits of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from iprm.memory import available_memory

MACHINE = 8 * 2**30
V1 = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
V2 = ("max", "current", "inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int = 0, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names[:2], "stat"), (limit, used, f"cache 7\n{names[2]} {cached}"), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")


def found(tmp_path: Path, groups: str) -> int:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {MACHINE // 1024} kB\n")
    (proc / "self/cgroup").write_text(groups)
    return available_memory(proc, tmp_path / "groups")


@pytest.mark.parametrize(
    ("folder", "own", "names"),
    [
        (".", "0::/\n", V2),
        ("a/b", "0::/a/b\n", V2),
        ("a", "0::/a/b\n", V2),
        ("unified/a", "1:cpu:/x\n0::/a\n", V2),
        ("memory/a", "4:memory:/a\n0::/\n", V1),
        ("memory", "11:cpuset,memory:/docker/0123\n", V1),
    ],
    ids=["of the container", "of the process", "above", "hybrid", "version 1", "of a container of version 1"],
)
def test_a_limit_counts_less_what_is_used_and_not_cached(tmp_path, folder, own, names):
    group(tmp_path / "groups" / folder, names, 2**30, 2**29, 2**20)
    assert found(tmp_path, own) == 2**29 + 2**20


def test_without_a_limit_the_machine_counts(tmp_path):
    group(tmp_path / "groups", V2, "max", 2**29)
    group(tmp_path / "groups/memory", V1, 2**63 - 4096, 2**29)
    assert found(tmp_path, "4:memory:/\n0::/\n") == MACHINE


def test_the_limit_of_another_controller_does_not_count(tmp_path):
    group(tmp_path / "groups/memory", V1, 2**20)
    assert found(tmp_path, "4:cpu:/\nnonsense\n") == MACHINE


def test_this_machine_has_memory():
    assert 2**20 < available_memory() < 2**50
    assert 2**20 < available_memory(Path("/nowhere"), Path("/nowhere")) < 2**50
