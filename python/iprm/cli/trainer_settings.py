"""Checks of Trainer settings that Lightning accepts and then fails at, or answers without their name."""

from __future__ import annotations

import math
import os
from typing import Any

import lightning as L
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment

from iprm.data.loading import available_cores
from iprm.errors import InputError

#: Whole numbers, and the smallest that means anything.
SMALLEST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
#: Number of processes on a CPU that is accepted on every machine, even with fewer cores.
FEW_PROCESSES = 8


def check_trainer_settings(config: Any) -> None:
    """Raises InputError, naming the setting, if a number of the parsed settings is out of range."""
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise InputError(f"seed_everything: expected a number from 0 to {2**32 - 1}, got {seed}")
    for name, smallest in SMALLEST.items():
        value = config.trainer[name]
        if isinstance(value, int) and value < smallest:
            raise InputError(f"trainer.{name}: expected a whole number from {smallest} up, got {value}")
    clip = config.trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < math.inf:
        raise InputError(f"trainer.gradient_clip_val: expected a number from 0 up, got {clip}")
    if "spawn" in str(config.trainer.strategy):
        raise InputError(
            f"trainer.strategy: expected ddp or fsdp2, whose processes run the command, got {config.trainer.strategy}"
        )
    interval = config.trainer.val_check_interval
    if isinstance(interval, (int, float)) and not interval > 0:
        raise InputError(f"trainer.val_check_interval: expected a number above 0, got {interval}")


def check_processes(trainer: L.Trainer) -> None:
    """Raises InputError if more processes would start on a CPU than it has cores, and more than `FEW_PROCESSES`; or if the run
    would wait for other machines that no launcher starts."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"trainer.num_nodes: {trainer.num_nodes} machines need torchrun or SLURM, which start a process on each"
        )
    most = max(available_cores(), FEW_PROCESSES)
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > most:
        raise InputError(f"trainer.devices: expected at most {most} processes on this CPU, got {trainer.num_devices}")
