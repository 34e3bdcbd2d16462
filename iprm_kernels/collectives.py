"""Sums across processes, by the group's name: operators take no process group as an argument."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group


def group_name(group: ProcessGroup | None) -> str:
    """The name that an operator takes for the group; "" for none."""
    return "" if group is None else group.group_name


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """`values` added over the group, in place; as they are without one."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def all_reduce_named(values: Tensor, name: str) -> Tensor:
    """`all_reduce_sum` over the group of that name, "" being none."""
    return all_reduce_sum(values, _resolve_process_group(name) if name else None)  # type: ignore[arg-type]
