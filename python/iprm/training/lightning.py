"""Undocumented names of Lightning and tensorboardX, which no other file touches, and the warnings that are silenced.

Each function says which names of Lightning 2.6 or tensorboardX 2.6 it needs, and why. tests/iprm/training/test_lightning.py has
one test per name; pyproject.toml excludes the next minor version of Lightning, which may change them.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning


def at_batch_boundary(trainer: L.Trainer) -> bool:
    """Whether a state saved after this training batch is complete: no gradients are being accumulated, no validation follows,
    and the epoch has a further batch.

    Names: `_TrainingEpochLoop._should_accumulate`, `_TrainingEpochLoop._should_check_val_fx`, `_FitLoop._data_fetcher`, and
    `batch_progress.is_last_batch`. Lightning decides all three inside its loop, and has no hook that says so.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    validates = fetcher is not None and loop._should_check_val_fx(fetcher)
    return not (loop._should_accumulate() or loop.batch_progress.is_last_batch or validates)


@contextlib.contextmanager
def epoch_not_begun(trainer: L.Trainer) -> Iterator[None]:
    """In `on_train_epoch_start`: a checkpoint saved in this context resumes at the beginning of the epoch.

    Names: `epoch_progress.current.ready` and `.total.ready` of `_FitLoop`, `batch_progress` of its loops. Before this hook,
    Lightning counts the epoch as ready, and the counters of batches are those of the previous epoch; a run resumed from such a
    checkpoint would skip the epoch. The counters of batches stay reset: Lightning resets them after this hook.
    """
    loop = trainer.fit_loop
    loop.epoch_loop.batch_progress.reset_on_run()
    loop.epoch_loop.val_loop.batch_progress.reset()
    counts = (loop.epoch_progress.current, loop.epoch_progress.total)
    for count in counts:
        count.ready -= 1
    try:
        yield
    finally:
        for count in counts:
            count.ready += 1


def resume_at_epoch_start(trainer: L.Trainer) -> None:
    """In `on_train_start`, after a checkpoint of `epoch_not_begun` was loaded: the epoch runs from its first batch.

    Name: `_TrainingEpochLoop.restarting`. In a run limited by steps, Lightning would place the checkpoint within an epoch
    and count one step too many in the steps that loggers record.
    """
    trainer.fit_loop.epoch_loop.restarting = False


def first_process() -> bool:
    """Whether this is the first process of a run, as its launcher has set it: known before the processes are connected.

    Name: `rank_zero_only.rank`.
    """
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def next_version(logger: L.pytorch.loggers.CSVLogger) -> int:
    """The number after the highest of the folders ``version_<n>`` of a logger.

    Name: `CSVLogger._get_next_version`.
    """
    return logger._get_next_version()


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Lightning no longer exchanges between processes, after every batch, whether SIGTERM was received: `RunState` does.

    Name: `_TrainingEpochLoop._broadcast_sigterm_tensor`. Its answer is read back from the GPU, which waits for every step.
    """
    setattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)  # noqa: B010 - mypy refuses to assign a method


def survive_full_disk(writer: Any) -> None:
    """What this `tensorboardX.SummaryWriter` cannot write is lost. Otherwise its thread would end with a traceback, and the run
    would wait forever when its queue is full. The run ends at the next file of its own that cannot be written.

    Name: `EventFileWriter._ev_writer`. The writer of the package tensorboard, which Lightning prefers, has none.
    """

    def surviving(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with contextlib.suppress(OSError):
                return function(*arguments)

        return call

    events = getattr(writer.file_writer.event_writer, "_ev_writer", None)
    for name in ("write_event", "flush", "close") if events else ():
        setattr(events, name, surviving(getattr(events, name)))


def to_device(trainer: L.Trainer, batch: Any) -> Any:
    """A batch of a loader as the evaluation loop prepares it: types of the precision, transfer hooks of data and model, device.

    Name: `LightningModule._on_before_batch_transfer`.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences Lightning's remarks on workers, devices, logging interval and checkpoint folders, which do not apply to iprm."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            for message in (
                "Be aware that when using `ckpt_path`, callbacks",
                "Checkpoint directory .* exists and is not empty",
                "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
                "LightningCLI's args parameter",
                "\\s*Dump of a value that does not round-trip: a tuple",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
