"""`iprm compare`: methods x seeds on one dataset."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from iprm.data import make_data
from iprm.errors import InputError
from iprm.methods import METHODS
from iprm.training.classifier import FusionClassifier

from .run import Result, Settings, run

#: Workers load torch and Lightning anew (some 300 MB each), and models this small do not get faster beyond this.
MAX_JOBS = 8


def default_methods(modalities: Sequence[str]) -> list[str]:
    """Each modality alone, the baselines, then IPRM without its ablations."""
    baselines = [name for name in METHODS if name != "unimodal" and not name.startswith("iprm")]
    return [*(f"unimodal-{modality}" for modality in modalities), *baselines, "iprm"]


def default_jobs(runs: int) -> int:
    """One process a core this process may use, but a GPU is not shared."""
    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, runs, MAX_JOBS))


def check(
    settings: Settings, methods: Sequence[str] | None, seeds: Sequence[int]
) -> tuple[list[str], tuple[str, ...], dict[str, Any]]:
    """Reads the data and builds every model once, so that what is wrong is told before any training.

    Returns:
        The methods, the default ones for None; the modalities; and what is recorded of the splits, by seed.

    Raises:
        InputError: the dataset, a method or an option does not exist or cannot be used.
    """
    sources = {seed: make_data(settings.data, **settings.data_options, seed=seed) for seed in seeds}
    data = sources[seeds[0]]
    names = list(dict.fromkeys(methods)) if methods is not None else default_methods(data.modalities)
    if not names:
        raise InputError("no methods were named")
    for name in names:
        model = FusionClassifier(data.inputs, data.num_classes, name, **settings.model_options)
        model.check_training(data.batch_size)
    return names, data.modalities, {str(seed): source.describe() for seed, source in sources.items()}


def compare(settings: Settings, methods: Sequence[str], seeds: Sequence[int], jobs: int) -> Iterator[Result]:
    """Runs every method with every seed, `jobs` at a time, under a progress bar that counts epochs.

    Yields:
        A result a method and seed, as they finish.

    Raises:
        InputError, NonFiniteError: from the first run that fails; those not begun are not begun any more.
    """
    runs = [(method, seed) for seed, method in itertools.product(seeds, methods)]
    with _progress(len(runs) * settings.epochs) as advance:
        yield from _in_turn(settings, runs, advance) if jobs == 1 else _in_parallel(settings, runs, jobs, advance)


def in_order(results: Sequence[Result], methods: Sequence[str]) -> list[Result]:
    """In the order of `methods`, then of seeds."""
    return sorted(results, key=lambda result: (methods.index(result.method), result.seed))


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, and does not end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # as shells count it


@contextmanager
def _progress(epochs: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task("", total=epochs)
        yield lambda: progress.advance(task)


def _in_turn(settings: Settings, runs: Sequence[tuple[str, int]], advance: Callable[[], None]) -> Iterator[Result]:
    for method, seed in runs:
        yield run(settings, method, seed, advance)


def _in_parallel(
    settings: Settings, runs: Sequence[tuple[str, int]], jobs: int, advance: Callable[[], None]
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # forking a process whose torch has threads can hang
    epochs = context.SimpleQueue()
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(epochs,)) as pool:
        pending: set[Future[Result]] = {pool.submit(_run_in_worker, settings, method, seed) for method, seed in runs}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not epochs.empty():
                    epochs.get()
                    advance()
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield future.result()
        except BaseException:
            for process in multiprocessing.active_children():  # with them ends what they have begun, and what is not begun
                process.terminate()
            raise


_epochs: Any = None  # in a worker: where it tells its parent of each epoch


def _start_worker(epochs: Any) -> None:
    global _epochs
    _epochs = epochs
    signal.signal(signal.SIGTERM, _end)
    logging.getLogger("iprm.data.quality").setLevel(logging.ERROR)  # what it warns of, the parent has said
    torch.set_num_threads(1)


def _run_in_worker(settings: Settings, method: str, seed: int) -> Result:
    try:
        return run(settings, method, seed, lambda: _epochs.put(None))
    except SystemExit as end:  # the pool would go on with the next run
        os._exit(end.code if isinstance(end.code, int) else 1)
