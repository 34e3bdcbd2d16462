"""The command `iprm fit`."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from iprm.training.callbacks.best_checkpoint import BestCheckpoint, best_checkpoint
from iprm.training.callbacks.csv_logger import RunLog
from iprm.training.callbacks.diagnostics import Diagnostics
from iprm.training.checkpoint import logged_steps, read_checkpoint
from iprm.training.finite import NonFiniteError
from iprm.training.lightning import quiet_lightning

from .fusion_cli import FusionCLI, as_list, run

#: Exit code of a run stopped by SIGTERM, by the convention of shells: 128 + 15.
STOPPED = 143


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


class _SaveSettings(SaveConfigCallback):
    """Writes config.yaml, without the checkpoint that the run started from: a resumed run starts from its own state."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.config = copy.deepcopy(self.config)
        self.config.ckpt_path = None
        super().setup(*args, **kwargs)


class FitCLI(FusionCLI):
    """`iprm fit`.

    Args:
        folder: the folder of an earlier run to continue; None for a new run.
    """

    command = "fit"

    def __init__(self, arguments: Sequence[str] | dict[str, Any], folder: Path | None = None) -> None:
        self.folder = folder
        super().__init__(arguments, save_config_callback=_SaveSettings, save_config_kwargs={"overwrite": True})

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model.check_training(self.datamodule.batch_size)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = self.config_init.trainer
        records = trainer.logger is not False and not trainer.fast_dev_run
        callbacks: list[Any] = []
        if trainer.enable_checkpointing is not False:
            callbacks.append(BestCheckpoint())
            if records:  # otherwise the run has no folder of its own, and its states would be taken for those of another run
                callbacks.append(self.config_init.state)
        self.trainer_defaults["callbacks"] = [*callbacks, *([Diagnostics()] if records else [])]
        loggers = self._loggers(trainer.default_root_dir or "runs", trainer.logger) if records else False
        return super().instantiate_trainer(logger=loggers, **kwargs)

    def _loggers(self, root: str, given: Any) -> list[Logger]:
        """The logger of metrics.csv, whose folder is the run's, and the configured loggers, by default TensorBoard."""
        log = RunLog(root)
        if self.folder is not None:
            folder = self.folder.absolute()
            log = RunLog(folder.parents[1], folder.parent.name, folder.name)
        if given not in (None, True):
            return [log, *as_list(given)]
        state = self.config.ckpt_path
        purged = logged_steps(read_checkpoint(state, mmap=True)) if state and self.folder else None  # these are logged again
        return [log, TensorBoardLogger(log.save_dir, log.name, log.version, default_hp_metric=False, purge_step=purged)]

    def execute(self) -> None:
        # Trainer.log_dir cannot be used: it broadcasts, and after SIGTERM the other processes have exited
        folder = getattr(self.trainer.logger, "log_dir", None) or self.trainer.default_root_dir
        kept = best_checkpoint(self.trainer)
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)
        except SIGTERMException as end:
            if self.trainer.is_global_zero:
                print(f"stopped by SIGTERM; to continue: {shlex.join(['iprm', 'resume', str(folder)])}", file=sys.stderr)
            raise SystemExit(STOPPED) from end
        except NonFiniteError as error:
            best = (kept and kept.best_model_path) or "no checkpoint was written"
            raise NonFiniteError(f"{error}\nbest on validation until then: {best}") from error
        if kept and kept.best_model_path and self.trainer.is_global_zero:
            best = kept.best_model_path
            print(f"best on validation: {best}")
            test = shlex.join(["iprm", "test", "--config", f"{folder}/config.yaml", "--ckpt_path", best])
            print(f"to evaluate it on the test split: {test}")


class _Parsed(FitCLI):
    """Parses settings and builds nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass
