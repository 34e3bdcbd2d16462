"""Splits of a dataset, and stratified division of rows into splits."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset

from iprm.encoders.description import Input, each, flat
from iprm.errors import InputError

Batch = tuple[dict[str, Input], Tensor]
SPLITS = ("train", "val", "test")
#: Rows of each input that enter the digest of a split, which therefore takes a millisecond for data of any size.
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Split(Dataset[Batch]):
    """One split, completely in memory.

    inputs: modality -> (N, ...), or name -> (N, ...) for a modality of several tensors, such as token ids and their mask;
    target: (N,) int64; origin: modality -> (N,) int64, the item of the source that each row was made from, so that splits can
    be checked to be disjoint.

    A subclass with ``in_memory = False`` produces batches in ``__getitem__``, in workers, and may use the random numbers of
    torch, numpy and Python. Its `inputs` hold the source of the batches, such as memory-mapped tensors, or are empty.
    """

    inputs: Mapping[str, Input]
    target: Tensor
    origin: Mapping[str, Tensor]

    in_memory = True

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, rows: int | Tensor) -> Batch:
        """One row, or for indices (B,) a batch, with one indexing operation per tensor: collating 64 single rows takes
        longer than a small model's step."""
        return {modality: each(lambda tensor: tensor[rows], x) for modality, x in self.inputs.items()}, self.target[rows]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self[torch.as_tensor(indices)]

    def first(self, rows: int = 2) -> dict[str, Input]:
        """The inputs of the first rows, as in a batch. The states of random number generators are preserved."""
        with isolate_rng():
            return self[torch.arange(min(rows, len(self)))][0]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, shortened to 16 digits, of source items, labels, and dtype, shape and SAMPLED_ROWS evenly spaced rows of
        each of `inputs`. Changes in other rows are not detected. For a split without `inputs` no values enter the digest, as
        they may be random."""
        found = hashlib.sha256()
        for name, numbers in (*sorted(self.origin.items()), ("target", self.target)):
            found.update(f"{name} {tuple(numbers.shape)}".encode())
            found.update(numbers.numpy().astype("<i8").tobytes())
        rows = torch.from_numpy(np.linspace(0, len(self) - 1, min(len(self), SAMPLED_ROWS)).astype(np.int64))
        for label, x in sorted(flat(self.inputs).items()):
            found.update(f"{label} {x.dtype} {tuple(x.shape)}".encode())
            found.update(x[rows].reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]


def stratified(labels: np.ndarray, fractions: Mapping[str, float], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Divides rows at random so that every split has every class in the same proportion.

    Args:
        labels: (N,) integers.
        fractions: split -> fraction of the rows, with a sum of at most 1; "train" gets the remaining rows.

    Returns:
        split -> ascending indices of its rows. Splits are disjoint and cover all rows.
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
    """Checks that validation, test and training split each get a positive fraction of the rows.

    Raises:
        InputError: they do not.
    """
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise InputError(
            "val_fraction and test_fraction: expected positive numbers with a sum below 1, "
            f"got {val_fraction} and {test_fraction}"
        )
