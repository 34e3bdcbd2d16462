"""Every file is written by one function: after an error or a kill at any moment, the old file is there."""

from __future__ import annotations

import ast
import contextlib
import csv
import errno
import itertools
import os
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import iprm
import numpy as np
import pytest
import torch
from command import iprm as command
from feature_files import arrays, save
from iprm.files import ABANDONED, remove_abandoned, replacing, write_atomically
from iprm.training.callbacks import csv_logger
from iprm.training.callbacks.csv_logger import RunLog
from iprm.training.checkpoint import AtomicCheckpointIO
from matplotlib.figure import Figure
from rights import without_rights
from run_folders import write_run

RUN = "runs/fit/version_0"
#: Calls that write the file that is their first or second argument.
WRITERS = {"save", "savez", "savez_compressed", "savetxt", "savefig", "to_csv", "save_file"}
#: Calls that create or write a file.
ALWAYS = {
    "write_text",
    "write_bytes",
    "NamedTemporaryFile",
    "mkstemp",
    "TemporaryFile",
    "tofile",
    "copyfile",
    "copytree",
    "copy2",
}


def writes(file: Path) -> Iterator[str]:
    """The calls of a module that write a file, except one that `replacing` has yielded or a buffer in memory."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and isinstance(node.context_expr, ast.Call) and node.optional_vars is not None:
            known |= {ast.unparse(node.optional_vars)} if "replacing" in ast.unparse(node.context_expr.func) else set()
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("io."):
            known |= {ast.unparse(target) for target in node.targets}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        arguments = [ast.unparse(value) for value in [*node.args, *(keyword.value for keyword in node.keywords)]]
        opened = name in ("open", "fdopen") and any(
            a.strip("'") in MODES or "mode" in a or "os.O_CREAT" in a for a in arguments
        )
        saved = name in WRITERS and len(arguments) > 0 and known.isdisjoint(arguments)
        if opened or saved or name in ALWAYS:
            yield ast.unparse(node)


MODES = {f"{letter}{more}" for letter in "wax" for more in ("", "b", "t", "+", "b+", "+b", "t+", "+t")} | {"r+", "r+b", "rb+"}


#: Calls of other modules, by the reason for which they write no file that could be lost.
ALLOWED = {
    "checkpoint.py": "torch.save(checkpoint, sealing)",  # to a file of `replacing`
    "export.py": "save(weights_read(program))",  # to bytes
    "locks.py": "os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 438)",  # the file that is locked
}


def test_no_other_module_opens_a_file_for_writing():
    root = Path(iprm.__file__).parent
    calls = {(file.name, call) for file in root.rglob("*.py") for call in writes(file) if file != root / "files.py"}
    assert calls == set(ALLOWED.items())
    assert len(list(writes(root / "files.py"))) == 4, "a file for `replacing`, a device, and the tests of an output"


# modes, links, devices


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, mask, expected):
    with umask(mask):
        write_atomically(tmp_path / "a.txt", "a")
        AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    assert [mode(path) for path in sorted(tmp_path.iterdir())] == [expected] * 2


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "a").chmod(0o640)
    write_atomically(tmp_path / "a", b"new")
    assert ((tmp_path / "a").read_bytes(), mode(tmp_path / "a")) == (b"new", 0o640)


def test_every_file_of_a_run_has_the_mode_of_the_umask(tmp_path):
    save(tmp_path, arrays())
    fit = ("fit", "--data", "features", "--data.path", "features.npz", "--trainer.max_epochs", "1")
    with umask(0o002):
        assert command(tmp_path, *fit).code == 0
        assert command(tmp_path, "report", RUN).code == 0
    files = {path: mode(path) for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert len(files) == 7
    assert set(files.values()) == {0o664}
    assert mode(tmp_path / "report.html") == 0o664


def test_a_link_remains_one_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")
    for content in ("old", "new"):
        write_atomically(tmp_path / "link", content)
        assert (tmp_path / "elsewhere/file").read_text() == content
    assert (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_to(tmp_path):
    """As for --output /dev/stdout; replacing a device would break the machine."""
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_atomically(tmp_path / "pipe", "content")
    reader.join(10)
    assert read == ["content"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize(
    "name", ["x" * 255, "[a]*?", "λ" * 127, os.fsdecode(b"\xff")], ids=["long", "pattern", "wide", "bytes"]
)
def test_any_name_of_a_file_can_be_written_twice(tmp_path, name):
    for content in ("old", "new"):
        write_atomically(tmp_path / name, content)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write_atomically(tmp_path, "a")


def test_an_output_without_the_right_to_write_is_not_replaced(tmp_path):
    write_run(tmp_path / "run")
    assert command(tmp_path, "report", "run").code == 0
    (tmp_path / "report.html").chmod(0o444)
    before = (tmp_path / "report.html").stat().st_mtime_ns
    outcome = without_rights(tmp_path, "report", "run")
    assert outcome == (2, "", "iprm: [Errno 13] Permission denied: 'report.html'\n")
    assert (tmp_path / "report.html").stat().st_mtime_ns == before


# a disk that is full


def text(file: IO[Any]) -> None:
    file.write("x" * 100_000)


def table(file: IO[Any]) -> None:
    csv.writer(file).writerows([["x" * 100]] * 1000)


def checkpoint(file: IO[Any]) -> None:
    torch.save({"weights": torch.zeros(100_000)}, file)


def cache(file: IO[Any]) -> None:
    np.savez(file, a=np.zeros(100_000))


def picture(file: IO[Any]) -> None:
    figure = Figure(figsize=(40, 40))
    figure.subplots().plot(np.random.default_rng(0).normal(size=1000))
    figure.savefig(file)


KINDS = {text: "w", table: "w", checkpoint: "wb", cache: "wb", picture: "wb"}


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file of this process can become larger, as if the disk was full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_a_file_that_has_no_room_is_named_and_the_old_one_is_left(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    with (
        at_most(10_000),
        pytest.raises(OSError, match=f"File too large: '{path}'") as raised,
        replacing(path, KINDS[write]) as file,
    ):
        write(file)
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch, error):
    def fail(_):
        raise OSError(error, os.strerror(error))

    write_atomically(tmp_path / "file", "old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=f"{os.strerror(error)}: '{tmp_path}/file'"):
        write_atomically(tmp_path / "file", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), replacing(tmp_path / "new"):
        (tmp_path / "missing").read_text()
    assert list(tmp_path.iterdir()) == []


class Disk:
    """A disk of 2 MiB in memory, which can be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def full(self, left: int = 0) -> Iterator[None]:
        """Within the context, the disk has room for this number of bytes."""
        there = os.statvfs(self.folder)
        (self.folder / "filler").write_bytes(bytes(max(0, there.f_bavail * there.f_frsize - left)))
        try:
            yield
        finally:
            (self.folder / "filler").unlink()

    def files(self) -> dict[str, bytes]:
        """What a report and a resume read."""
        found = [
            path for path in self.folder.rglob("*") if path.is_file() and "tfevents" not in path.name and path.name != "filler"
        ]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    if os.system(f"mount -t tmpfs -o size=2m tmpfs '{folder}' 2> /dev/null"):
        pytest.skip("needs the right to mount a file system")
    save(folder, arrays())
    assert command(folder, *FIT, "--trainer.max_epochs", "1").code == 0
    yield Disk(folder)
    os.system(f"umount -l '{folder}'")  # lazily: files of runs that failed may be open


FIT = (
    *("fit", "--data", "features", "--data.path", "features.npz", "--data.batch_size", "13", "--model.feature_dim", "8"),
    *("--trainer.enable_progress_bar", "false"),
)
COMPARE = (
    "compare",
    "--data",
    "features",
    "--path",
    "features.npz",
    "--methods",
    "sum,concat",
    "--seeds",
    "1",
    "--epochs",
    "1",
)
COMMANDS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "fit": lambda best: (*FIT, "--trainer.max_epochs", "1"),
    "resume": lambda best: ("resume", RUN, "--trainer.max_epochs", "2"),
    "report": lambda best: ("report", RUN, "--output", "new/report.html"),
    "predict": lambda best: (
        "predict",
        "--config",
        f"{RUN}/config.yaml",
        "--ckpt_path",
        best,
        "--output",
        "new/predictions.csv",
    ),
    "predict samples": lambda best: (
        "predict",
        "--ckpt_path",
        best,
        "--input",
        "features.npz",
        "--output",
        "new/predictions.csv",
    ),
    "export": lambda best: ("export", "--ckpt_path", best, "--output", "new"),
    "profile": lambda best: ("profile", "--config", f"{RUN}/config.yaml", "--steps", "1", "--output", "new"),
    "compare": lambda best: (*COMPARE, "--jobs", "1", "--output", "new"),
    "compare in two processes": lambda best: (*COMPARE, "--jobs", "2", "--output", "new"),
}


@pytest.mark.parametrize("left", [0, 8192, 24576])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_what_was_there_is_left(disk, name, left):
    before = disk.files()
    (best,) = (disk.folder / RUN / "checkpoints").iterdir()
    with disk.full(left):
        code, _, err = command(disk.folder, *COMMANDS[name](str(best)))
    if (name.startswith("predict"), left > 0) == (True, True):
        assert code == 0, "there is room for its few rows"
        (disk.folder / "new/predictions.csv").unlink()
        return
    assert code == 2
    *others, line = err.splitlines()
    assert line.startswith("iprm: [Errno 28] No space left on device: '")
    assert all("runs are finished; to continue" in other for other in others)
    after = disk.files()
    # whole files, written before the state that has no room
    changed = {f"{RUN}/config.yaml", f"{RUN}/metrics.csv"} if name == "resume" else set()
    assert {path for path in before if before[path] != after[path]} <= changed
    assert not [path for path in after if path.endswith(".part")]
    for path in after.keys() - before.keys():  # complete files of runs that had begun
        assert path.startswith(("new/", "runs/fit/version_1/"))
        (disk.folder / path).unlink()


def test_a_run_that_met_a_full_disk_continues_when_there_is_room(disk):
    assert command(disk.folder, "resume", RUN, "--trainer.max_epochs", "2").code == 0
    assert command(disk.folder, "report", RUN).code == 0


# a kill at any moment


def killed(path: Path, moment: str) -> None:
    """Writes the file in another process, which is killed at this moment."""
    child = os.fork()
    if child == 0:
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        try:
            if moment == "fsync":
                os.fsync = kill
            elif moment == "rename":
                Path.replace = kill
            with replacing(path) as file:
                file.write("new" * 100_000)
                if moment == "write":
                    kill()
            if moment == "end":
                kill()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("moment", ["write", "fsync", "rename", "end"])
def test_a_kill_leaves_the_old_file_or_the_new_one_and_the_next_write_removes_what_it_left(tmp_path, moment):
    path = tmp_path / "file"
    path.write_text("old")
    killed(path, moment)
    assert path.read_text() == ("new" * 100_000 if moment == "end" else "old")
    left = [other for other in tmp_path.iterdir() if other != path]
    assert len(left) == (moment != "end")
    for other in left:
        os.utime(other, (time.time() - 2 * ABANDONED,) * 2)
    write_atomically(path, "newer")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("newer", [path])


def test_only_temporary_files_of_the_names_given_are_removed(tmp_path):
    names = [".a.ckpt.0123abcd.part", ".b.ckpt.0123abcd.part", ".notes.0123abcd.part", "a.ckpt", ".a.ckpt.part"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    remove_abandoned(tmp_path, "*.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])


# metrics.csv


def test_the_time_that_metrics_csv_takes_does_not_grow_with_the_epochs(tmp_path, monkeypatch):
    """By the test's clock a write of n rows takes n ms, and an epoch 1 s: unbounded, 2000 epochs would write for 2000 s."""
    clock = [0.0]
    log = RunLog(tmp_path, "fit", 0)

    @contextlib.contextmanager
    def slow(path: Path) -> Iterator[IO[Any]]:
        clock[0] += 1e-3 * len(log.rows)
        written.append(clock[0])
        with replacing(path) as file:
            yield file

    written: list[float] = []
    monkeypatch.setattr(csv_logger, "replacing", slow)
    monkeypatch.setattr(csv_logger.time, "monotonic", lambda: clock[0])
    for epoch in range(2000):
        clock[0] += 1.01
        log.log_metrics({"epoch": epoch, "loss": 1.0}, epoch)
        log.save()
    spent = clock[0] - 2000 * 1.01
    assert spent < 0.021 * clock[0]
    assert max(after - before for before, after in itertools.pairwise(written)) < 110
    log.finalize("success")
    assert (tmp_path / "fit/version_0/metrics.csv").read_text().count("\n") == 2001
