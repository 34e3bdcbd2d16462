"""LightningCLI for `FusionClassifier` and a dataset, shared by `iprm fit`, `test`, `predict` and `profile`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from iprm.configs import find_config, load_config, shipped
from iprm.data import DATASETS, dataset_class
from iprm.data.labels import MOST_CLASSES
from iprm.data.module import MultimodalData
from iprm.data.split import numbered
from iprm.encoders.description import plain
from iprm.errors import InputError
from iprm.training.callbacks.progress import RunProgress
from iprm.training.callbacks.run_state import RunState
from iprm.training.checkpoint import AtomicCheckpointIO, read_checkpoint
from iprm.training.classifier import FusionClassifier
from iprm.training.lightning import quiet_lightning
from iprm.training.optim import LR_SCHEDULER, OPTIMIZER

from .parser import OneLineErrors
from .refusals import refusal
from .settings_help import help_of, set_titles
from .trainer_settings import check_processes, check_trainer_settings


class SettingsParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, with the dataset as a required setting."""

    def dump(self, cfg: Any, *args: Any, **options: Any) -> str:
        return super().dump(_plain(cfg), *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error and message.endswith("arguments are required: data"):
            raise InputError(f"no data: add --data {' or '.join(DATASETS)}, or --config {' or '.join(shipped())}")
        super().error(message, ex)

    def add_subclass_arguments(self, baseclass: Any, nested_key: str, *args: Any, **options: Any) -> Any:
        # with jsonargparse's default, None, every error in the data would also be reported for the type None
        required = {"default": inspect.Parameter.empty} if nested_key == "data" else {}
        return super().add_subclass_arguments(baseclass, nested_key, *args, **(required | options))


class FusionCLI(LightningCLI, ABC):
    """Parses the settings of a command and builds data, model and trainer; `execute` then does the work of the command.

    LightningCLI is used without its subcommands (``run=False``): one parser is built, by public methods. The dataset
    determines the model's input shapes and number of classes; the configuration determines its other settings.
    `FusionClassifier` refuses a checkpoint of a model with other settings.

    Args:
        arguments: command line arguments after the command, or a dict of all settings, as in config.yaml.
        options: override the arguments of LightningCLI.
    """

    command: str
    needs_checkpoint = False
    _known_classes: Sequence[str] | None = None

    def __init__(self, arguments: Sequence[str] | dict[str, Any], **options: Any) -> None:
        settings: dict[str, Any] = {
            "subclass_mode_data": True,
            "auto_configure_optimizers": False,
            "seed_everything_default": 0,
            "save_config_callback": None,
            "trainer_defaults": {"max_epochs": 20, "enable_model_summary": False, "log_every_n_steps": 1},
            "parser_class": SettingsParser,
            "parser_kwargs": help_of(self.command),
        }
        args = arguments if isinstance(arguments, dict) else _resolve(arguments)
        self._logger_asked = any(argument.startswith("--trainer.logger") for argument in arguments)
        super().__init__(FusionClassifier, MultimodalData, args=args, run=False, **(settings | options))

    @abstractmethod
    def execute(self) -> None:
        """Does the work of the command."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        described = {"inputs": lambda data: plain(data.inputs), "num_classes": _num_classes, "classes": _classes}
        for name, of in described.items():
            parser.link_arguments("data", f"model.{name}", compute_fn=self._of_data(of), apply_on="instantiate")
        parser.add_class_arguments(RunState, "state")
        options: dict[str, Any] = {"instantiate": False, "fail_untyped": False}
        parser.add_subclass_arguments((Optimizer,), "optimizer", skip={"params"}, **options)
        parser.add_subclass_arguments((LRScheduler,), "lr_scheduler", skip={"optimizer"}, **options)
        for name in ("optimizer", "lr_scheduler"):  # as dicts of plain values, which a checkpoint can hold
            parser.link_arguments(name, f"model.{name}", compute_fn=lambda settings: settings and settings.as_dict())
        parser.set_defaults({"optimizer": OPTIMIZER, "lr_scheduler": LR_SCHEDULER})
        set_titles(parser)
        trained = "required: the checkpoint, a path printed by iprm fit"
        text = trained if self.needs_checkpoint else "state of an interrupted run to continue"
        parser.add_argument_group("the checkpoint").add_argument("--ckpt_path", type=str, metavar="FILE", help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        check_trainer_settings(self.config)

    def before_instantiate_classes(self) -> None:
        if self.config.ckpt_path:
            self._known_classes = _class_names(read_checkpoint(self.config.ckpt_path)["hyper_parameters"])
        elif self.needs_checkpoint:
            raise InputError(f"{self.command} needs a trained model: add --ckpt_path CHECKPOINT, a path printed by iprm fit")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause = error.__cause__
            if isinstance(error, InputError) or not isinstance(cause, InputError):
                raise
            raise cause from None  # it is of `_of_data`, within an error of jsonargparse about the link

    def _of_data(self, value: Callable[[MultimodalData], Any]) -> Callable[[MultimodalData], Any]:
        """`value` of the data, whose targets index the classes of the checkpoint, if there is one."""

        def of(data: MultimodalData) -> Any:
            if self._known_classes is not None:
                data.known_classes = self._known_classes
            return value(data)

        return of

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer of the configuration, with a progress bar; `kwargs` override its arguments."""
        given = {**self.config_init.trainer, **kwargs}
        if given["enable_progress_bar"] is not False:
            self.trainer_defaults["callbacks"] = [RunProgress(), *self.trainer_defaults.get("callbacks", [])]
        if given["strategy"] == "fsdp2":
            kwargs["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
        kwargs["plugins"] = [*as_list(given["plugins"]), AtomicCheckpointIO()]
        if self.needs_checkpoint and not self._logger_asked:  # a logger of the configuration is that of its run
            kwargs.setdefault("logger", False)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except Exception as error:
            if (reason := refusal(error)) is None:
                raise
            raise InputError(f"trainer: {reason}") from error
        check_processes(trainer)
        return trainer


def _class_names(settings: Mapping[str, Any]) -> Sequence[str] | None:
    """The names of the classes of a model by its settings in a checkpoint; None if they state no number of classes."""
    count, names = settings.get("num_classes"), settings.get("classes")
    if not isinstance(count, int) or not 1 < count <= MOST_CLASSES:  # damaged; `FusionClassifier` refuses the checkpoint
        return None
    return [str(name) for name in names] if isinstance(names, list) else numbered(count)


def _num_classes(data: MultimodalData) -> int:
    return data.num_classes


def _classes(data: MultimodalData) -> list[str]:
    return list(data.classes)


def _plain(settings: Any) -> Any:
    """A copy of settings with the defaults of some callbacks, enums and devices, as the strings that these callbacks accept."""
    if isinstance(settings, Namespace):
        return Namespace({name: _plain(value) for name, value in vars(settings).items()})
    if type(settings) is dict:
        return {name: _plain(value) for name, value in settings.items()}
    if type(settings) is list:
        return list(map(_plain, settings))
    return settings.value if isinstance(settings, Enum) else str(settings) if isinstance(settings, torch.device) else settings


def as_list(given: Any) -> list[Any]:
    """A Trainer argument, which is None, one object or a list of objects, as a list."""
    return given if isinstance(given, list) else [] if given is None else [given]


def run(cli: type[FusionCLI], arguments: Sequence[str] | dict[str, Any], **options: Any) -> int:
    """Runs a command and returns the exit code.

    Raises:
        InputError: a configuration, setting, dataset or method does not exist or cannot be used.
        NonFiniteError: a non-finite number occurred in training.
    """
    with quiet_lightning():
        cli(arguments, **options).execute()
    return 0


def _resolve(arguments: Sequence[str]) -> list[str]:
    """The arguments, with names of shipped configurations replaced by paths, and names of datasets by import paths.

    Raises:
        InputError: there is no such configuration or dataset, or a file of settings is none.
    """
    resolved: list[str] = []
    names = {"--config": _config_file, "-c": _config_file, "--data": _class_path, "--data.help": _class_path}
    names |= dict.fromkeys(("--trainer", "--model", "--optimizer", "--lr_scheduler", "--state"), _settings_file)
    for argument in arguments:
        option, separator, value = argument.partition("=")
        if separator and option in names:
            resolved.append(f"{option}={names[option](value)}")
        elif resolved and resolved[-1] in names:
            resolved.append(str(names[resolved[-1]](argument)))
        else:
            resolved.append(argument)
    return resolved


def _config_file(name: str) -> str:
    load_config(name)  # whose errors name the file
    return str(find_config(name))


def _settings_file(name: str) -> str:
    """The value of a setting that may be the path of a file with several."""
    if Path(name).is_file():
        load_config(name)
    return name


def _class_path(name: str) -> str:
    """The import path of a dataset given by name or import path."""
    if "." in name:
        return _settings_file(name)
    cls = dataset_class(name)
    return f"{cls.__module__}.{cls.__qualname__}"
