"""The command `iprm fit`."""

from __future__ import annotations

import contextlib
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from iprm.errors import InputError
from iprm.training.callbacks.best_checkpoint import BestCheckpoint, best_checkpoint
from iprm.training.callbacks.csv_logger import RunLog
from iprm.training.callbacks.diagnostics import Diagnostics
from iprm.training.callbacks.run_state import batches_of
from iprm.training.checkpoint import logged_steps, read_checkpoint
from iprm.training.finite import NonFiniteError
from iprm.training.lightning import first_process, quiet_lightning, survive_full_disk
from iprm.training.verification import verify_kernels

from .fusion_cli import FusionCLI, as_list, run
from .run_record import RunRecord

#: Exit codes of a run stopped by SIGTERM and by an interrupt, by the convention of shells: 128 + the number of the signal.
STOPPED, INTERRUPTED = 143, 130
LIMITS = "trainer.max_epochs, max_steps, max_time and limit_train_batches above 0"


def fit_command(arguments: Sequence[str]) -> int:
    """Runs `iprm fit` and returns the exit code."""
    return run(FitCLI, arguments)


def fit_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """All settings of `iprm fit ARGUMENTS`, as config.yaml would hold them.

    Raises:
        InputError: a configuration, setting or dataset does not exist or cannot be used.
    """
    with quiet_lightning():
        parsed = _Parsed(arguments)
        settings = yaml.safe_load(parsed.parser.dump(parsed.config, skip_unset=False))
    settings.pop("config", None)
    return settings


class FitCLI(FusionCLI):
    """`iprm fit`.

    Args:
        folder: the folder of an earlier run to continue; None for a new run.
    """

    command = "fit"
    says_how_to_continue = True

    def __init__(self, arguments: Sequence[str] | dict[str, Any], folder: Path | None = None) -> None:
        self.folder = folder
        self.record: RunRecord | None = None  # None if the run has no folder of its own
        super().__init__(arguments)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model.check_training(self.datamodule.batch_size)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LearningRateFinder):
                raise InputError("LearningRateFinder cannot be used: the learning rate is --optimizer.lr, which it cannot set")
            if self.config.ckpt_path and isinstance(callback, BatchSizeFinder):
                raise InputError(f"{type(callback).__name__} cannot be used in a run that starts from a checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = self.config_init.trainer
        records = trainer.logger is not False and not trainer.fast_dev_run
        callbacks: list[Any] = []
        if trainer.enable_checkpointing is not False:
            callbacks.append(BestCheckpoint(enable_version_counter=not records))  # or it would replace one of another run
            if records:  # otherwise the run has no folder of its own, and its states would be taken for those of another run
                callbacks.append(self.config_init.state)
        loggers: Any = False
        if records:
            log = self._log(trainer.default_root_dir or "runs")
            self.record = RunRecord(log, self.parser, self.config)
            callbacks += [self.record, Diagnostics()]
            loggers = self._loggers(log, trainer.logger)
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(logger=loggers, **kwargs)

    def _log(self, root: str) -> RunLog:
        """The logger of metrics.csv, whose folder is the run's."""
        if self.folder is None:
            return RunLog(root)
        folder = self.folder.absolute()
        return RunLog(folder.parent, "", folder.name)  # the folder may be in the root

    def _loggers(self, log: RunLog, given: Any) -> list[Logger]:
        """`log` and the configured loggers, by default TensorBoard."""
        if given not in (None, True):
            return [log, *as_list(given)]
        state = self.config.ckpt_path
        purged = logged_steps(read_checkpoint(state, mmap=True)) if state and self.folder else None  # these are logged again
        return [log, _Events(log, purged)]

    def fit(self) -> None:
        """Trains. A run that is refused leaves every file as it was.

        Raises:
            InputError: with these settings, no batch is trained on.
            SystemExit: with `STOPPED` or `INTERRUPTED`, after a line that says how to continue.
        """
        verify_kernels(self.trainer, self.model, self.datamodule.batch_size)
        with self.record.kept() if self.record else contextlib.nullcontext():
            try:
                self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)
            except SystemExit as end:  # Lightning exits with 1 after an interrupt
                interrupted = isinstance(end.__context__, KeyboardInterrupt)
                if not interrupted and not isinstance(end, SIGTERMException):
                    raise
                folder = self.record.resumable if self.record and self.says_how_to_continue else None
                if folder is None and interrupted:
                    raise
                if folder is not None and self.trainer.is_global_zero:
                    ended = "interrupted" if interrupted else "stopped by SIGTERM"
                    print(f"{ended}; to continue: iprm resume {shlex.quote(str(folder))}", file=sys.stderr)
                raise SystemExit(INTERRUPTED if interrupted else STOPPED) from end
        if self.record.begun if self.record else batches_of(self.trainer):
            return
        if self.folder is None or not batches_of(self.trainer):
            limits = "trainer.max_epochs, max_steps and max_time beyond the checkpoint" if self.config.ckpt_path else LIMITS
            raise InputError(f"no batch was trained on: expected {limits}")
        if self.says_how_to_continue and self.trainer.is_global_zero:
            print("this run has ended; for more: --trainer.max_epochs, or the limit that it had")

    def execute(self) -> None:
        kept = best_checkpoint(self.trainer)
        try:
            self.fit()
        except NonFiniteError as error:
            best = (kept and kept.best_model_path) or "no checkpoint was written"
            raise NonFiniteError(f"{error}\nbest on validation until then: {best}") from error
        if kept and kept.best_model_path and self.trainer.is_global_zero:
            best = kept.best_model_path
            print(f"best on validation: {best}")
            if self.record:
                test = shlex.join(["iprm", "test", "--config", f"{self.record.folder}/config.yaml", "--ckpt_path", best])
                print(f"to evaluate it on the test split: {test}")


class _Events(TensorBoardLogger):
    """TensorBoard's file of events, in the folder that `RunLog` creates when the run begins."""

    def __init__(self, log: RunLog, purge_step: int | None) -> None:
        # otherwise named by the second: a run resumed within the second of its start would append to the file of that start
        own = f".{secrets.token_hex(4)}"
        super().__init__(log.save_dir, log.name, default_hp_metric=False, purge_step=purge_step, filename_suffix=own)
        self._log = log
        self._survives = False  # a full disk

    @property
    def version(self) -> int | str:
        return self._log.version

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        if first_process() and not self._survives:
            survive_full_disk(writer)
            self._survives = True
        return writer


class _Parsed(FitCLI):
    """Parses settings and builds nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass
