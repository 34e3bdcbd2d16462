"""The arguments of `iprm fit`, `test` and `predict`: how they are explained, and what is said of those that are wrong."""

from __future__ import annotations

import importlib
import inspect
import re
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from iprm.configs import shipped
from iprm.data import DATASETS, dataset_class, options_of
from iprm.errors import InputError, closest, unknown

#: How jsonargparse words what is wrong: with the options of a dataset, with its class, with the name of a setting, ...
IN_DATASET = re.compile(r"Parser key \"data\":.*given class_path '(?P<path>[\w.]+)':\s*(?P<cause>.*)", re.DOTALL)
NO_DATASET = re.compile(
    r"Parser key \"data\":.*(?:given class_path '|a dot import path string: |Import path )(?P<name>[\w.-]+)", re.DOTALL
)
NO_SETTING = re.compile(r"(?:unrecognized arguments: --|does not accept option '|Option ')(?P<name>[\w.]+)")
MISSING = re.compile(r"the following arguments are required: (?:(?:fit|test|predict)\.)?(?P<name>[\w.]+)")
OF_KEY = re.compile(r"Parser key \"(?P<key>[^\"]+)\":\s*")
OF_UNION = re.compile(r"Does not validate against any.*?Subtypes: \[(?P<types>.*?)\]\n.*Given value: (?P<value>.*)", re.DOTALL)
TYPE = re.compile(r"<class '(?:\w+\.)*(?P<name>\w+)'>")

DESCRIPTIONS = {
    "fit": "Trains one model; keeps the checkpoint that is best on validation, and a CSV of every epoch's metrics.",
    "test": "Evaluates a checkpoint on the test split of its data.",
    "predict": "Writes a checkpoint's predictions as CSV: row, target, prediction, and the probability of every class.",
}
EXAMPLES = {
    "fit": """\
  iprm fit --config digits
  iprm fit --config digits --model.method concat --trainer.max_epochs 5
  iprm fit --config features --data.path my_features.npz
  iprm fit --config digits --print_config > mine.yaml""",
    "test": "  iprm test --config runs/digits/fit/version_0/config.yaml --ckpt_path CHECKPOINT",
    "predict": """\
  iprm predict --config runs/digits/fit/version_0/config.yaml --ckpt_path CHECKPOINT
  iprm predict --config mine.yaml --ckpt_path CHECKPOINT --data.predict_split val --output val.csv
  iprm predict --ckpt_path CHECKPOINT --input FOLDER           new samples: iprm predict --input --help explains""",
}
CHECKPOINT = {
    "fit": "checkpoint of an interrupted run that is to be continued",
    "test": "required: the checkpoint, a path that iprm fit has printed",
    "predict": "required: the checkpoint, a path that iprm fit has printed",
}
#: What is said of the settings that are shown, where it is not what their docstring says.
HELP = {
    "config": f"{', '.join(shipped())}, or a YAML file. What follows on the command line overrides it. iprm fit writes its own "
    "beside its checkpoints: use that one to test and to predict",
    "print_config": "print all settings, those of Lightning's Trainer included, as YAML, and exit",
    "seed_everything": "seed of the initial weights (default: 0); the data have their own, --data.seed",
    "trainer.max_epochs": "times to go through the training split (default: 20)",
    "trainer.accelerator": "cpu, gpu, or auto, a GPU if there is one (default: auto)",
    "trainer.precision": "32-true, 16-mixed or bf16-mixed (default: 32-true)",
    "trainer.devices": "how many GPUs, or processes on a CPU (default: auto, all GPUs)",
    "trainer.strategy": "how processes share the work: ddp, or fsdp2, which shards parameters as well (default: auto)",
    "trainer.num_nodes": "machines, each of which runs this command under torchrun or SLURM (default: 1)",
    "trainer.accumulate_grad_batches": "batches whose gradients are added before a step; ω is measured on each (default: 1)",
    "trainer.gradient_clip_val": "longest gradient of all parameters together (default: none)",
    "trainer.default_root_dir": "folder to write runs into (default: runs)",
    "state.every_n_batches": "batches between saves of the state for iprm resume, beside one at the beginning of each epoch",
    "optimizer": "SGD, AdamW, ... of torch.optim, or a class path; its arguments: --optimizer.lr 1e-3",
    "lr_scheduler": "a schedule of torch.optim.lr_scheduler, or a class path, stepped after every epoch; null for none",
    "data": f"{', '.join(DATASETS)}, or the import path of a MultimodalData class",
}
OF_TRAINING = (
    "seed_everything",
    "optimizer",
    "lr_scheduler",
    "trainer.max_epochs",
    "trainer.default_root_dir",
    "state.every_n_batches",
    *(f"trainer.{name}" for name in ("strategy", "num_nodes", "accumulate_grad_batches", "gradient_clip_val")),
)
TITLES = {"trainer": "the run", "model": "the model", "data": "the data", "state": "what is saved"}


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Types and defaults where nothing is said of them in HELP; examples as they are; nothing of what `explain` has hidden."""

    def add_argument(self, action: Action) -> None:
        # argparse's own way to hide a setting, SUPPRESS for its help, would keep it out of config.yaml as well
        if not getattr(action, "hidden", False):
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        return action.help or "" if action.dest in (*HELP, "ckpt_path") else super()._get_help_string(action)


class Parser(LightningArgumentParser):
    """A parser whose errors suggest the name that was probably meant, and are raised for `main` to print."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"formatter_class": _Formatter} | options))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # it parses a part, and what parses the whole will call this again
            super().error(message, ex)
        raise InputError(_explained(message, _settings(self)))

    def add_subclass_arguments(self, baseclass: Any, nested_key: str, *args: Any, **options: Any) -> Any:
        # without a default the data are required; with jsonargparse's own, None, every error would name two types
        default = {"default": inspect.Parameter.empty} if nested_key == "data" else {}
        return super().add_subclass_arguments(baseclass, nested_key, *args, **(default | options))


def explain(parser: LightningArgumentParser, command: str) -> None:
    """Makes the parser's help short: this package's settings, and of Lightning's Trainer the few that most runs need."""
    parser.usage = f"iprm {command} --config NAME_OR_FILE [--SETTING VALUE ...]"
    parser.description = DESCRIPTIONS[command]
    parser.epilog = (
        f"options of the datasets, explained by iprm {command} --data.help NAME:\n{_dataset_options()}\n\n"
        f"examples:\n{EXAMPLES[command]}"
    )
    groups = parser.groups or {}
    for key, title in TITLES.items():
        groups[key].title = title
    parser._action_groups[-1].title = "the checkpoint"  # the arguments of Trainer.fit and its like, added last
    words = HELP | {"ckpt_path": CHECKPOINT[command]}
    for action in parser._actions:
        action.help = words.get(action.dest, action.help)
        action.hidden = not _is_shown(action.dest, command)  # type: ignore[attr-defined]
        if action.dest == "data":
            action.metavar = "NAME"


def _is_shown(setting: str, command: str) -> bool:
    if setting.startswith("model.") or setting in OF_TRAINING:  # of a checkpoint both are fixed
        return command == "fit" and setting not in ("model.inputs", "model.num_classes")
    return setting in HELP or setting in ("help", "output", "ckpt_path")


def _dataset_options() -> str:
    lines = []
    for name in DATASETS:
        options = options_of(dataset_class(name)).values()
        lines.append(f"  {name:<10} {' '.join(f'--data.{option.name}' for option in options)}")
    return "\n".join(lines)


def _settings(parser: LightningArgumentParser) -> list[str]:
    """All settings in dotted form, those of every subcommand included."""
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action.choices, dict):  # of subcommands
            parsers += action.choices.values()
    return sorted({action.dest for p in parsers for action in p._actions})


def _explained(message: str, settings: Sequence[str]) -> str:
    """What went wrong, in the words of the command line, with the name that was probably meant."""
    if match := IN_DATASET.search(message):
        try:
            options = options_of(_imported(match["path"]))
        except (ImportError, AttributeError):
            return _no_dataset(match["path"])
        return _explained_setting(match["cause"], [f"data.{option}" for option in options], "data.")
    if match := NO_DATASET.search(message):
        return _no_dataset(match["name"])
    return _explained_setting(message, settings)


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _no_dataset(name: str) -> str:
    paths = {dataset: path.replace(":", ".") for dataset, path in DATASETS.items()}
    if name in paths:
        return f"dataset {name!r}: in a file, expected its class_path, {paths[name]}"
    return unknown("dataset", name, paths.values())


def _explained_setting(message: str, settings: Sequence[str], prefix: str = "") -> str:
    if match := NO_SETTING.search(message):
        return _no_setting(prefix + match["name"], settings)
    if match := MISSING.search(message):
        if match["name"] == "data":
            return f"no data are given: add --data {' or '.join(DATASETS)}, or --config {' or '.join(shipped())}"
        return f"a setting is missing: add --{prefix}{match['name']} VALUE"
    message = OF_UNION.sub(r"expected one of \g<types>, got \g<value>", message)
    return TYPE.sub(r"\g<name>", OF_KEY.sub(rf"{prefix}\g<key>: ", message))


def _no_setting(name: str, settings: Sequence[str]) -> str:
    group, _, last = name.rpartition(".")
    siblings = {setting.rpartition(".")[2]: setting for setting in settings if setting.rpartition(".")[0] == group}
    suggestion = siblings.get(closest(last, siblings) or "") if siblings else closest(name, settings)
    return f"unknown setting {name!r}" + (f": did you mean {suggestion!r}?" if suggestion else "")
