"""`iprm fit`, `iprm test` and `iprm predict`: LightningCLI on `FusionClassifier` and a dataset."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from .configs import find_config
from .data import dataset_class
from .data.base import MultimodalData
from .diagnostics import Diagnostics
from .fit_parser import Parser, explain
from .guard import NonFiniteError
from .predictions import write_predictions
from .quiet import quiet_lightning
from .suggest import InputError
from .trainer import FusionClassifier


class FusionCLI(LightningCLI):
    """Subcommands fit, test and predict. The model's shapes and classes are those of the data."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "test", "predict")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("shapes", "num_classes"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--output", type=str, default="predictions.csv", help="the CSV file to write")
        explain(parser, subcommand)
        return parser

    def _parse_ckpt_path(self) -> None:
        """The model's settings are those of the configuration; Lightning would add those of the checkpoint, which name the
        shapes, and these come from the data. `FusionClassifier` refuses a checkpoint of other settings."""

    def before_instantiate_classes(self) -> None:
        given = self.config[self.subcommand]
        if given.ckpt_path:
            _check_checkpoint(given.ckpt_path)
        elif self.subcommand != "fit":
            raise InputError(f"{self.subcommand} needs a trained model: add --ckpt_path CHECKPOINT, as iprm fit has printed it")
        if self.subcommand == "predict":
            Path(given.output).parent.mkdir(parents=True, exist_ok=True)  # if this cannot be, better now than after the work

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer, fits = self._get(self.config_init, "trainer"), self.subcommand == "fit"
        callbacks: list[Callback] = []
        if trainer.enable_progress_bar is not False:
            callbacks.append(RichProgressBar())
        if fits and trainer.enable_checkpointing is not False:
            callbacks.append(ModelCheckpoint(monitor="val_accuracy", mode="max"))
        callbacks += [Diagnostics()] if fits else []
        self.trainer_defaults = {"callbacks": callbacks}
        if not fits:
            kwargs["logger"] = False
        elif trainer.logger is None:
            kwargs["logger"] = CSVLogger(trainer.default_root_dir or "runs", name="fit")
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, ImportError) as error:
            raise InputError(f"trainer: {error}") from error

    def fit(self, **kwargs: Any) -> None:
        try:
            self.trainer.fit(**kwargs)
        except NonFiniteError as error:
            best = self._best_checkpoint() or "no checkpoint was due"
            raise NonFiniteError(f"{error}\nbest on validation until then: {best}") from error
        best = self._best_checkpoint()
        if best and self.trainer.is_global_zero:
            print(f"best on validation: {best}")
            print(f"to evaluate it on the test split: iprm test --config {self.trainer.log_dir}/config.yaml --ckpt_path {best}")

    def _best_checkpoint(self) -> str:
        """Its path; empty where none was written."""
        return getattr(self.trainer.checkpoint_callback, "best_model_path", "")

    def after_predict(self) -> None:
        path = Path(self.config.predict.output)
        write_predictions(path, self.trainer.predict_loop.predictions)
        print(f"predictions: {path}")


def _check_checkpoint(path: str | Path) -> None:
    """Raises InputError unless there is a checkpoint of a `FusionClassifier` at `path`."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such checkpoint")
    try:
        whole = zipfile.is_zipfile(path) and "hyper_parameters" in torch.load(path, weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError):
        whole = False
    if not whole:
        raise InputError(f"{path}: not a checkpoint of iprm fit, or a part of one")


def lightning_command(command: str, arguments: Sequence[str]) -> int:
    """Runs `iprm fit`, `test` or `predict` and returns the exit code.

    Raises:
        InputError: a configuration, setting, dataset or method does not exist or cannot be used.
        NonFiniteError: training met a number that is not finite.
    """
    with quiet_lightning():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        FusionCLI(
            FusionClassifier,
            MultimodalData,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"max_epochs": 20, "enable_model_summary": False, "log_every_n_steps": 1},
            parser_class=Parser,
            args=[command, *_resolve(arguments)],
        )
    return 0


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


def _config_path(name: str) -> str:
    return str(find_config(name))


def _class_path(name: str) -> str:
    """A dataset's name becomes its class; a class path of the user's own stays."""
    if "." in name:
        return name
    cls = dataset_class(name)
    return f"{cls.__module__}.{cls.__qualname__}"
