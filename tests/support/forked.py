"""Functions and commands of `iprm` in processes of their own, forked from one that has imported torch, Lightning and iprm.

The server that forks them is started once per worker of pytest; a process then costs milliseconds, not the seconds of imports.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from iprm.cli.main import main
from iprm.compare.run import Job

Command = tuple[Path, Sequence[str]]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["iprm.cli.fit", "iprm.cli.resume", "iprm.cli.test", "iprm.cli.predict", "iprm.compare.sweep"])


def run_commands(commands: Sequence[Command], timeout: float = 120) -> list[int]:
    """Runs `iprm ARGUMENTS` in each folder, one after the other; the output is appended to log.txt there.

    Returns:
        The exit codes; negative if a signal ended the process, as in subprocess.
    """
    return [_ended([_started(_command, folder, "log.txt", arguments, {})], timeout)[0] for folder, arguments in commands]


def run_at_once(commands: Sequence[Command], timeout: float = 120) -> list[int]:
    """The exit codes of `iprm ARGUMENTS`, all started at the same time; the output of the first is in log0.txt, and so on."""
    started = [_started(_command, folder, f"log{n}.txt", given, {}) for n, (folder, given) in enumerate(commands)]
    return _ended(started, timeout)


def start(folder: Path, *arguments: str) -> ForkServerProcess:
    """Starts `iprm ARGUMENTS` in the folder, with log.txt for its output."""
    return _started(_command, folder, "log.txt", arguments, {})


def run_command_on_ranks(folder: Path, processes: int, *arguments: str, timeout: float = 120) -> list[tuple[int, str]]:
    """Exit code and output of `iprm ARGUMENTS` on every rank of a group, started as torchrun starts it on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    logs = [f"rank{rank}.txt" for rank in range(processes)]
    ranks = [
        _started(_command, folder, log, arguments, group | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "tests"})
        for rank, log in enumerate(logs)
    ]
    return [(code, (folder / log).read_text()) for code, log in zip(_ended(ranks, timeout), logs, strict=True)]


def run_on_ranks(folder: Path, processes: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on every rank of a gloo group; tensors and plain values."""
    ranks = [_started(_function, folder, rank, processes, function, arguments) for rank in range(processes)]
    assert _ended(ranks, 300) == [0] * processes
    return [torch.load(folder / f"{function.__name__}.{rank}") for rank in range(processes)]


def write_start_method(job: Job, advance: Callable[[int], None]) -> None:
    """Trains nothing: writes how this process would start the workers of a DataLoader."""
    job.folder.mkdir()
    (job.folder / "start_method.txt").write_text(multiprocessing.get_start_method())


def _started(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def _ended(processes: Sequence[ForkServerProcess], timeout: float) -> list[int | None]:
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _command(folder: Path, log: str, arguments: Sequence[str], environment: dict[str, Any]) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts what it puts in the background with SIGINT ignored
    multiprocessing.set_start_method("fork", force=True)  # for workers of a DataLoader, as in a process of one's own
    os.chdir(folder)
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["iprm", *arguments]
    os._exit(main(arguments))


def _function(folder: Path, rank: int, processes: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    store = folder / f"{function.__name__}.store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        torch.save(function(*arguments), folder / f"{function.__name__}.{rank}")
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo threads may abort an ordinary interpreter exit
