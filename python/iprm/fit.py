"""`iprm fit`, `iprm test` and `iprm predict`: LightningCLI on `FusionClassifier` and a dataset."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from .configs import find_config
from .data import DATASETS, dataset_class, options_of
from .data.base import MultimodalData
from .predictions import write_predictions
from .quiet import quiet_lightning
from .suggest import InputError, closest
from .trainer import FusionClassifier

#: How jsonargparse words a name that it does not know.
UNKNOWN = re.compile(r"(?:unrecognized arguments: --|does not accept option '|Option ')(?P<name>[\w.]+)")


class Parser(LightningArgumentParser):
    """A parser whose errors suggest the name that was probably meant, and are raised for `main` to print."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(_with_suggestion(message, _option_names(self)))


def _option_names(parser: LightningArgumentParser) -> list[str]:
    """All options in dotted form, those of every subcommand and dataset included."""
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action.choices, dict):  # of subcommands
            parsers += action.choices.values()
    names = {action.dest for p in parsers for action in p._actions}
    names |= {f"data.init_args.{option}" for name in DATASETS for option in options_of(dataset_class(name))}
    return sorted(names)


def _with_suggestion(message: str, options: Sequence[str]) -> str:
    """The first thing that went wrong, and the option that was probably meant."""
    match = UNKNOWN.search(message)
    if not match:
        return message
    name = match["name"]
    if "given class_path" in message:
        name = f"data.init_args.{name}"
    suggestion = closest(name, options)
    return f"unknown setting {name!r}" + (f": did you mean {suggestion!r}?" if suggestion else "")


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
        return parser

    def _parse_ckpt_path(self) -> None:
        """The model's settings are those of the configuration; Lightning would add those of the checkpoint, which name the
        shapes, and these come from the data."""

    def before_instantiate_classes(self) -> None:
        given = self.config[self.subcommand]
        if self.subcommand == "fit":
            return
        if not given.ckpt_path:
            raise InputError(f"iprm {self.subcommand} needs a trained model: add --ckpt_path CHECKPOINT (iprm fit prints it)")
        if not Path(given.ckpt_path).is_file():
            raise InputError(f"{given.ckpt_path}: there is no such checkpoint")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = self._get(self.config_init, "trainer")
        if self.subcommand == "fit":
            root = trainer.get("default_root_dir") or "runs"
            kwargs |= {} if trainer.get("logger") is not None else {"logger": CSVLogger(root, name="fit")}
        else:
            kwargs["logger"] = False
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best and self.trainer.is_global_zero:
            print(f"best on validation: {best}")
            print(f"to evaluate it on the test split: iprm test --config {self.trainer.log_dir}/config.yaml --ckpt_path {best}")

    def after_predict(self) -> None:
        path = Path(self.config.predict.output)
        write_predictions(path, self.trainer.predict_loop.predictions)
        print(f"predictions: {path}")


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
            trainer_defaults={
                "callbacks": [ModelCheckpoint(monitor="val_accuracy", mode="max"), RichProgressBar()],
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
            parser_class=Parser,
            args=[command, *_resolve(arguments)],
        )
    return 0


def _resolve(arguments: Sequence[str]) -> list[str]:
    """The arguments with names of shipped configurations and of datasets in place of what they stand for."""
    resolved: list[str] = []
    names = {"--config": _config_path, "-c": _config_path, "--data": _class_path}
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
