"""Process group, rank and world size, also for runs with a single process."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def process_group() -> dist.ProcessGroup | None:
    """The group of all processes of a distributed run; None in a single-process run."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if process_group() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if process_group() else 1


def processes_here(trainer: Any = None) -> int:
    """The number of processes of a run on this machine: one per local device of the trainer, or as started by torchrun."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), getattr(trainer, "num_devices", 1))


def gathered(value: Any) -> list[Any]:
    """Gathers the `value` of every process on every process, ordered by rank."""
    if process_group() is None:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
