"""What a run of `iprm fit` keeps in its folder besides its results: its settings. A run that is refused leaves no trace."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.cli import LightningArgumentParser

from iprm.compare.runs import CONFIG
from iprm.errors import InputError, unknown
from iprm.files import FULL, Added, write_atomically
from iprm.locks import locked
from iprm.training.callbacks.csv_logger import RunLog
from iprm.training.checkpoint import saved_states
from iprm.training.lightning import first_process

from .fusion_cli import as_list
from .refusals import refusal


class RunRecord(L.Callback):
    """Writes config.yaml when training begins.

    The file has no checkpoint, because a resumed run starts from its own state, and it has the batch size that a
    `BatchSizeFinder` has found, without the finder.

    Args:
        log: its folder is the run's.
        parser: writes the settings.
        config: all settings.
    """

    def __init__(self, log: RunLog, parser: LightningArgumentParser, config: Any) -> None:
        self._log, self.parser, self.config = log, parser, config
        self.begun = False  # whether training has begun
        self._trained = False  # whether a batch has been trained on
        self._before: str | None = None  # config.yaml of the run that is resumed
        self._locks = contextlib.ExitStack()
        self._locked = False

    @property
    def folder(self) -> Path:
        return Path(self._log.log_dir)

    @property
    def resumable(self) -> Path | None:
        """The folder of the run, if a state has been saved there."""
        return self._log.folder if self._log.folder and saved_states(self._log.folder) else None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Context of a run, in which no other process can resume it. If training has not begun when the context ends, or a
        setting or the state of a resumed run is refused before the first batch has been trained on, the files that the run has
        added are removed; if a setting is refused, config.yaml is as it was.

        Raises:
            InputError: another process trains in the folder.
        """
        if not first_process():
            yield
            return
        folder = self._log.folder
        with contextlib.ExitStack() as self._locks:
            if folder is not None and folder.is_dir():
                self._lock(folder)
            added = Added(folder or Path(self._log.save_dir) / self._log.name / "new")
            try:
                yield
            except BaseException as error:
                if refusal(error):
                    self.begun = self.begun and self._trained
                    if self._before is not None:
                        write_atomically(self.folder / CONFIG, self._before)
                if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
                    raise OSError(error.errno, error.strerror, str(folder or self._log.save_dir)) from None
                raise
            finally:
                if not self.begun and self._log.folder is not None:
                    added.remove(self._log.folder)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a callback that monitors a metric of validation that none has logged, before an epoch is trained."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor: Any = getattr(callback, "monitor", None)
            of_validation = isinstance(monitor, str) and monitor.startswith("val_") and getattr(callback, "strict", True)
            if of_validation and monitor not in trainer.callback_metrics:
                raise InputError(unknown(f"metric of {type(callback).__name__}", monitor, map(str, trainer.callback_metrics)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.log_dir or "")  # a collective call
        if not trainer.is_global_zero:
            self.begun = True
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not self._locked:
            self._lock(folder)
        config = folder / CONFIG
        self._before = config.read_text(encoding="utf-8") if config.is_file() else None
        write_atomically(config, self.parser.dump(self._settings(trainer), skip_unset=False))
        self.begun = True

    def on_train_batch_end(self, *_: Any) -> None:
        self._trained = True

    def _lock(self, folder: Path) -> None:
        self._locks.enter_context(locked(folder, "run"))
        self._locked = True

    def _settings(self, trainer: L.Trainer) -> Any:
        config = self.config.clone()
        config.ckpt_path = None
        if any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            config.data.init_args.batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
            config.trainer.callbacks = [
                callback for callback in as_list(config.trainer.callbacks) if not _finds_batch_size(callback)
            ]
        return config


def _finds_batch_size(callback: Any) -> bool:
    return issubclass(pkgutil.resolve_name(callback.class_path), BatchSizeFinder)
