"""The command `iprm profile`: a short run of `iprm fit` under a clock, a table, a picture and JSON."""

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
from rich import box
from rich.console import Console
from rich.table import Table

from iprm.compare.table import ABSENT
from iprm.data.loading import available_cores
from iprm.environment import chosen_backends, versions
from iprm.profile.figures import plot
from iprm.profile.profiler import Instrument
from iprm.profile.result import Profile, Spread
from iprm.training.callbacks.run_state import RunState

from .fusion_cli import FusionCLI, as_list, run
from .parser import at_least_one

#: Trainer arguments that do not apply to a profile: it records no run, and ends when its steps are measured.
TRAINER = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "fast_dev_run": False,
    "num_sanity_val_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "max_time": None,
    "min_epochs": None,
    "min_steps": None,
    "val_check_interval": 1.0,
    "check_val_every_n_epoch": 1,
}


def profile_command(arguments: Sequence[str]) -> int:
    """Runs `iprm profile` and returns the exit code."""
    return run(ProfileCLI, arguments)


class ProfileCLI(FusionCLI):
    """`iprm profile`: the training of `iprm fit`, measured for some steps; writes profile.json and profile.png."""

    command = "profile"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=at_least_one, default=50, metavar="N", help="steps to measure (default: 50)")
        parser.add_argument("--output", type=str, default=None, metavar="FOLDER", help="default: runs/profile-<time>")

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model.check_training(self.datamodule.batch_size)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        self.instrument = Instrument(self.config.steps)
        given = as_list(self.config_init.trainer.callbacks)
        callbacks = [callback for callback in given if not isinstance(callback, (Checkpoint, EarlyStopping, RunState))]
        return super().instantiate_trainer(profiler=self.instrument, callbacks=callbacks, **TRAINER, **kwargs)

    def execute(self) -> None:
        folder = Path(self.config.output or f"runs/profile-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        if self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)  # fail before the work rather than after it
        self.instrument.attach(self.trainer, self.model)
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)
        profile = self.instrument.result()
        if self.trainer.is_global_zero:
            self._write(folder, profile)

    def _write(self, folder: Path, profile: Profile) -> None:
        settings = yaml.safe_load(self.parser.dump(self.config))
        content = record(profile) | {"settings": settings, "versions": versions(), "machine": machine(self.model.device)}
        (folder / "profile.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        title = f"{type(self.datamodule).__name__}, {self.model.hparams['method']}: {profile.rows} rows a step"
        plot(folder / "profile.png", profile, title)
        console = Console()
        console.print(rich_table(profile, title))
        for line in remarks(profile):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(f"profile: {folder}", highlight=False, soft_wrap=True)


def record(profile: Profile) -> dict[str, Any]:
    """The figures as plain values, in seconds."""
    derived = {name: getattr(profile, name) for name in ("steps_of_epoch", "epoch")}
    return asdict(profile) | derived


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    found = {"platform": platform.platform(), "processor": _processor(), "cores": available_cores()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return found | {"threads": torch.get_num_threads(), "device": name, "backends": chosen_backends()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def rich_table(profile: Profile, title: str) -> Table:
    """A row a stage, then the whole step."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    for name in ("ms a step", "20 - 80 %", "share", "s/epoch"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in profile.stages:
        table.add_row(stage.name, *_milliseconds(stage.step), f"{stage.share:.1%}", _seconds(stage.epoch))
    table.add_section()
    table.add_row("step", *_milliseconds(profile.step), "100.0%", _seconds(profile.steps_of_epoch), style="bold")
    return table


def _milliseconds(spread: Spread) -> tuple[str, str]:
    median, low, high = (1000 * value for value in (spread.median, spread.low, spread.high))
    return f"{median:.3f}", f"{low:.3f} - {high:.3f}"


def _seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def remarks(profile: Profile) -> list[str]:
    """What the table does not say: the rest of an epoch, what measuring costs, and how far the figures go."""
    batches = ABSENT if profile.epoch_batches is None else profile.epoch_batches
    parts = f"{batches} batches {_seconds(profile.steps_of_epoch)}, validation {_seconds(profile.validation)}"
    lines = [f"an epoch, s: {_seconds(profile.epoch)} = {parts}, between epochs {_seconds(profile.between)}"]
    cost, low, high = (1000 * value for value in (profile.cost.median, profile.cost.low, profile.cost.high))
    unmeasured = f"a step that is not measured takes {1000 * profile.unmeasured.median:.3f} ms"
    lines.append(f"measuring adds {cost:+.3f} ms a step (90 % interval {low:+.3f} to {high:+.3f}); {unmeasured}")
    if profile.batches != 1:
        lines.append(f"a step adds the gradients of {profile.batches:g} batches")
    if profile.synchronised:
        lines.append("every stage was waited for, so that none overlaps the next, as they do in a run that is not measured")
    return lines
