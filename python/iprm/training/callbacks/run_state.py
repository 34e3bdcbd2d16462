"""The saved state of a run, from which a killed run resumes bit-identically."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from iprm.data.module import MultimodalData
from iprm.distributed import gathered, rank, world_size
from iprm.errors import InputError
from iprm.training.checkpoint import STATES, check_counters, saved_states
from iprm.training.lightning import at_batch_boundary, epoch_not_begun, resume_at_epoch_start, skip_sigterm_broadcast

from .csv_logger import RunLog

#: Batches between all-reduces of the SIGTERM flag, each of which synchronises with the GPU.
ASK_EVERY = 20
#: Key of the state under which the rows of a batch are saved, over all processes.
ROWS = "rows a step"


class RunState(L.Callback):
    """Saves the whole state of a run, at the beginning of every epoch, every `every_n_batches` batches and at SIGTERM, as
    ``states/batch=<N>.ckpt`` in the run's folder: weights, λ and ω, optimiser, schedule, the position in the epoch, the states
    of the random number generators of all processes, and the metrics so far.

    A run resumed from a state (``Trainer.fit(ckpt_path=...)`` with this callback, or `iprm resume`) is bit-identical to an
    uninterrupted one under these conditions:

    - the operators are deterministic;
    - the order of the data depends on seed and epoch alone, as in `MultimodalData`. A loader that shuffles by torch's
      generator draws from it before this callback restores it;
    - random augmentation uses torch's, numpy's or Python's generators. Those of workers are not saved:
      `iprm.data.loading.Loader` seeds them for each batch;
    - the number of processes is the same.

    Args:
        every_n_batches: batches between saves within an epoch. A save is postponed by a few batches if a validation is due or
            gradients are being accumulated. 0 saves at the beginning of each epoch only.
        keep: number of most recent states to keep, at least 2, because a disk failure may truncate the last one.
    """

    def __init__(self, every_n_batches: int = 0, keep: int = 2) -> None:
        if every_n_batches < 0:
            raise InputError(f"every_n_batches: expected a number from 0 up, got {every_n_batches}")
        if keep < 2:
            raise InputError(f"keep: expected at least 2, got {keep}")
        self.every_n_batches, self.keep = every_n_batches, keep
        self.saved: Path | None = None  # the most recent state
        self._trainer: L.Trainer | None = None
        self._restored: list[dict[str, Any]] = []  # generator states, one per process
        self._at_epoch_start = False  # whether the state being saved, or restored, is at the beginning of an epoch
        self._saved_at = 0  # batches
        self._saved_data: dict[str, Any] = {}  # of the last state saved; `BatchSizeFinder` changes the batch and restores it
        self._unasked = 0  # batches since the last all-reduce of the SIGTERM flag
        self._signal = _Termination()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if rank() < len(self._restored):
            restore_generators(self._restored[rank()])
        self._restored = []
        self._saved_at = batches_of(trainer)
        if self._at_epoch_start:  # otherwise Lightning may place a run limited by steps in the middle of the previous epoch
            resume_at_epoch_start(trainer)
        # Lightning's own handler starts a collective inside the signal handler, possibly in the middle of another one, and its
        # loop synchronises with the GPU at every step to read the flag
        self._signal.catch(trainer)
        skip_sigterm_broadcast(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._at_epoch_start = True
        with epoch_not_begun(trainer):
            self._save(trainer)
        self._at_epoch_start = False
        if self._signal.came_to_any():
            raise SIGTERMException

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_batches and batches_of(trainer) >= self._saved_at + self.every_n_batches
        if world_size() == 1 and not due and not self._signal.came_to_any():
            return
        self._unasked += 1
        if not at_batch_boundary(trainer):
            return
        stops = (world_size() == 1 or self._unasked >= ASK_EVERY) and self._signal.came_to_any()
        self._unasked = 0 if self._unasked >= ASK_EVERY else self._unasked
        if due or stops:
            self._save(trainer)
        if stops:
            raise SIGTERMException

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signal.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._signal.release()

    def _save(self, trainer: L.Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # equal on all processes
        self.saved = folder / STATES / f"batch={batches_of(trainer):08d}.ckpt"
        self._saved_at = batches_of(trainer)
        # the state that the run was resumed from remains as it is: the optimiser may still refuse it in its first step
        if not trainer.ckpt_path or os.path.realpath(self.saved) != os.path.realpath(trainer.ckpt_path):
            trainer.save_checkpoint(self.saved)
        if trainer.is_global_zero:
            before = [state for state in saved_states(folder) if state <= self.saved]
            for old in before[: -self.keep]:
                old.unlink()

    def state_dict(self) -> dict[str, Any]:
        rows = [row for log in self._logs() for row in log.rows]
        self._saved_data = self._data()
        return {
            "generators": gathered(generators()),
            "metrics": rows,
            "at_epoch_start": self._at_epoch_start,
            "data": self._saved_data,
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        for name, known in trainer.fit_loop.state_dict().items():
            if name in loops and name != "state_dict":  # which holds those of loaders
                check_counters(name, loops[name], known)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        there, here = state["data"], self._data()
        if missing := sorted(here.keys() - there.keys()):
            raise InputError(f"the checkpoint does not state of its data: {', '.join(missing)}")
        if not state["generators"]:
            raise InputError("the checkpoint has no states of random number generators")
        for name, was in there.items() if there != self._saved_data else ():
            if name in here and was != here[name]:
                what = f"batch of {was} rows over all processes" if name == ROWS else f"{name} of {was}"
                raise InputError(f"other data: the state has a {what}, this run {here[name]}")
        for states in state["generators"]:
            check_generators(states)
        self._restored, self._at_epoch_start = state["generators"], bool(state["at_epoch_start"])
        for log in self._logs():
            log.restore(state["metrics"])

    def _data(self) -> dict[str, Any]:
        """What determines the rows of each batch: the seed, sizes and digests of the splits, and the size of a joint batch."""
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, MultimodalData):
            return {}
        splits = {f"{name} split": described for name, described in data.describe().items()}
        return {"seed": data.seed, ROWS: data.batch_size * world_size(), **splits}

    def _logs(self) -> list[RunLog]:
        """The run's metrics.csv, if it has one."""
        loggers = self._trainer.loggers if self._trainer else []
        return [logger for logger in loggers if isinstance(logger, RunLog)][:1]


def batches_of(trainer: L.Trainer) -> int:
    """Batches that a run has trained on. Unlike Lightning's global step, this does not depend on optimiser steps per batch."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


class _Termination:
    """Records SIGTERM, to this process or to any other of the run."""

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None  # the previous handler; None while ours is not installed

    def catch(self, trainer: L.Trainer) -> None:
        def remember(number: int, frame: Any) -> None:
            launcher = trainer.strategy.launcher
            if not self._came and launcher is not None:
                launcher.kill(number)  # forwards the signal to the processes that this one started
            self._came = True

        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, remember)

    def release(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def came_to_any(self) -> bool:
        """Whether any process received SIGTERM: an all-reduce, which synchronises with the device."""
        if world_size() == 1:
            return self._came
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        came = torch.tensor(int(self._came), device=device)
        dist.all_reduce(came, op=dist.ReduceOp.MAX)
        return bool(came.item())


def generators() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's random number generators, as tensors and plain values."""
    name, key, *rest = np.random.get_state()  # noqa: NPY002 - the global generator, which other libraries use
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def check_generators(states: dict[str, Any]) -> None:
    """Raises an error unless `states` can be restored, by restoring them in generators that nothing uses."""
    torch.Generator().set_state(states["torch"])
    numpy_state = _numpy_state(states)
    if not 0 <= numpy_state[2] <= 624:  # numpy would read beyond its memory
        raise InputError(f"the checkpoint's state of numpy's generator is at {numpy_state[2]}, expected 0 to 624")
    np.random.RandomState().set_state(numpy_state)
    random.Random().setstate(_python_state(states))


def restore_generators(states: dict[str, Any]) -> None:
    """Sets the generators to what `generators` returned."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(_numpy_state(states))  # noqa: NPY002
    random.setstate(_python_state(states))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def _numpy_state(states: dict[str, Any]) -> tuple[Any, ...]:
    name, key, *rest = states["numpy"]
    assert isinstance(key, Tensor)
    return (name, key.numpy().astype(np.uint32), *rest)


def _python_state(states: dict[str, Any]) -> tuple[Any, ...]:
    version, numbers, gauss = states["python"]
    return version, tuple(numbers), gauss
