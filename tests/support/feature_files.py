"""Small .npz files of features, and datasets with NaN, noise or signals in the middle of training."""

from __future__ import annotations

import math
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from iprm.data.datasets.features import Features
from iprm.data.split import Batch, Split


def arrays(rows: int = 60) -> dict[str, np.ndarray]:
    """Three classes that `audio` (4,) separates with some errors, and `text` (6,) does not."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % 3
    return {"x_audio": rng.normal(size=(rows, 4)) + y[:, None], "x_text": rng.normal(size=(rows, 6)), "y": y}


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in arrays().items() if key != name}


def changed(name: str, row: int, value: float) -> dict[str, np.ndarray]:
    """`arrays` with one row of one array set to a value."""
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


class NoisyFeatures(Features):
    """`Features` with noise of torch's, numpy's and Python's generators on every training batch. It sends one signal to its
    own process, the first of several, before a given step.

    Args:
        signal_step: optimiser step before which the signal is sent; -1 sends none.
        signal_number: number of the signal.
    """

    def __init__(
        self, path: str, batch_size: int = 13, seed: int = 0, signal_step: int = -1, signal_number: int = int(signal.SIGKILL)
    ) -> None:
        super().__init__(path, batch_size, seed)
        self.signal_step, self.signal_number = signal_step, signal_number

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        trainer = self.trainer
        assert trainer is not None
        if not trainer.training:
            return batch
        if trainer.global_step == self.signal_step and trainer.is_global_zero:
            self.signal_step = -1
            os.kill(os.getpid(), self.signal_number)
        return with_noise(batch)


def with_noise(batch: Batch) -> Batch:
    """Noise of torch's, numpy's and Python's generators."""
    inputs, target = batch
    shift = float(np.random.normal()) + random.gauss(0, 1)  # noqa: NPY002 - the generator that others use
    return {name: x + 0.1 * torch.randn_like(x) + 0.01 * shift for name, x in inputs.items()}, target


@dataclass(frozen=True)
class AugmentedSplit(Split):
    """Adds noise to every batch, and makes images (1, 6, 6) of `text`."""

    in_memory = False

    def __getitem__(self, rows: int | torch.Tensor) -> Batch:
        inputs, target = with_noise(super().__getitem__(rows))
        text = inputs["text"]
        return {"audio": inputs["audio"], "image": text[..., None, :, None] * text[..., None, None, :]}, target


class AugmentedFeatures(NoisyFeatures):
    """`NoisyFeatures` loaded by workers, which add noise to every batch.

    Args:
        num_workers: number of workers.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 13,
        seed: int = 0,
        signal_step: int = -1,
        signal_number: int = int(signal.SIGKILL),
        num_workers: int = 2,
    ) -> None:
        super().__init__(path, batch_size, seed, signal_step, signal_number)
        self.num_workers = num_workers

    def read(self) -> dict[str, Split]:
        return {name: AugmentedSplit(split.inputs, split.target, split.origin) for name, split in super().read().items()}
