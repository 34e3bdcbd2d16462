"""`digits`: scikit-learn's 1,797 scanned digits, as a whole at a random offset, and as a strip of two rows."""

from __future__ import annotations

import functools

import numpy as np
import torch

from iprm.data.module import MultimodalData
from iprm.data.split import Split, check_fractions, stratified

SIDE = 8
CANVAS = 12
STRIP_ROWS = slice(3, 5)


class Digits(MultimodalData):
    """Modality `image` (1, 12, 12): the 8x8 digit at a random offset in an empty canvas. Modality `strip` (16,): rows 3 and 4
    of the digit, at a fixed position: quick to learn, but insufficient alone.

    Pixels are scaled to 0..1. The embedded data needs no download.

    Args:
        batch_size: rows per step.
        seed: determines the splits and the offsets.
        val_fraction: fraction of rows in the validation split.
        test_fraction: fraction of rows in the test split.
        predict_split: split that `iprm predict` predicts: "train", "val" or "test".
        num_workers: processes that prefetch batches; data in memory needs none.
    """

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.25,
        predict_split: str = "test",
        num_workers: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, predict_split=predict_split, num_workers=num_workers)
        val_fraction, test_fraction = check_fractions(val_fraction, test_fraction)
        self.fractions = {"test": test_fraction, "val": val_fraction}

    def read(self) -> dict[str, Split]:
        pixels, labels = scanned_digits()
        splitter, mover = (np.random.default_rng([self.seed, stream]) for stream in range(2))
        offsets = mover.integers(0, CANVAS - SIDE + 1, size=(len(labels), 2))
        canvas = np.zeros((len(labels), 1, CANVAS, CANVAS), np.float32)
        for image, digit, (top, left) in zip(canvas, pixels, offsets, strict=True):
            image[0, top : top + SIDE, left : left + SIDE] = digit
        strip = pixels[:, STRIP_ROWS].reshape(len(labels), -1)

        def split(rows: np.ndarray) -> Split:
            inputs = {"image": torch.from_numpy(canvas[rows]), "strip": torch.from_numpy(strip[rows])}
            return Split(inputs, torch.from_numpy(labels[rows]), dict.fromkeys(inputs, torch.from_numpy(rows)))

        return {name: split(rows) for name, rows in stratified(labels, self.fractions, splitter).items()}


@functools.cache
def scanned_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits of scikit-learn: pixels (1797, 8, 8) float32 in 0..1, labels (1797,) int64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
