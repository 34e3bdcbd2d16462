"""A split of a dataset, and how rows are divided into splits."""

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
#: Of each input of a split, the rows whose values its digest is made of: data of any size are told apart in a millisecond.
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Split(Dataset[Batch]):
    """One split, whole in memory.

    inputs: modality -> (N, ...), or name -> (N, ...) for a modality of several tensors, such as token ids and their mask;
    target: (N,) int64; origin: modality -> (N,) int64, the item of the source that each row was made from, by which splits can
    be shown to be disjoint.

    A subclass with ``in_memory = False`` makes its batches in ``__getitem__``, in workers, and may use random numbers of torch,
    numpy and Python for them. Its `inputs` are what it makes them of, such as tensors of memory-mapped files, or empty.
    """

    inputs: Mapping[str, Input]
    target: Tensor
    origin: Mapping[str, Tensor]

    in_memory = True

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, rows: int | Tensor) -> Batch:
        """One row, or by indices (B,) a whole batch, by one index_select a tensor: collating 64 rows one by one costs more than
        a small model's step."""
        return {modality: each(lambda tensor: tensor[rows], x) for modality, x in self.inputs.items()}, self.target[rows]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self[torch.as_tensor(indices)]

    def first(self, rows: int = 2) -> dict[str, Input]:
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
        for label, x in sorted(flat(self.inputs).items()):
            found.update(f"{label} {x.dtype} {tuple(x.shape)}".encode())
            found.update(x[rows].reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]


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
