"""How batches reach a training step: in an order that depends on seed and epoch alone, shared out exactly among processes, and
continued in the middle of an epoch by a restored run."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from iprm.distributed import rank, world_size

#: Beyond this many workers a loader of decoded features no longer gets faster, and each holds some 300 MB.
MOST_WORKERS = 8


class JointBatches(DistributedSampler[Any]):
    """Indices of the rows of each batch of this process: its part of joint batches of ``batch_size`` rows a process.

    All processes walk through the same joint batches, which are those that one process with a batch as large would have, and
    each takes an equal part of every one, to within a row: nothing is repeated or padded, unlike with `DistributedSampler`,
    which this is so that Lightning leaves it in place. For a `DataLoader` with ``batch_size=None``.

    Args:
        rows: N.
        batch_size: rows a step and process.
        shuffle: a new order every epoch, drawn from seed and epoch alone; a rest of fewer than two rows a process, too few to
            normalise over, is left out of that epoch. Otherwise in order, and whole.
        seed: of the order.
        divided: among processes; else each has all rows.
    """

    def __init__(self, rows: int, batch_size: int, *, shuffle: bool = False, seed: int = 0, divided: bool = True) -> None:
        # not the parent's, which asks for the processes now: a loader may be made before there are any
        self.rows, self.batch_size, self.shuffle, self.seed, self.divided = rows, batch_size, shuffle, seed, divided
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch, and of an epoch that is continued a second time."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    @property
    def processes(self) -> int:
        """How many share in a joint batch."""
        return world_size() if self.divided else 1

    @property
    def part(self) -> int:
        """Which part of it this process takes."""
        return rank() if self.divided else 0

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.batch_size * self.processes)
        left_out = self.shuffle and whole > 0 and rest < 2 * self.processes
        return whole + (rest > 0 and not left_out)

    def __iter__(self) -> Iterator[torch.Tensor]:
        joint = self.batch_size * self.processes
        order = torch.arange(self.rows)
        if self.shuffle:
            order = torch.from_numpy(np.random.default_rng([self.seed, self.epoch]).permutation(self.rows))
        for step in range(self.start, len(self)):
            yield order[step * joint : (step + 1) * joint].tensor_split(self.processes)[self.part]


class _SeededBatches(JointBatches):
    """`JointBatches` with what seeds each: workers are told of no epoch but by what they fetch."""

    def __iter__(self) -> Iterator[Any]:
        for step, rows in enumerate(super().__iter__(), self.start):
            yield rows, (self.seed, self.epoch, step, self.part)


class _Seeded(Dataset[Any]):
    """A dataset whose batches, fetched by a worker, depend on what seeds them alone: not on how many workers there are, what
    they have fetched before, or whether the run was restored in between. In the process of the model nothing is seeded."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, fetched: tuple[torch.Tensor, Sequence[int]]) -> Any:
        rows, seeds = fetched
        if get_worker_info() is not None:
            seed_generators(seeds)
        return self.dataset[rows]


def seed_generators(seeds: Sequence[int]) -> None:
    """Seeds torch's, numpy's and Python's generators by numbers from 0 up."""
    state = np.random.SeedSequence(seeds).generate_state(4, np.uint64)
    torch.manual_seed(int(state[0]))
    random.seed(int(state[1]))
    np.random.seed(state[2:].view(np.uint32))  # noqa: NPY002 - the generator that others use


class Loader(DataLoader[Any]):
    """A `DataLoader` of `JointBatches` that knows how many it has given out, and begins there when its state was loaded.

    Workers, if there are any, live as long as the loader, with generators of random numbers that are seeded for each batch by
    seed, epoch, step and process; pages are pinned where there is a GPU to copy them to.

    Args:
        dataset: gives a batch for indices (B,).
        num_workers: processes that read ahead.
        batches: the arguments of `JointBatches`.
    """

    sampler: _SeededBatches

    def __init__(self, dataset: Dataset[Any], *, num_workers: int = 0, **batches: Any) -> None:
        self._rows = dataset
        super().__init__(
            _Seeded(dataset),
            batch_size=None,
            sampler=_SeededBatches(**batches),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=as_it_is,
            generator=torch.Generator(),  # of the workers' seeds: a loader takes nothing from the generator of the model
        )
        self._given = (0, 0)  # an epoch, and the batches of it that were given out

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, given = self.sampler.epoch, self.sampler.start
        for batch in super().__iter__():
            given += 1
            self._given = (epoch, given)
            yield batch

    def undivided(self) -> Loader:
        """A loader of the same rows in order, all of them on every process."""
        rows, batch_size, seed = self.sampler.rows, self.sampler.batch_size, self.sampler.seed
        return Loader(self._rows, num_workers=self.num_workers, rows=rows, batch_size=batch_size, seed=seed, divided=False)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the batches of it that were given out; Lightning keeps it in checkpoints."""
        epoch, given = self._given
        return {"epoch": self.sampler.epoch, "batches": given if epoch == self.sampler.epoch else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration begins after those batches."""
        self.sampler.epoch, self.sampler.start = state["epoch"], state["batches"]


def default_workers(dataset: Sized, processes: int = 1) -> int:
    """Workers of each of the processes that share this machine: none for tensors in memory, of which a batch takes
    microseconds; else one for each core of its part but one, at least one and at most MOST_WORKERS."""
    if getattr(dataset, "in_memory", False):
        return 0
    return min(MOST_WORKERS, max(1, available_cores() // processes - 1))


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_it_is(batch: Any) -> Any:
    """The dataset has made the batch already."""
    return batch
