"""Base class of datasets: three disjoint splits, in batches of ({modality: tensor or dict of tensors}, target)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from iprm.distributed import processes_here
from iprm.encoders.description import Description, described
from iprm.errors import InputError, check_whole, unknown

from .labels import with_classes
from .loading import Loader, as_it_is, default_workers
from .quality import check_at_start
from .split import SPLITS, Batch, Split


class MultimodalData(L.LightningDataModule, ABC):
    """A dataset in three splits. A subclass implements `read`; everything else is derived from the tensors."""

    def __init__(
        self, *, batch_size: int = 64, seed: int = 0, predict_split: str = "test", num_workers: int | None = None
    ) -> None:
        super().__init__()
        self.batch_size, self.seed = check_whole("batch_size", batch_size, 1), check_whole("seed", seed)
        if predict_split not in SPLITS:
            raise InputError(unknown("split", predict_split, SPLITS))
        self.predict_split = predict_split
        self.num_workers = None if num_workers is None else check_whole("num_workers", num_workers)
        #: names of the classes of a trained model, which targets shall index; None: the classes that occur. Set it before use.
        self.known_classes: Sequence[str] | None = None

    @abstractmethod
    def read(self) -> dict[str, Split]:
        """The splits "train", "val" and "test", determined by the options and the seed alone."""

    def inspect(self, faults: list[str]) -> dict[str, Split]:
        """Like `read`, for `iprm check`: instead of raising an error for an invalid value or file, appends it to `faults` or
        leaves it in the tensors for the check to find."""
        return self.read()

    @property
    def source(self) -> str:
        """Name of the dataset in messages: its class, and its `path` if it has one."""
        path = getattr(self, "path", None)
        return type(self).__name__ + ("" if path is None else f" {path}")

    @functools.cached_property
    def splits(self) -> dict[str, Split]:
        """What `read` returned, with class indices as targets and with the names of the classes; read on first use.

        Raises:
            InputError: a target is no label: see `with_classes`; or the splits cannot be trained or evaluated on: see
                `check_at_start`.
        """
        splits = with_classes(self.source, self.read(), self.known_classes)
        check_at_start(self.source, splits, trained=self.known_classes is not None)
        return splits

    def setup(self, stage: str) -> None:
        _ = self.splits

    @functools.cached_property
    def inputs(self) -> dict[str, Description]:
        """modality -> shape, without the batch dimension, and dtype of its tensor; or name -> the same, for a dict."""
        return described(self.splits["train"].first())

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their indices."""
        return self.splits["train"].classes or ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def describe(self) -> dict[str, Any]:
        """Sizes and digests of the splits, which reports and resumed runs compare with the data they find."""
        return {name: {"rows": len(split), "digest": split.digest} for name, split in self.splits.items()}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As in Lightning, except that a CPU batch is returned unchanged: Lightning would traverse it for nothing."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test")

    def rule_dataloader(self, epoch: int) -> DataLoader[Batch]:
        """A separate loader of the training split, in its own order, for `Rule.start_epoch`. It does not affect the random
        number generators or the training loop's loader."""
        split = self.splits["train"]
        loader = Loader(split, rows=len(split), batch_size=self.batch_size, shuffle=True, seed=self.seed + 2**31)
        loader.sampler.set_epoch(epoch)
        return loader

    def predict_dataloader(self) -> DataLoader[Batch]:
        # Lightning re-creates this loader to track row indices, so it must be a plain one
        return self._plain_loader(self.predict_split, self._workers(self.splits[self.predict_split]))

    def _plain_loader(self, name: str, num_workers: int = 0) -> DataLoader[Batch]:
        return DataLoader(self.splits[name], batch_size=self.batch_size, collate_fn=as_it_is, num_workers=num_workers)

    def _loader(self, name: str, *, shuffle: bool = False) -> DataLoader[Batch]:
        if getattr(self.trainer, "overfit_batches", 0):
            # the same batches in every epoch, from a loader that Lightning recognises as sequential
            return self._plain_loader(name)
        split = self.splits[name]
        batches = {"rows": len(split), "batch_size": self.batch_size, "shuffle": shuffle, "seed": self.seed}
        return Loader(split, num_workers=self._workers(split), **batches)

    def _workers(self, split: Split) -> int:
        return default_workers(split, processes_here(self.trainer)) if self.num_workers is None else self.num_workers
