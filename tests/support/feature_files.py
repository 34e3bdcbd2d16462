"""Small .npz files of features, and a dataset of one of them that turns bad in the middle of training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from iprm.data.base import Batch
from iprm.data.features import Features


def arrays(rows: int = 60) -> dict[str, np.ndarray]:
    """Three classes that `audio` (4,) tells apart, with mistakes, and `text` (6,) does not."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % 3
    return {"x_audio": rng.normal(size=(rows, 4)) + y[:, None], "x_text": rng.normal(size=(rows, 6)), "y": y}


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in arrays().items() if key != name}


def changed(name: str, row: int, value: float) -> dict[str, np.ndarray]:
    """`arrays` with one row of one of them set to a value."""
    copy = arrays()
    copy[name] = copy[name].copy()
    copy[name][row] = value
    return copy


def save(folder: Path, content: dict[str, np.ndarray]) -> str:
    np.savez(folder / "features.npz", **content)
    return str(folder / "features.npz")


class PoisonedFeatures(Features):
    """`Features` whose modality `text` is NaN in one training step, or in validation after it."""

    def __init__(self, path: str, batch_size: int = 10, poisoned_step: int = 5, stage: str = "train") -> None:
        super().__init__(path, batch_size)
        self.poisoned_step, self.stage = poisoned_step, stage

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        trainer = self.trainer
        assert trainer is not None
        due = trainer.global_step >= self.poisoned_step and not trainer.sanity_checking
        if due and self.stage == ("train" if trainer.training else "validation"):
            batch[0]["text"][:] = math.nan
        return batch
