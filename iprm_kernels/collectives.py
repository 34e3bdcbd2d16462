"""Sums across processes, which give losses and strengths of the joint batch, for operators and modules built on them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group


def group_name(group: ProcessGroup | None) -> str:
    """The name of the group, which operators take instead of the group itself; "" for None."""
    return "" if group is None else group.group_name


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums `values` over the processes of the group, in place.

    Args:
        values: (...) on a device that the group's backend serves.
        group: with None, `values` stays unchanged.

    Returns:
        `values`.
    """
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def joint_sums(sums: Tensor, target: Tensor, ignore_index: int, group: ProcessGroup | str) -> tuple[Tensor, Tensor]:
    """Sums over the processes of a group, and this process's share in a mean over all rows, with one all-reduce.

    Each process multiplies the mean over its n rows by its share. Averaged over the W processes, as DistributedDataParallel
    does with gradients, the products give the mean over all N rows::

        share = W n / N,    1 for equal batches

    Args:
        sums: (K,) local sums.
        target: (B,) labels; rows labelled `ignore_index` count in no mean.
        group: the process group, or its name.

    Returns:
        (K,) sums over the processes, and () the share.
    """
    if isinstance(group, str):
        group = _resolve_process_group(group)  # type: ignore[arg-type]
    counted = (target != ignore_index).sum().to(sums.dtype)
    joint = all_reduce_sum(torch.cat([sums, counted[None]]), group)
    return joint[:-1], group.size() * counted / joint[-1]


def weighted(mean: Tensor, share: Tensor) -> Tensor:
    """``mean * share``, and zero where the share is zero: the mean over no rows is NaN.  (...), () -> (...)"""
    return torch.where(share == 0, 0, mean * share)
