"""The help of commands with settings of model, data and trainer: which settings it shows, and how it explains them."""

from __future__ import annotations

from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from iprm.configs import shipped
from iprm.data import DATASETS

DESCRIPTIONS = {
    "fit": "Trains one model; keeps the checkpoint best on validation and writes the metrics of every epoch as CSV.",
    "test": "Evaluates a checkpoint on the test split of its data.",
    "predict": "Writes the predictions of a checkpoint as CSV: row, target, prediction, and the probability of every class.",
    "profile": """\
Reports where the time of an epoch goes. Trains for a few batches with the settings of iprm fit and prints the time per batch
of every stage: fetching a batch, moving it to the device, forward and backward pass of each encoder and of the head,
optimiser, metrics, and the rest. Writes profile.png and profile.json; no checkpoints, states or logs. Settings that limit the
length of a run have no effect.""",
}
OTHERS = "All settings of iprm fit are accepted; see iprm fit --help."
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
  iprm predict --ckpt_path CHECKPOINT --input FOLDER           new samples: see iprm predict --input --help""",
    "profile": """\
  iprm profile --config digits
  iprm profile --config digits --model.channels_last true --steps 200
  iprm profile --config runs/digits/fit/version_0/config.yaml --data.batch_size 256""",
}
#: Help texts that replace descriptions in docstrings. Lightning's settings are shown only if they have a text here.
HELP = {
    "config": f"{', '.join(shipped())}, or a YAML file. Settings after it on the command line override it. iprm fit writes the "
    "configuration of a run next to its checkpoints: use that file to test and to predict",
    "print_config": "print all settings, including those of Lightning's Trainer, as YAML, and exit",
    "seed_everything": "seed of the initial weights (default: 0); the seed of the data is --data.seed",
    "trainer.max_epochs": "number of passes over the training split (default: 20)",
    "trainer.accelerator": "cpu, gpu, or auto: a GPU if there is one (default: auto)",
    "trainer.precision": "32-true, 16-mixed or bf16-mixed (default: 32-true)",
    "trainer.devices": "number of GPUs, or of processes on a CPU (default: auto, all GPUs)",
    "trainer.strategy": "how processes share the work: ddp, or fsdp2, which also shards parameters (default: auto)",
    "trainer.num_nodes": "number of machines, each of which runs this command under torchrun or SLURM (default: 1)",
    "trainer.accumulate_grad_batches": "number of batches per optimiser step; ω is measured on each batch (default: 1)",
    "trainer.gradient_clip_val": "maximum norm of all gradients together (default: none)",
    "trainer.default_root_dir": "folder of the runs (default: runs)",
    "optimizer": "SGD, AdamW, ... of torch.optim, or a class path; its arguments: --optimizer.lr 1e-3 (default: SGD)",
    "lr_scheduler": "a schedule of torch.optim.lr_scheduler, or a class path, stepped after every epoch; null for none",
    "data": f"{', '.join(DATASETS)}, or the import path of a MultimodalData class",
}
#: Settings that the help of every command shows; a checkpoint or iprm fit determines most of the others.
ALWAYS = ("help", "config", "ckpt_path", "output", "steps")
#: Settings that the data and other settings determine.
LINKED = ("model.inputs", "model.num_classes", "model.classes", "model.optimizer", "model.lr_scheduler")
TITLES = {"trainer": "the run", "model": "the model", "data": "the data", "state": "states to resume from"}


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Shows the settings that most runs of `command` need. Types and defaults are added to those of model and states."""

    command = ""

    def add_argument(self, action: Action) -> None:
        setting = action.dest
        if self.command == "fit" and setting.startswith(("model.", "state.")) and setting not in LINKED:
            super().add_argument(action)
        elif setting in ALWAYS or (self.command == "fit" and setting in HELP):
            # a plain Action, because jsonargparse appends type and default to the help of its own actions
            text, metavar = HELP.get(setting, action.help), "NAME" if setting == "data" else action.metavar
            super().add_argument(
                Action(action.option_strings, setting, action.nargs, default=SUPPRESS, help=text, metavar=metavar)
            )


def help_of(command: str) -> dict[str, Any]:
    """Arguments of the parser of `command`: usage, description, examples and a formatter that keeps the help short."""
    options = f"options of a dataset, --data.batch_size and others: iprm fit --data.help {'|'.join(DATASETS)}\n\n"
    return {
        "prog": f"iprm {command}",
        "usage": f"iprm {command} --config NAME_OR_FILE [--SETTING VALUE ...]",
        "description": DESCRIPTIONS[command] if command == "fit" else f"{DESCRIPTIONS[command]}\n\n{OTHERS}",
        "epilog": f"{options if command == 'fit' else ''}examples:\n{EXAMPLES[command]}",
        "formatter_class": type("Formatter", (_Formatter,), {"command": command}),
    }


def set_titles(parser: LightningArgumentParser) -> None:
    """Replaces the titles of the groups of settings, which are class names."""
    for key, title in TITLES.items():
        (parser.groups or {})[key].title = title
