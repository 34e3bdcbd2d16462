"""Trains several runs in parallel processes; if one run fails, the others continue."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from iprm.data.loading import available_cores
from iprm.errors import InputError
from iprm.files import FULL, write_atomically
from iprm.streams import write_any_text
from iprm.training.checkpoint import saved_states

from .run import Job
from .runs import CONFIG, FAILED

#: Small models train no faster with more workers than this.
MAX_JOBS = 8

Advance = Callable[[int], None]
Train = Callable[[Job, Advance], None]


def default_jobs(runs: int) -> int:
    """One process per core that this process may use, at most `MAX_JOBS` or the number of runs; one if there is a GPU."""
    if torch.cuda.is_available():
        return 1
    return max(1, min(available_cores(), runs, MAX_JOBS))


def sweep(jobs: Sequence[Job], train: Train, processes: int) -> None:
    """Trains every job, `processes` at a time, under a progress bar that counts epochs.

    If a job raises an Exception, failed.txt in its folder states the reason, and the other jobs continue. A full disk
    ends them all.

    Args:
        train: called with a job and a function that counts epochs; pickled by name if there are several processes.

    Raises:
        InputError: one of several processes was killed.
    """
    with _progress(sum(max(0, job.config["trainer"]["max_epochs"] or 0) for job in jobs)) as advance:
        if processes == 1:
            for job in jobs:
                _attempt(train, job, advance)
        elif jobs:
            _in_parallel(jobs, train, processes, advance)


def _attempt(train: Train, job: Job, advance: Advance) -> None:
    (job.folder / FAILED).unlink(missing_ok=True)
    try:
        train(job, advance)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise  # the next run could not write either
        job.folder.mkdir(parents=True, exist_ok=True)
        if not saved_states(job.folder):  # it failed before its first step; the file may be of an earlier attempt
            write_atomically(job.folder / CONFIG, yaml.safe_dump(job.config, sort_keys=False))
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        write_atomically(job.folder / FAILED, f"{reason}\n\n{traceback.format_exc()}")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the context, SIGTERM raises SystemExit instead of ending the process at once."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # the convention of shells


@contextmanager
def _progress(epochs: int) -> Iterator[Advance]:
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task("", total=epochs)
        yield lambda ended: progress.advance(task, ended)


def _in_parallel(jobs: Sequence[Job], train: Train, processes: int, advance: Advance) -> None:
    # A fork of this process could hang, because its torch has threads. The workers are forked from a server, which imports once
    # what they need, and does not initialise CUDA; where there is no fork, every worker imports it.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([train.__module__])
    epochs = context.SimpleQueue()
    own = (epochs, multiprocessing.get_start_method())
    with ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=_start_worker, initargs=own) as pool:
        pending: set[Future[None]] = {pool.submit(_attempt_in_worker, train, job) for job in jobs}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not epochs.empty():
                    advance(epochs.get())
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"one of {processes} processes was killed, perhaps for a lack of memory; --jobs N starts N at once"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while multiprocessing.active_children():  # repeated: a worker may save its state and take its next job
                for process in multiprocessing.active_children():
                    process.terminate()
                time.sleep(0.5)
            raise


_epochs: Any = None  # in a worker: the queue that reports each epoch to the parent


def _start_worker(epochs: Any, start_method: str) -> None:
    global _epochs
    _epochs = epochs
    write_any_text()
    # workers of a DataLoader start as in a process of iprm fit: forked here, they notice if this process is killed
    multiprocessing.set_start_method(start_method, force=True)
    signal.signal(signal.SIGTERM, _end)
    logging.getLogger("iprm.data.quality").setLevel(logging.ERROR)  # the parent has already logged these warnings
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Waits for the end of the parent, after which this process would train on; it then saves its state and ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _attempt_in_worker(train: Train, job: Job) -> None:
    try:
        _attempt(train, job, _epochs.put)
    except SystemExit as end:  # otherwise the pool would start its next job
        os._exit(end.code if isinstance(end.code, int) else 1)
