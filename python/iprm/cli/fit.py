"""`iprm fit`, `iprm test` and `iprm predict`: LightningCLI on `FusionClassifier` and a dataset."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from iprm.configs import find_config
from iprm.data import dataset_class
from iprm.data.module import MultimodalData
from iprm.encoders.description import plain
from iprm.errors import InputError
from iprm.inference.predictions import write_predictions
from iprm.training.callbacks.best_checkpoint import BestCheckpoint, best_checkpoint
from iprm.training.callbacks.csv_logger import RunLog
from iprm.training.callbacks.diagnostics import Diagnostics
from iprm.training.callbacks.progress import RunProgress
from iprm.training.callbacks.run_state import RunState
from iprm.training.checkpoint import AtomicCheckpointIO, logged_steps, read_checkpoint, saved_states, state_to_resume
from iprm.training.classifier import FusionClassifier
from iprm.training.finite import NonFiniteError
from iprm.training.lightning_warnings import quiet_lightning
from iprm.training.optim import LR_SCHEDULER, OPTIMIZER

from .fit_parser import Parser, explain

#: The exit code of a run that SIGTERM has stopped, as shells count it: 128 + 15.
STOPPED = 143


class _SaveSettings(SaveConfigCallback):
    """Writes config.yaml, without the checkpoint that the run began from: the run goes on from its own."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.config = copy.deepcopy(self.config)
        self.config.ckpt_path = None
        super().setup(*args, **kwargs)


class FusionCLI(LightningCLI):
    """Subcommands fit, test and predict. The descriptions of the model's inputs and its classes are those of the data.

    Args:
        folder: of an earlier run that goes on there; None for a new one.
    """

    def __init__(self, *args: Any, folder: Path | None = None, **kwargs: Any) -> None:
        self.folder = folder
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "test", "predict")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.inputs", "model.inputs", compute_fn=plain, apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.add_class_arguments(RunState, "state")
        options: dict[str, Any] = {"instantiate": False, "fail_untyped": False}
        parser.add_subclass_arguments((Optimizer,), "optimizer", skip={"params"}, **options)
        parser.add_subclass_arguments((LRScheduler,), "lr_scheduler", skip={"optimizer"}, **options)
        for name in ("optimizer", "lr_scheduler"):
            parser.link_arguments(name, f"model.{name}", compute_fn=_plain)
        parser.set_defaults({"optimizer": OPTIMIZER, "lr_scheduler": LR_SCHEDULER})

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--output", type=str, default="predictions.csv", help="the CSV file to write")
        explain(parser, subcommand)
        return parser

    def _parse_ckpt_path(self) -> None:
        """The model's settings are those of the configuration; Lightning would add those of the checkpoint, which describe
        the inputs, and these come from the data. `FusionClassifier` refuses a checkpoint of other settings."""

    def before_instantiate_classes(self) -> None:
        given = self.config[self.subcommand]
        if given.ckpt_path:
            read_checkpoint(given.ckpt_path)
        elif self.subcommand != "fit":
            raise InputError(f"{self.subcommand} needs a trained model: add --ckpt_path CHECKPOINT, as iprm fit has printed it")
        if self.subcommand == "predict":
            Path(given.output).parent.mkdir(parents=True, exist_ok=True)  # if this cannot be, better now than after the work

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.subcommand == "fit":
            self.model.check_training(self.datamodule.batch_size)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer, fits = self._get(self.config_init, "trainer"), self.subcommand == "fit"
        callbacks: list[Callback] = []
        if trainer.enable_progress_bar is not False:
            callbacks.append(RunProgress())
        records = fits and trainer.logger is not False and not trainer.fast_dev_run
        if fits and trainer.enable_checkpointing is not False:
            callbacks.append(BestCheckpoint())
            if records:  # else the run has no folder of its own, and its states would be taken for those of another
                callbacks.append(self._get(self.config_init, "state"))
        callbacks += [Diagnostics()] if records else []
        self.trainer_defaults = {"callbacks": callbacks}
        kwargs["logger"] = self._loggers(trainer.default_root_dir or "runs", trainer.logger) if records else False
        if self.subcommand == "predict":  # rows are written in their order, by one process
            kwargs |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        if trainer.strategy == "fsdp2" and self.subcommand != "predict":
            kwargs["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
        given = trainer.plugins or []
        kwargs["plugins"] = [*(given if isinstance(given, list) else [given]), AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, ImportError) as error:
            raise InputError(f"trainer: {error}") from error

    def _loggers(self, root: str, given: Any) -> list[Logger]:
        """metrics.csv, which also says where the run's folder is: a new one, or that of the run that goes on; and the loggers
        that were given, or else TensorBoard's events."""
        log = RunLog(root)
        if self.folder is not None:
            folder = self.folder.absolute()
            log = RunLog(folder.parents[1], folder.parent.name, folder.name)
        if given not in (None, True):
            return [log, *(given if isinstance(given, list) else [given])]
        state = self._get(self.config, "ckpt_path")
        purged = logged_steps(read_checkpoint(state, mmap=True)) if state and self.folder else None  # written again from there
        events = TensorBoardLogger(log.save_dir, log.name, log.version, default_hp_metric=False, purge_step=purged)
        return [log, events]

    def fit(self, **kwargs: Any) -> None:
        try:
            self.trainer.fit(**kwargs)
        except SIGTERMException as end:
            if self.trainer.is_global_zero:
                print(f"stopped by SIGTERM; to go on: iprm resume {self._run()}", file=sys.stderr)
            raise SystemExit(STOPPED) from end
        except NonFiniteError as error:
            best = self._best_checkpoint() or "no checkpoint was due"
            raise NonFiniteError(f"{error}\nbest on validation until then: {best}") from error
        best = self._best_checkpoint()
        if best and self.trainer.is_global_zero:
            print(f"best on validation: {best}")
            print(f"to evaluate it on the test split: iprm test --config {self._run()}/config.yaml --ckpt_path {best}")

    def _run(self) -> str:
        """The folder of the run. `Trainer.log_dir` would ask the other processes for it, which are gone by now."""
        return getattr(self.trainer.logger, "log_dir", None) or self.trainer.default_root_dir

    def _best_checkpoint(self) -> str:
        """Its path; empty where none was written."""
        return getattr(best_checkpoint(self.trainer), "best_model_path", "")

    def after_predict(self) -> None:
        path = Path(self.config.predict.output)
        write_predictions(path, self.trainer.predict_loop.predictions)
        print(f"predictions: {path}")


def lightning_command(
    command: str, arguments: Sequence[str], folder: Path | None = None, cli: Callable[..., FusionCLI] = FusionCLI
) -> int:
    """Runs `iprm fit`, `test` or `predict` and returns the exit code.

    Args:
        folder: of an earlier run that goes on there.
        cli: what runs it.

    Raises:
        InputError: a configuration, setting, dataset or method does not exist or cannot be used.
        NonFiniteError: training met a number that is not finite.
    """
    _make(cli, [command, *_resolve(arguments)], folder=folder)
    return 0


def run_fit(config: Mapping[str, Any], folder: Path, cli: Callable[..., FusionCLI] = FusionCLI) -> None:
    """Runs `iprm fit` in this folder from settings as `fit_settings` returns them; raises what `lightning_command` does.

    A run that the folder already holds continues from its last state.
    """
    state = str(state_to_resume(folder)) if saved_states(folder) else None
    _make(cli, {"subcommand": "fit", "fit": {**config, "ckpt_path": state}}, folder=folder)


def fit_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """All settings that `iprm fit ARGUMENTS` would run with, as its config.yaml has them.

    Raises:
        InputError: a configuration, setting or dataset does not exist or cannot be used.
    """
    parsed = _make(_Parsed, _resolve(arguments), run=False)
    settings = yaml.safe_load(parsed.parser.dump(parsed.config, skip_unset=False))
    settings.pop("config", None)
    return settings


class _Parsed(FusionCLI):
    """Parses settings and instantiates nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def _make(cli: Callable[..., FusionCLI], args: list[str] | dict[str, Any], **options: Any) -> FusionCLI:
    with quiet_lightning():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return cli(
            FusionClassifier,
            MultimodalData,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=_SaveSettings,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"max_epochs": 20, "enable_model_summary": False, "log_every_n_steps": 1},
            parser_class=Parser,
            args=args,
            **options,
        )


def _resolve(arguments: Sequence[str]) -> list[str]:
    """The arguments with names of shipped configurations and of datasets in place of what they stand for."""
    resolved: list[str] = []
    names = {"--config": _config_path, "-c": _config_path, "--data": _class_path, "--data.help": _class_path}
    for argument in arguments:
        option, separator, value = argument.partition("=")
        if separator and option in names:
            resolved.append(f"{option}={names[option](value)}")
        elif resolved and resolved[-1] in names:
            resolved.append(names[resolved[-1]](argument))
        else:
            resolved.append(argument)
    return resolved


def _plain(settings: Namespace | None) -> dict[str, Any] | None:
    """Class path and arguments as dicts of plain values, which a checkpoint can hold."""
    return None if settings is None else settings.as_dict()


def _config_path(name: str) -> str:
    return str(find_config(name))


def _class_path(name: str) -> str:
    """A dataset's name becomes its class; a class path of the user's own stays."""
    if "." in name:
        return name
    cls = dataset_class(name)
    return f"{cls.__module__}.{cls.__qualname__}"
