"""`features`: extracted features of several modalities in one .npz file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iprm.data.labels import UNLABELLED, Labels, read_labels
from iprm.data.module import MultimodalData
from iprm.data.npz import PREFIX, Archive, StoredArray, check_memory
from iprm.data.quality import warn_once
from iprm.data.split import SPLITS, Split, check_fractions, stratified
from iprm.errors import InputError
from iprm.names import check_modality

LABELS, SPLIT = "y", "split"
#: Bytes for every row beside its features: its class and its index, each int64, and both once more while labels are counted.
ROW_BYTES = 32
#: Most modalities: a model of more inputs is not read from a checkpoint (`iprm.inference`). A warning begins above the second
#: number, which has 435 pairs.
MOST_MODALITIES, MANY_MODALITIES = 64, 30


class Features(MultimodalData):
    """One .npz file with arrays ``x_<modality>`` (N, D_m), ``y`` (N,) of labels, and optionally ``split`` (N,) of "train",
    "val" and "test", or of 0, 1 and 2 for these. Features are converted to float32, without normalisation. Other arrays are not
    read.

    Labels are whole numbers, booleans or words; the classes are those that occur, and keep their labels as names. Rows labelled
    -100 are left out. Without ``split``, rows are divided at random, stratified by class. Arrays of objects are refused,
    because unpickling one could run arbitrary code, except labels and splits that are plain words or numbers.

    Args:
        path: the .npz file.
        batch_size: rows per step.
        seed: determines the splits, if the file has no ``split``.
        val_fraction: fraction of rows in the validation split, if the file has no ``split``.
        test_fraction: fraction of rows in the test split, if the file has no ``split``.
        predict_split: split that `iprm predict` predicts: "train", "val" or "test".
        num_workers: processes that prefetch batches; data in memory needs none.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 64,
        seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.25,
        predict_split: str = "test",
        num_workers: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, predict_split=predict_split, num_workers=num_workers)
        val_fraction, test_fraction = check_fractions(val_fraction, test_fraction)
        self.path = Path(path)
        self.fractions = {"test": test_fraction, "val": val_fraction}

    def read(self) -> dict[str, Split]:
        return self._read(finite=True)

    def inspect(self, faults: list[str]) -> dict[str, Split]:
        return self._read(finite=False)

    def _read(self, finite: bool) -> dict[str, Split]:
        """The splits. With `finite`, non-finite values raise InputError."""
        with Archive(self.path) as archive:
            needed = [name for name in archive.names if name in (LABELS, SPLIT) or name.startswith(PREFIX)]
            stored = archive.arrays(needed)
            labels, classes = self._labels(archive.names, stored)
            features = self._features(archive.names, stored, len(labels))
            width = sum(x.header.shape[1] for x in features.values())
            check_memory(self.path, len(labels) * (ROW_BYTES + 4 * width))
            rows = self._rows(labels, stored.get(SPLIT))
            # every value is written once, at its place: a modality is not in memory twice
            ends = dict(zip(SPLITS, itertools.accumulate(len(rows[name]) for name in SPLITS), strict=True))
            place = np.full(len(labels), -1)
            for name, end in ends.items():
                place[rows[name]] = np.arange(end - len(rows[name]), end)
            filled = {modality: self._filled(modality, x, place, ends[SPLITS[-1]], finite) for modality, x in features.items()}
            del place

        def split(name: str) -> Split:
            part = slice(ends[name] - len(rows[name]), ends[name])
            inputs = {modality: torch.from_numpy(x[part]) for modality, x in filled.items()}
            origin = dict.fromkeys(inputs, torch.from_numpy(rows[name]))
            return Split(inputs, torch.from_numpy(labels[rows[name]]), origin, classes=classes)

        return {name: split(name) for name in SPLITS}

    def _rows(self, labels: np.ndarray, split: StoredArray | None) -> dict[str, np.ndarray]:
        """split -> ascending indices of its rows, all of which have a label."""
        labelled = labels != UNLABELLED
        every = bool(labelled.all())
        if not every:
            count = len(labels) - np.count_nonzero(labelled)
            warn_once(f"{self.path}: {count} of {len(labels)} rows have the label -100 and are left out")
        if split is not None:
            return self._given_split(split, labelled)
        try:
            divided = stratified(labels if every else labels[labelled], self.fractions, np.random.default_rng(self.seed))
        except InputError as error:
            raise self._error(str(error)) from error
        kept = None if every else np.flatnonzero(labelled)
        return divided if kept is None else {name: kept[index] for name, index in divided.items()}

    def _filled(self, modality: str, stored: StoredArray, place: np.ndarray, rows: int, finite: bool) -> np.ndarray:
        """The features (rows, D) float32, row i of the file at `place[i]`; a row whose place is -1 is left out."""
        x = np.empty((rows, stored.header.shape[1]), np.float32)
        first, broken, more = 0, -1, 0  # the first row that is not finite, and the number of others
        for block in stored.blocks():
            into = place[first : first + len(block)]
            kept = np.flatnonzero(into >= 0)
            with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported as non-finite
                values = block[kept].astype(np.float32)
            x[into[kept]] = values
            found = kept[~np.isfinite(values).all(axis=1)]
            if len(found):
                broken, more = (first + found[0], len(found) - 1) if broken < 0 else (broken, more + len(found))
            first += len(block)
        if finite and broken >= 0:
            others = f" (and {more} more rows)" if more else ""
            raise self._error(f"modality {modality!r}: row {broken} has a feature that is not finite in float32{others}")
        return x

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")

    def _labels(self, names: Sequence[str], arrays: Mapping[str, StoredArray]) -> Labels:
        if LABELS not in arrays:
            raise self._error(f"there is no array 'y' of labels; the file has {', '.join(sorted(names)) or 'no arrays'}")
        check_memory(self.path, math.prod(arrays[LABELS].header.shape) * ROW_BYTES)
        y = arrays[LABELS].read(plain_objects=True)
        if y.ndim and len(y) == 0:
            raise self._error("the dataset is empty: y has no rows")
        labels = read_labels(f"{self.path}: y", y)
        if not labels.names:
            raise self._error(f"y: every row has the label {UNLABELLED}, which leaves it out")
        return labels

    def _features(self, names: Sequence[str], arrays: Mapping[str, StoredArray], count: int) -> dict[str, StoredArray]:
        found = {name.removeprefix(PREFIX): name for name in arrays if name.startswith(PREFIX)}
        if not found:
            raise self._error(f"there is no array 'x_<modality>' of features; the file has {', '.join(sorted(names))}")
        if len(found) > MOST_MODALITIES:
            raise self._error(f"expected at most {MOST_MODALITIES} modalities, got {len(found)}")
        if len(found) > MANY_MODALITIES:
            pairs = f"{len(found)} modalities have {math.comb(len(found), 2)} pairs"
            warn_once(f"{self.path}: {pairs}; every step of the methods iprm trains each pair, which takes time and memory")
        for modality, name in found.items():
            try:
                check_modality(modality)
            except InputError as error:
                raise self._error(f"array {name!r}: {error}") from error
            self._check_feature(name, arrays[name], count)
        return {modality: arrays[name] for modality, name in found.items()}

    def _check_feature(self, name: str, x: StoredArray, count: int) -> None:
        shape, dtype = x.header.shape, x.header.dtype
        if dtype.hasobject:
            x.read()  # which says why it is refused
        if dtype.kind not in "iuf":
            raise self._error(f"{name}: expected numbers, got {dtype}")
        if len(shape) != 2 or shape[1] == 0:
            raise self._error(f"{name}: expected shape (N, D) with D of at least 1, got {shape}")
        if shape[0] != count:
            raise self._error(f"{name}: expected as many rows as y, {count}, got {shape[0]}")

    def _given_split(self, stored: StoredArray, labelled: np.ndarray) -> dict[str, np.ndarray]:
        split, count = stored.read(plain_objects=True), len(labelled)
        if split.shape not in ((count,), (count, 1)):
            raise self._error(f"split: expected shape ({count},) as y, got {split.shape}")
        if split.dtype.kind not in "biufUSO":
            raise self._error(f"split: expected words or whole numbers, got {split.dtype}")
        split = split.reshape(-1)
        worded = split.dtype.kind in "US" or isinstance(split[0], str)
        names: tuple[Any, ...] = SPLITS if worded else tuple(range(len(SPLITS)))
        if split.dtype.kind == "S":
            names = tuple(name.encode() for name in SPLITS)
        foreign = ~np.isin(split, names)
        if foreign.any():
            row = int(foreign.argmax())
            got = split[row] if split.dtype == object else split[row].item()
            raise self._error(f'split: expected "train", "val" or "test", or 0, 1 or 2, got {got!r} in row {row}')
        return {name: np.flatnonzero((split == value) & labelled) for name, value in zip(SPLITS, names, strict=True)}
