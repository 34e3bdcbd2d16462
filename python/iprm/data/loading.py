"""Data loading: the order of rows depends on seed and epoch alone, joint batches are divided evenly among processes, and a
restored run resumes in the middle of an epoch."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from iprm.distributed import rank, world_size
from iprm.errors import check_whole

#: With more workers a loader of decoded features no longer gets faster, and each worker uses some 300 MB.
MOST_WORKERS = 8


class JointBatches(DistributedSampler[Any]):
    """Sampler of batch indices: this process's part of joint batches of ``batch_size`` rows per process.

    All processes iterate over the same joint batches, those of a single process with a batch of the joint size. Each process
    takes an equal part of every joint batch, to within one row; rows are neither repeated nor padded. Subclasses
    `DistributedSampler` only so that Lightning does not replace it. For a `DataLoader` with ``batch_size=None``.

    Args:
        rows: N.
        batch_size: rows per step and process.
        shuffle: draw a new order every epoch, from seed and epoch alone. A last batch of fewer than two rows per process, too
            few for batch normalisation, is left out. Without shuffling, rows are in order and complete.
        seed: seed of the order.
    """

    def __init__(self, rows: int, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> None:
        # without super().__init__(), which needs an initialised process group: a loader may be made before
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch, and again for an epoch that is resumed."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.batch_size * world_size())
        left_out = self.shuffle and whole > 0 and rest < 2 * world_size()
        return whole + (rest > 0 and not left_out)

    def __iter__(self) -> Iterator[torch.Tensor]:
        joint = self.batch_size * world_size()
        order = torch.arange(self.rows)
        if self.shuffle:
            order = torch.from_numpy(np.random.default_rng([self.seed, self.epoch]).permutation(self.rows))
        for step in range(self.start, len(self)):
            yield order[step * joint : (step + 1) * joint].tensor_split(world_size())[rank()]


class _SeededBatches(JointBatches):
    """`JointBatches` that yields (rows, seeds): workers learn the epoch only from the items they fetch."""

    def __iter__(self) -> Iterator[Any]:
        for step, rows in enumerate(super().__iter__(), self.start):
            yield rows, (self.seed, self.epoch, step, rank())


class _Seeded(Dataset[Any]):
    """Seeds a worker's generators for each batch, so that random augmentation does not depend on the number of workers, on
    earlier batches, or on whether the run was resumed. Nothing is seeded in the main process."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, fetched: tuple[torch.Tensor, Sequence[int]]) -> Any:
        rows, seeds = fetched
        if get_worker_info() is not None:
            seed_generators(seeds)
        return self.dataset[rows]


def seed_generators(seeds: Sequence[int]) -> None:
    """Seeds torch's, numpy's and Python's generators from non-negative integers."""
    state = np.random.SeedSequence(seeds).generate_state(4, np.uint64)
    torch.manual_seed(int(state[0]))
    random.seed(int(state[1]))
    np.random.seed(state[2:].view(np.uint32))  # noqa: NPY002 - the global generator, which other libraries use


class Loader(DataLoader[Any]):
    """A `DataLoader` over `JointBatches` with a resumable position within the epoch.

    Workers persist across epochs; their random number generators are seeded for each batch from seed, epoch, step and process.
    Memory is pinned if a GPU is available.

    Args:
        dataset: returns a batch for indices (B,).
        num_workers: processes that prefetch batches.
        batches: arguments of `JointBatches`.
    """

    dataset: _Seeded
    sampler: _SeededBatches

    def __init__(self, dataset: Dataset[Any], *, num_workers: int = 0, **batches: Any) -> None:
        super().__init__(
            _Seeded(dataset),
            batch_size=None,
            sampler=_SeededBatches(**batches),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=as_it_is,
            generator=torch.Generator(),  # for worker seeds, so that the loader does not draw from the global generator
        )
        self._given = (0, 0)  # epoch, and batches yielded in it

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, given = self.sampler.epoch, self.sampler.start
        for batch in super().__iter__():
            given += 1
            self._given = (epoch, given)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of batches yielded in it; Lightning saves this in checkpoints."""
        epoch, given = self._given
        return {"epoch": self.sampler.epoch, "batches": given if epoch == self.sampler.epoch else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration start after the batches already yielded."""
        self.sampler.epoch, self.sampler.start = (check_whole(name, state[name]) for name in ("epoch", "batches"))


def default_workers(dataset: Sized, processes: int = 1) -> int:
    """Default number of workers for each of the `processes` that share this machine: 0 for data in memory, where a batch takes
    microseconds; otherwise the process's share of the cores less one, at least 1 and at most MOST_WORKERS."""
    if getattr(dataset, "in_memory", False):
        return 0
    return min(MOST_WORKERS, max(1, available_cores() // processes - 1))


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_it_is(batch: Any) -> Any:
    """Identity collate function: the dataset already returns batches."""
    return batch
