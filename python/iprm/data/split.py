"""Splits of a dataset, and stratified division of rows into splits."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset

from iprm.encoders.description import Input, each, flat
from iprm.errors import InputError, plain_number

from .apportion import apportioned, largest_remainder

Batch = tuple[dict[str, Input], Tensor]
SPLITS = ("train", "val", "test")
#: Rows of each input that enter the digest of a split, which therefore takes a millisecond for data of any size.
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Split(Dataset[Batch]):
    """One split, completely in memory.

    inputs: modality -> (N, ...), or name -> (N, ...) for a modality of several tensors, such as token ids and their mask;
    target: (N,) labels: numbers, of which those that occur in any split are the classes, or -100 for a row without a label;
    origin: modality -> (N,) int64, the item of the source that each row was made from, so that splits can be checked to be
    disjoint; classes: names of the classes, which `target` then indexes. `MultimodalData.splits` has class indices (N,) int64
    as targets, and names, in any case.

    A subclass with ``in_memory = False`` produces batches in ``__getitem__``, in workers, and may use the random numbers of
    torch, numpy and Python. Its `inputs` hold the source of the batches, such as memory-mapped tensors, or are empty.
    """

    inputs: Mapping[str, Input]
    target: Tensor
    origin: Mapping[str, Tensor]
    classes: tuple[str, ...] | None = field(default=None, kw_only=True)

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
        """SHA-256, shortened to 16 digits, of source items, labels, names of classes that are not just their indices, and
        dtype, shape and SAMPLED_ROWS evenly spaced rows of each of `inputs`. Changes in other rows are not detected. For a
        split without `inputs` no values enter the digest, as they may be random."""
        found = hashlib.sha256()
        for name, numbers in (*sorted(self.origin.items()), ("target", self.target)):
            found.update(f"{name} {tuple(numbers.shape)}".encode())
            found.update(numbers.numpy().astype("<i8").tobytes())
        if self.classes is not None and self.classes != numbered(len(self.classes)):
            found.update("\0".join(self.classes).encode("utf-8", "surrogatepass"))
        rows = torch.from_numpy(np.linspace(0, len(self) - 1, min(len(self), SAMPLED_ROWS)).astype(np.int64))
        for label, x in sorted(flat(self.inputs).items()):
            found.update(f"{label} {x.dtype} {tuple(x.shape)}".encode())
            found.update(x[rows].reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]


def numbered(classes: int) -> tuple[str, ...]:
    """The names of classes that have none: their indices."""
    return tuple(map(str, range(classes)))


def stratified(labels: np.ndarray, fractions: Mapping[str, float], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Divides rows at random: splits have their fractions of all rows, and of every class as nearly as whole rows allow.

    The number of rows of each split is its fraction of all rows, rounded by largest remainders. Of every class each split then
    has the same proportion, rounded up or down. Every class has at least one row in "train"; where that leaves less of a small
    class for the other splits, the other classes make up for it.

    Args:
        labels: (N,) integers.
        fractions: split -> fraction of the rows, with a sum of at most 1; "train" gets the remaining rows.
        rng: the source of randomness; the same state gives the same splits.

    Returns:
        split -> ascending indices of its rows. Splits are disjoint and cover all rows.

    Raises:
        InputError: with one row of every class in "train", too few are left for the other splits.
    """
    classes, rows = np.unique(labels, return_counts=True)
    *held, _ = largest_remainder(len(labels), [*fractions.values(), 1 - sum(fractions.values())])
    if sum(held) > len(labels) - len(classes):
        few = f"{int((rows == 1).sum())} of them with one row"
        raise InputError(
            f"{' and '.join(fractions)} need {sum(held)} of {len(labels)} rows, and train at least one row of each of "
            f"{len(classes)} classes, {few}: give more rows per class, leave out classes with one row, lower val_fraction and "
            "test_fraction, or divide the rows yourself, in a file of features by an array 'split'"
        )
    by_class, starts = np.argsort(labels, kind="stable"), np.cumsum(rows) - rows
    for start, count in zip(starts.tolist(), rows.tolist(), strict=True):
        rng.shuffle(by_class[start : start + count])
    # of every class, first the rows of the first held-out split, then those of the next, then those of "train"
    counts = apportioned(rows, held, rng) if len(labels) else np.zeros((0, len(held)), int)
    lengths = np.column_stack([counts, rows - counts.sum(1)]).reshape(-1)
    split = np.empty(len(labels), np.int8)
    split[by_class] = np.repeat(np.resize(np.arange(len(held) + 1, dtype=np.int8), len(lengths)), lengths)
    return {name: np.flatnonzero(split == place) for place, name in enumerate((*fractions, "train"))}


def check_fractions(val_fraction: Any, test_fraction: Any) -> tuple[float, float]:
    """Returns the fractions of the validation and the test split, after checking that each split, "train" included, gets a
    positive fraction of the rows.

    Raises:
        InputError: they do not.
    """
    val, test = plain_number(val_fraction), plain_number(test_fraction)
    if val is None or test is None or not (val > 0 and test > 0 and val + test < 1):
        raise InputError(
            "val_fraction and test_fraction: expected positive numbers with a sum below 1, "
            f"got {val_fraction} and {test_fraction}"
        )
    return val, test
