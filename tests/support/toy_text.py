"""A dataset of captions (token ids and their mask) beside features, and an encoder class as a user would write it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from iprm.data.module import MultimodalData
from iprm.data.split import Split, stratified
from torch import Tensor, nn

WORDS, LENGTH, WIDTH = 12, 6, 5


class TextTower(nn.Module):
    """The mean of the embeddings of unmasked tokens, (B, dim).

    It does not state its width, and it has a non-persistent buffer.
    """

    def __init__(self, dim: int = 8, layers: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, dim)
        self.layers = nn.Sequential(*(nn.Linear(dim, dim) for _ in range(layers)))
        self.register_buffer("scale", torch.ones(LENGTH, 1), persistent=False)

    def forward(self, text: dict[str, Tensor]) -> Tensor:
        mask = text["mask"].unsqueeze(2)
        words = (self.table(text["ids"]) * self.scale * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.layers(words)


def arrays(rows: int) -> dict[str, np.ndarray]:
    """Three classes that words and numbers separate; ``text.ids``, ``text.mask``, ``numbers`` and ``y``."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % 3
    ids = np.where(rng.random((rows, LENGTH)) < 0.5, 1 + y[:, None], rng.integers(4, WORDS, (rows, LENGTH)))
    mask = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (rows, 1))
    numbers = (rng.normal(size=(rows, WIDTH)) + y[:, None]).astype(np.float32)
    return {"text.ids": ids * mask, "text.mask": mask.astype(np.int64), "numbers": numbers, "y": y}


def save_samples(folder: Path, rows: int) -> None:
    """`arrays` without labels, as `iprm predict --input` reads them."""
    np.savez(folder / "new.npz", **{f"x_{label}": array for label, array in arrays(rows).items() if label != "y"})


class Captions(MultimodalData):
    """`arrays` in three splits.

    Args:
        rows: number of rows.
        batch_size: rows per step and process.
        seed: determines the splits.
        predict_split: split that `iprm predict` predicts.
        num_workers: processes that prefetch batches.
    """

    def __init__(
        self, rows: int = 90, batch_size: int = 16, seed: int = 0, predict_split: str = "test", num_workers: int | None = None
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, predict_split=predict_split, num_workers=num_workers)
        self.rows = rows

    def read(self) -> dict[str, Split]:
        content = {label: torch.from_numpy(array) for label, array in arrays(self.rows).items()}
        parts = stratified(content["y"].numpy(), {"val": 0.2, "test": 0.2}, np.random.default_rng(self.seed))

        def split(rows: Tensor) -> Split:
            text = {"ids": content["text.ids"][rows], "mask": content["text.mask"][rows]}
            inputs = {"text": text, "numbers": content["numbers"][rows]}
            return Split(inputs, content["y"][rows], dict.fromkeys(inputs, rows))

        return {name: split(torch.from_numpy(parts[name])) for name in ("train", "val", "test")}
