"""The command `iprm profile`."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser

from iprm.compare.table import Table
from iprm.environment import chosen_backends, device_name, versions
from iprm.files import check_outputs, created, write_atomically
from iprm.profile.figures import plot
from iprm.profile.profiler import Profile, StageProfiler
from iprm.streams import say
from iprm.training.callbacks.run_state import RunState
from iprm.training.lightning import first_process

from .console import print_table
from .fusion_cli import FusionCLI, as_list, run
from .parser import at_least_one

ABSENT = "-"
#: Trainer arguments that do not apply to a profile, which records no run and ends when its batches are measured.
TRAINER = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "fast_dev_run"), False),
    **dict.fromkeys(("max_time", "min_epochs", "min_steps"), None),
    "max_epochs": -1,
    "max_steps": -1,
    "num_sanity_val_steps": 0,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
}


def profile_command(arguments: Sequence[str]) -> int:
    """Runs `iprm profile` and returns the exit code."""
    return run(ProfileCLI, arguments)


class ProfileCLI(FusionCLI):
    """`iprm profile`: the training of `iprm fit`, measured for some batches; writes profile.json and profile.png."""

    command = "profile"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=at_least_one, default=50, metavar="N", help="batches to measure (default: 50)")
        parser.add_argument("--output", type=str, default=None, metavar="FOLDER", help="default: runs/profile-<time>")

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model.check_training(self.datamodule.batch_size)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        self.profiler = StageProfiler(self.config.steps)
        given = as_list(self.config_init.trainer.callbacks)
        callbacks = [callback for callback in given if not isinstance(callback, (Checkpoint, EarlyStopping, RunState))]
        return super().instantiate_trainer(profiler=self.profiler, callbacks=callbacks, **TRAINER, **kwargs)

    def execute(self) -> None:
        if not first_process():
            self._profile()
            return
        folder = Path(self.config.output or f"runs/profile-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        if self.config.output is not None:
            check_outputs(folder, "profile.json", '{\n  "stages": {', "profile.png")
        with created(folder, anew=self.config.output is None) as folder:  # before the work rather than after it
            self._write(folder, self._profile())

    def _profile(self) -> Profile:
        with self.profiler.attached(self.trainer, self.model):
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)
        return self.profiler.result()

    def _write(self, folder: Path, profile: Profile) -> None:
        content = {
            **asdict(profile),
            "seconds": profile.seconds,
            "epoch": profile.epoch,
            "settings": yaml.safe_load(self.parser.dump(self.config)),
            "versions": versions(),
            "platform": platform.platform(),
            "device": device_name(self.trainer.strategy.root_device),
            "threads": torch.get_num_threads(),
            "backends": chosen_backends(),
        }
        write_atomically(folder / "profile.json", json.dumps(content, indent=2) + "\n")
        title = f"{type(self.datamodule).__name__}, {self.model.hparams['method']}: {profile.rows} rows per batch"
        plot(folder / "profile.png", profile, title)
        print_table(stage_table(profile, title), ruled=[len(profile.stages) - 1])
        say(f"an epoch takes {_seconds(profile.epoch)} s, of which validation {_seconds(profile.validation)} s")
        if profile.synchronised:
            say("stages do not overlap here, because each waits for the GPU; in an ordinary run, stages overlap")
        say(f"profile: {folder}")


def stage_table(profile: Profile, title: str) -> Table:
    """One row per stage, then the whole batch."""
    count = profile.epoch_batches
    rows = [
        [name, f"{1000 * seconds:.3f}", f"{seconds / profile.seconds:.1%}", _seconds(count and count * seconds)]
        for name, seconds in {**profile.stages, "batch": profile.seconds}.items()
    ]
    return Table(title, ["stage", "ms per batch", "share", "s per epoch"], rows, frozenset({len(rows) - 1}))


def _seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"
