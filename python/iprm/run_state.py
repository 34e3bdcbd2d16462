"""What a run that was killed needs to go on to the very bits it would have had."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from .checkpoint import STATES, saved_states
from .processes import gathered, rank
from .run_log import RunLog
from .suggest import InputError


class RunState(L.Callback):
    """Saves the whole state of a run, at the beginning of every epoch, every `every_n_steps` steps and at SIGTERM, as
    ``states/step=<N>.ckpt`` in the run's folder: weights, λ and ω, optimiser, schedule, the place in the epoch, the states of
    the random number generators of all processes, and the metrics so far.

    A run that continues from one (``Trainer.fit(ckpt_path=...)`` with this callback, `iprm resume`) computes what it would
    have computed, bit for bit where the operators are deterministic, if order and randomness of its data depend on torch's,
    numpy's and Python's generators alone, and its number of processes is the same.

    Args:
        every_n_steps: optimiser steps between saves within an epoch; 0 saves at its beginning alone.
        keep: how many of the last states are kept, at least 2: of the last one a disk may lose a part.
    """

    def __init__(self, every_n_steps: int = 0, keep: int = 2) -> None:
        if every_n_steps < 0:
            raise InputError(f"every_n_steps: expected a number from 0 up, got {every_n_steps}")
        if keep < 2:
            raise InputError(f"keep: expected at least 2, got {keep}")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.saved: Path | None = None  # the last one
        self._trainer: L.Trainer | None = None
        self._restored: list[dict[str, Any]] = []  # the generators of each process

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if rank() < len(self._restored):
            restore_generators(self._restored[rank()])
        self._restored = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has counted the epoch as begun, and would take a run that is restored here to be at its end
        loop = trainer.fit_loop
        loop.epoch_loop.batch_progress.reset_on_run()
        loop.epoch_loop.val_loop.batch_progress.reset()  # of the last epoch
        counts = (loop.epoch_progress.current, loop.epoch_progress.total)
        for count in counts:
            count.ready -= 1
        self._save(trainer)
        for count in counts:
            count.ready += 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        # nothing of an epoch's end is saved: its validation would be lost on the way
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if due and not loop._should_accumulate() and not loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # gradients that were being accumulated are of no checkpoint: the run goes on from the last state
        if isinstance(exception, SIGTERMException) and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # the same on every process
        self.saved = folder / STATES / f"step={trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(self.saved)
        if trainer.is_global_zero:
            for old in saved_states(folder)[: -self.keep]:
                old.unlink()

    def state_dict(self) -> dict[str, Any]:
        return {"generators": gathered(generators()), "metrics": [row for log in self._logs() for row in log.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state["generators"]
        for log in self._logs():
            log.restore(state["metrics"])

    def _logs(self) -> list[RunLog]:
        """The run's metrics.csv, if it has one."""
        loggers = self._trainer.loggers if self._trainer else []
        return [logger for logger in loggers if isinstance(logger, RunLog)][:1]


def generators() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators of random numbers, in tensors and plain values."""
    name, key, *rest = np.random.get_state()  # noqa: NPY002 - the generator that others use
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Sets the generators to what `generators` returned."""
    torch.set_rng_state(states["torch"])
    name, key, *rest = states["numpy"]
    assert isinstance(key, Tensor)
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(_tuples(states["python"]))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def _tuples(state: Any) -> Any:
    version, numbers, gauss = state
    return version, tuple(numbers), gauss
