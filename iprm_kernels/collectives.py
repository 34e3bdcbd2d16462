"""Sums across processes, by the group's name: operators take no process group as an argument."""

from __future__ import annotations

import weakref

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_groups: weakref.WeakValueDictionary[str, ProcessGroup] = weakref.WeakValueDictionary()


def group_name(group: ProcessGroup | None) -> str:
    """The name under which `all_reduce_named` finds the group again; "" for no group."""
    if group is None:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """`values` added over the group, in place; as they are without one."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def all_reduce_named(values: Tensor, name: str) -> Tensor:
    """`all_reduce_sum` over the group of that name, "" being none."""
    return all_reduce_sum(values, _groups[name] if name else None)
