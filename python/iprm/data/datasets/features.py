"""`features`: extracted features of several modalities in one .npz file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from iprm.data.labels import UNLABELLED, Labels, read_labels
from iprm.data.module import MultimodalData
from iprm.data.npz import PREFIX, read_arrays
from iprm.data.quality import warn_once
from iprm.data.split import SPLITS, Split, check_fractions, stratified
from iprm.errors import InputError
from iprm.names import check_modality

LABELS, SPLIT = "y", "split"


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
        names, arrays = read_arrays(
            self.path, lambda name: name in (LABELS, SPLIT) or name.startswith(PREFIX), plain_objects=(LABELS, SPLIT)
        )
        labels, classes = self._labels(names, arrays)
        features = self._features(names, arrays, len(labels))
        labelled = labels != UNLABELLED
        if finite:
            self._refuse_non_finite(features, labelled)
        kept = np.flatnonzero(labelled)
        if len(kept) < len(labels):
            warn_once(f"{self.path}: {len(labels) - len(kept)} of {len(labels)} rows have the label -100 and are left out")
        if SPLIT in arrays:
            rows = self._given_split(arrays[SPLIT], len(labels), labelled)
        else:
            try:
                divided = stratified(labels[kept], self.fractions, np.random.default_rng(self.seed))
            except InputError as error:
                raise self._error(str(error)) from error
            rows = {name: kept[index] for name, index in divided.items()}

        def split(index: np.ndarray) -> Split:
            inputs = {modality: torch.from_numpy(x[index]) for modality, x in features.items()}
            origin = dict.fromkeys(inputs, torch.from_numpy(index))
            return Split(inputs, torch.from_numpy(labels[index]), origin, classes=classes)

        return {name: split(rows[name]) for name in SPLITS}

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")

    def _labels(self, names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> Labels:
        if LABELS not in arrays:
            raise self._error(f"there is no array 'y' of labels; the file has {', '.join(sorted(names)) or 'no arrays'}")
        y = arrays[LABELS]
        if y.ndim and len(y) == 0:
            raise self._error("the dataset is empty: y has no rows")
        labels = read_labels(f"{self.path}: y", y)
        if not labels.names:
            raise self._error(f"y: every row has the label {UNLABELLED}, which leaves it out")
        return labels

    def _features(self, names: Sequence[str], arrays: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        found = {name.removeprefix(PREFIX): name for name in arrays if name.startswith(PREFIX)}
        if not found:
            raise self._error(f"there is no array 'x_<modality>' of features; the file has {', '.join(sorted(names))}")
        for modality, name in found.items():
            try:
                check_modality(modality)
            except InputError as error:
                raise self._error(f"array {name!r}: {error}") from error
        return {modality: self._feature(name, arrays[name], count) for modality, name in found.items()}

    def _feature(self, name: str, x: np.ndarray, count: int) -> np.ndarray:
        if not np.issubdtype(x.dtype, np.floating) and not np.issubdtype(x.dtype, np.integer):
            raise self._error(f"{name}: expected numbers, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] == 0:
            raise self._error(f"{name}: expected shape (N, D) with D of at least 1, got {x.shape}")
        if len(x) != count:
            raise self._error(f"{name}: expected as many rows as y, {count}, got {len(x)}")
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported as non-finite
            return x.astype(np.float32)

    def _refuse_non_finite(self, features: Mapping[str, np.ndarray], labelled: np.ndarray) -> None:
        for modality, x in features.items():
            broken = np.flatnonzero(~np.isfinite(x).all(axis=1) & labelled)
            if len(broken):
                more = f" (and {len(broken) - 1} more rows)" if len(broken) > 1 else ""
                raise self._error(f"modality {modality!r}: row {broken[0]} has a feature that is not finite in float32{more}")

    def _given_split(self, split: np.ndarray, count: int, labelled: np.ndarray) -> dict[str, np.ndarray]:
        if split.shape not in ((count,), (count, 1)):
            raise self._error(f"split: expected shape ({count},) as y, got {split.shape}")
        split = split.reshape(-1)
        if split.dtype.kind == "S":
            split = np.char.decode(split, "ascii", "replace")
        worded = split.dtype.kind == "U" or isinstance(split[0], str)
        names = SPLITS if worded else tuple(range(len(SPLITS)))
        foreign = ~np.isin(split, names)
        if foreign.any():
            row = int(foreign.argmax())
            got = split[row] if split.dtype == object else split[row].item()
            raise self._error(f'split: expected "train", "val" or "test", or 0, 1 or 2, got {got!r} in row {row}')
        return {name: np.flatnonzero((split == value) & labelled) for name, value in zip(SPLITS, names, strict=True)}
