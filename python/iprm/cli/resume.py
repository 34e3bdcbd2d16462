"""The command `iprm resume`: continues a run in its own folder, after a kill or stop, or for more epochs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iprm.compare.runs import CONFIG, DISPLAY, read_run
from iprm.errors import InputError, counted
from iprm.files import check_received
from iprm.locks import locked
from iprm.training.checkpoint import state_to_resume
from iprm.training.lightning import first_process

from .fit import FitCLI
from .fusion_cli import run
from .parser import Parser

DESCRIPTION = """\
Continues a run of iprm fit from its last saved state: after a crash, a kill, a scheduler's SIGTERM, or an interrupt. The
final weights, metrics and checkpoints equal those of an uninterrupted run. States are saved at the beginning of every
epoch, and within an epoch at the interval given to iprm fit (--state.every_n_batches N).

RUN/config.yaml names classes, which are imported: read it before you resume a run that others have handed you.

These settings of iprm fit may be changed: the length of the run (--trainer.max_epochs, max_steps, max_time, min_epochs,
min_steps); devices (--trainer.accelerator, devices, num_nodes, strategy); callbacks, loggers, profiler and display; the
interval of states (--state); where and how the data is read (--data.path, --data.num_workers); and how the model is executed
(--model.compile, channels_last, cuda_graph). All others are those of the run, for example those of optimiser and schedule.
"""

EXAMPLES = """\
examples:
  iprm resume runs/digits/fit/version_0
  iprm resume runs/digits/fit/version_0 --previous                     if the last state is damaged
  iprm resume runs/digits/fit/version_0 --trainer.max_epochs 40        train for more epochs
"""

#: Settings that may be changed, with those below them. The saved state decides which data may be read.
CHANGEABLE = (
    *("config", "ckpt_path", "data", "state", *DISPLAY),
    *(f"trainer.{name}" for name in ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")),
    *(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy", "callbacks", "logger", "profiler")),
    *(f"trainer.{name}" for name in ("enable_checkpointing", "deterministic", "benchmark", "detect_anomaly")),
    *("model.compile", "model.channels_last", "model.cuda_graph"),
    *("model.optimizer", "model.lr_scheduler"),  # copies of optimizer and lr_scheduler
)
#: Values with which Lightning would write no states or no metrics.
WITHOUT_RECORD = {"enable_checkpointing": False, "logger": False, "fast_dev_run": True}


def parser() -> Parser:
    """The arguments of `iprm resume`, without settings of `iprm fit`."""
    p = Parser(
        "iprm resume", usage="iprm resume RUN [--previous] [--SETTING VALUE ...]", description=DESCRIPTION, epilog=EXAMPLES
    )
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of the run, printed by iprm fit")
    p.add_argument("--previous", action="store_true", help="resume from the state before the last")
    return p


def resume_command(arguments: Sequence[str]) -> int:
    """Runs `iprm resume` and returns the exit code."""
    flags = [argument for argument in arguments if argument in ("-h", "--help", "--previous")]
    run_and_settings = [argument for argument in arguments if argument not in flags]
    given = parser().parse_args([*flags, *run_and_settings[:1]])
    with locked(given.run, "run") if first_process() else contextlib.nullcontext():  # or another could replace the state
        state = state_to_resume(given.run, given.previous)
        if first_process():
            check_received(given.run)
        if len(run_and_settings) == 1 and not given.previous and (epochs := _ended_after(given.run)):
            more = f"--trainer.max_epochs {2 * epochs}"
            print(f"{given.run}: this run has ended after {counted(epochs, 'epoch')}; for more: {more}")
            return 0
        settings = ["--config", str(given.run / CONFIG), "--ckpt_path", str(state), *run_and_settings[1:]]
        return run(ResumeCLI, settings, folder=given.run)


def _ended_after(folder: Path) -> int:
    """The number of epochs of a run that has been trained for all of them and has written its diagnostics; 0 for any other."""
    found = read_run(folder)
    epochs = max(found.courses.get("train_loss", ()), default=-1) + 1
    return epochs if found.record and found.max_epochs and epochs >= found.max_epochs else 0


class ResumeCLI(FitCLI):
    """`iprm fit` in the folder of an earlier run, with the settings of that run except for `CHANGEABLE`."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        assert self.folder is not None
        for name, value in WITHOUT_RECORD.items():
            if self.config.trainer[name] is value:
                raise InputError(f"trainer.{name}: a run cannot be resumed with {value}, without its states and metrics")
        there = dict(parser.parse_args(["--config", str(self.folder / CONFIG)]).items())
        here = dict(self.config.items())
        for name in dict.fromkeys((*here, *there)):
            changeable = any(f"{name}.".startswith(f"{setting}.") for setting in CHANGEABLE)
            if not changeable and here.get(name) != there.get(name):
                given = name.replace(".init_args", "").removesuffix(".class_path")
                what = f"this run has {there.get(name)!r}, and cannot be resumed with {here.get(name)!r}"
                raise InputError(f"{given}: {what}; iprm resume --help lists the settings that may be changed")
