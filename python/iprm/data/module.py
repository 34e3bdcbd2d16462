"""A dataset: three disjoint splits, in memory or not, served in batches of ({modality: tensor or dict of tensors}, target)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from iprm.distributed import processes_here
from iprm.encoders.description import Description, described
from iprm.errors import InputError, unknown

from .loading import Loader, as_it_is, default_workers
from .quality import check_at_start
from .split import SPLITS, Batch, Split


class MultimodalData(L.LightningDataModule, ABC):
    """A dataset in three splits. A subclass says how it is read, in `read`; everything else follows from the tensors."""

    def __init__(
        self, *, batch_size: int = 64, seed: int = 0, predict_split: str = "test", num_workers: int | None = None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size: expected at least 1, got {batch_size}")
        if seed < 0:
            raise InputError(f"seed: expected a number from 0 up, got {seed}")
        if predict_split not in SPLITS:
            raise InputError(unknown("split", predict_split, SPLITS))
        if num_workers is not None and num_workers < 0:
            raise InputError(f"num_workers: expected a number from 0 up, got {num_workers}")
        self.batch_size, self.seed, self.predict_split, self.num_workers = batch_size, seed, predict_split, num_workers

    @abstractmethod
    def read(self) -> dict[str, Split]:
        """The splits "train", "val" and "test", determined by the options and the seed alone."""

    def inspect(self, faults: list[str]) -> dict[str, Split]:
        """What `iprm check` looks at: as `read`, but a dataset that refuses a value or a single file tells it in `faults`, or
        leaves it in the tensors for the check to find, and reads on."""
        return self.read()

    @property
    def source(self) -> str:
        """What messages call it: its class, and its `path` where it has one."""
        path = getattr(self, "path", None)
        return type(self).__name__ + ("" if path is None else f" {path}")

    @functools.cached_property
    def splits(self) -> dict[str, Split]:
        """What `read` returned, read on first use.

        Raises:
            InputError: `check_at_start` sees that nothing can be trained or evaluated on it.
        """
        splits = self.read()
        check_at_start(self.source, splits)
        return splits

    def setup(self, stage: str) -> None:
        _ = self.splits

    @functools.cached_property
    def inputs(self) -> dict[str, Description]:
        """modality -> shape, without the batch dimension, and type of its tensor, or of each of its tensors by name."""
        return described(self.splits["train"].first())

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @property
    def num_classes(self) -> int:
        return 1 + max(int(split.target.max()) for split in self.splits.values())

    def describe(self) -> dict[str, Any]:
        """Sizes and digests of the splits: what a report keeps to be checked against, and a run that goes on has to find."""
        return {name: {"rows": len(split), "digest": split.digest} for name, split in self.splits.items()}

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test")

    def rule_dataloader(self, epoch: int) -> DataLoader[Batch]:
        """The training split in an order of its own, for what a method computes between epochs; it leaves no trace in the
        generators of random numbers or in the loop's own loader."""
        split = self.splits["train"]
        loader = Loader(split, rows=len(split), batch_size=self.batch_size, shuffle=True, seed=self.seed + 2**31)
        loader.sampler.set_epoch(epoch)
        return loader

    def predict_dataloader(self) -> DataLoader[Batch]:
        # Lightning makes it anew, to keep count of rows
        return self._plain_loader(self.predict_split, self._workers(self.splits[self.predict_split]))

    def _plain_loader(self, name: str, num_workers: int = 0) -> DataLoader[Batch]:
        return DataLoader(self.splits[name], batch_size=self.batch_size, collate_fn=as_it_is, num_workers=num_workers)

    def _loader(self, name: str, *, shuffle: bool = False) -> DataLoader[Batch]:
        if getattr(self.trainer, "overfit_batches", 0):
            return self._plain_loader(name)  # the same batches in every epoch, of a loader that Lightning knows to be in order
        split = self.splits[name]
        batches = {"rows": len(split), "batch_size": self.batch_size, "shuffle": shuffle, "seed": self.seed}
        return Loader(split, num_workers=self._workers(split), **batches)

    def _workers(self, split: Split) -> int:
        return default_workers(split, processes_here(self.trainer)) if self.num_workers is None else self.num_workers
