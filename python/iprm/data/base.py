"""What every dataset is: three disjoint splits, in memory or not, served in batches of ({modality: tensor}, target)."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..processes import processes_here
from ..suggest import InputError, unknown
from .check import check_at_start
from .loading import Loader, as_it_is, default_workers

Batch = tuple[dict[str, Tensor], Tensor]
SPLITS = ("train", "val", "test")
#: Of each input of a split, the rows whose values its digest is made of: data of any size are told apart in a millisecond.
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Split(Dataset[Batch]):
    """One split, whole in memory.

    inputs: modality -> (N, ...); target: (N,) int64; origin: modality -> (N,) int64, the item of the source that each row
    was made from, by which splits can be shown to be disjoint.

    A subclass with ``in_memory = False`` makes its batches in ``__getitem__``, in workers, and may use random numbers of torch,
    numpy and Python for them. Its `inputs` are what it makes them of, such as tensors of memory-mapped files, or empty.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor
    origin: Mapping[str, Tensor]

    in_memory = True

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, rows: int | Tensor) -> Batch:
        """One row, or by indices (B,) a whole batch, by one index_select a tensor: collating 64 rows one by one costs more than
        a small model's step."""
        return {modality: x[rows] for modality, x in self.inputs.items()}, self.target[rows]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self[torch.as_tensor(indices)]

    def first(self, rows: int = 2) -> dict[str, Tensor]:
        """The inputs of the first rows, as they are in a batch, without a trace in the generators of random numbers."""
        with isolate_rng():
            return self[torch.arange(min(rows, len(self)))][0]

    @functools.cached_property
    def digest(self) -> str:
        """Of the items of the source, the labels, and of every one of `inputs` the type, the shape and the values of
        SAMPLED_ROWS rows, evenly spaced: another dataset has another, unless it differs in other rows alone. Of a split without
        `inputs` no values are read: random numbers may have changed them."""
        found = hashlib.sha256()
        for name, numbers in (*sorted(self.origin.items()), ("target", self.target)):
            found.update(f"{name} {tuple(numbers.shape)}".encode())
            found.update(numbers.numpy().astype("<i8").tobytes())
        rows = torch.from_numpy(np.linspace(0, len(self) - 1, min(len(self), SAMPLED_ROWS)).astype(np.int64))
        for modality, x in sorted(self.inputs.items()):
            found.update(f"{modality} {x.dtype} {tuple(x.shape)}".encode())
            found.update(x[rows].reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]


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

    @property
    def shapes(self) -> dict[str, list[int]]:
        """modality -> shape of one row, without the batch dimension."""
        return {modality: list(x.shape[1:]) for modality, x in self._first.items()}

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self._first)

    @functools.cached_property
    def _first(self) -> dict[str, Tensor]:
        return self.splits["train"].first()

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


def stratified(labels: np.ndarray, fractions: Mapping[str, float], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Divides rows at random so that every split has every class in the same proportion.

    Args:
        labels: (N,) integers.
        fractions: split -> its part of the rows, adding up to at most 1; "train" takes what the others leave.

    Returns:
        split -> indices of its rows, ascending; disjoint, and together all of them.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*fractions, "train")}
    edges = np.cumsum(list(fractions.values()))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(edges * len(rows)).astype(int)
        for name, part in zip(parts, np.split(rows, cuts), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(rows)) if rows else np.empty(0, int) for name, rows in parts.items()}


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Both splits, and what is left for training, have some part of the rows.

    Raises:
        InputError: otherwise.
    """
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise InputError(
            "val_fraction and test_fraction: expected positive numbers with a sum below 1, "
            f"got {val_fraction} and {test_fraction}"
        )
