"""`features`: extracted features of several modalities in one .npz file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from iprm.data.module import MultimodalData
from iprm.data.npz import PREFIX, read_archive
from iprm.data.split import SPLITS, Split, check_fractions, stratified
from iprm.errors import InputError

MOST_CLASSES = 2**20


class Features(MultimodalData):
    """One .npz file with arrays ``x_<modality>`` (N, D_m), ``y`` (N,) whole numbers from 0, and optionally ``split`` (N,) of
    "train", "val" and "test", or of 0, 1 and 2 for these. Features are converted to float32, without normalisation.

    Without ``split``, rows are divided at random, stratified by class. Object arrays are refused, because unpickling one
    could run arbitrary code.

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
        check_fractions(val_fraction, test_fraction)
        self.path = Path(path)
        self.fractions = {"test": test_fraction, "val": val_fraction}

    def read(self) -> dict[str, Split]:
        return self._read(finite=True)

    def inspect(self, faults: list[str]) -> dict[str, Split]:
        return self._read(finite=False)

    def _read(self, finite: bool) -> dict[str, Split]:
        """The splits. With `finite`, non-finite values raise InputError."""
        arrays = read_archive(self.path)
        labels = self._labels(arrays)
        features = self._features(arrays, len(labels))
        if finite:
            self._refuse_non_finite(features)
        if "split" in arrays:
            rows = self._given_split(arrays["split"], len(labels))
        else:
            rows = stratified(labels, self.fractions, np.random.default_rng(self.seed))

        def split(index: np.ndarray) -> Split:
            inputs = {modality: torch.from_numpy(x[index]) for modality, x in features.items()}
            return Split(inputs, torch.from_numpy(labels[index]), dict.fromkeys(inputs, torch.from_numpy(index)))

        return {name: split(rows[name]) for name in SPLITS}

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")

    def _labels(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        if "y" not in arrays:
            raise self._error(f"there is no array 'y' of labels; the file has {', '.join(sorted(arrays)) or 'no arrays'}")
        y = arrays["y"]
        if not np.issubdtype(y.dtype, np.integer):
            raise self._error(f"y: expected whole numbers (an integer type), got {y.dtype}; save y.astype(int)")
        if y.ndim != 1:
            raise self._error(f"y: expected shape (N,), got {y.shape}")
        if len(y) == 0:
            raise self._error("the dataset is empty: y has no rows")
        if y.min() < 0:
            raise self._error(f"y: expected labels from 0 up, got {y.min()} in row {int(y.argmin())}")
        if y.max() >= MOST_CLASSES:
            row = int(y.argmax())
            raise self._error(
                f"y: expected class indices below {MOST_CLASSES}, got {y.max()} in row {row}: a head has a row each"
            )
        return y.astype(np.int64)

    def _features(self, arrays: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        names = [name for name in arrays if name.startswith(PREFIX) and name != PREFIX]
        if not names:
            raise self._error(f"there is no array 'x_<modality>' of features; the file has {', '.join(sorted(arrays))}")
        return {name.removeprefix(PREFIX): self._feature(name, arrays[name], count) for name in names}

    def _feature(self, name: str, x: np.ndarray, count: int) -> np.ndarray:
        if not np.issubdtype(x.dtype, np.floating) and not np.issubdtype(x.dtype, np.integer):
            raise self._error(f"{name}: expected numbers, got {x.dtype}")
        if x.ndim != 2 or x.shape[1] == 0:
            raise self._error(f"{name}: expected shape (N, D) with D of at least 1, got {x.shape}")
        if len(x) != count:
            raise self._error(f"{name}: expected as many rows as y, {count}, got {len(x)}")
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported as non-finite
            return x.astype(np.float32)

    def _refuse_non_finite(self, features: Mapping[str, np.ndarray]) -> None:
        for modality, x in features.items():
            broken = np.flatnonzero(~np.isfinite(x).all(axis=1))
            if len(broken):
                more = f" (and {len(broken) - 1} more rows)" if len(broken) > 1 else ""
                raise self._error(f"modality {modality!r}: row {broken[0]} has a feature that is not finite in float32{more}")

    def _given_split(self, split: np.ndarray, count: int) -> dict[str, np.ndarray]:
        if split.shape != (count,):
            raise self._error(f"split: expected shape ({count},) as y, got {split.shape}")
        names = SPLITS if split.dtype.kind == "U" else tuple(range(len(SPLITS)))
        foreign = ~np.isin(split, names)
        if foreign.any():
            row = int(foreign.argmax())
            raise self._error(f'split: expected "train", "val" or "test", or 0, 1 or 2, got {split[row].item()!r} in row {row}')
        return {name: np.flatnonzero(split == value) for name, value in zip(SPLITS, names, strict=True)}
