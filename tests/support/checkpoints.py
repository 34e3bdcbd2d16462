"""Checkpoints of small models that have seen a few batches, as Lightning writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from iprm.training.classifier import FusionClassifier
from torch import Tensor

CLASSES = 5
TWO = {"image": [1, 12, 12], "sound": [6]}
THREE = {"image": [1, 12, 12], "sound": [6], "text": [4]}


def inputs_of(shapes: dict[str, list[int]], rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {modality: torch.randn(rows, *shape, generator=generator) for modality, shape in shapes.items()}


def checkpoint(folder: Path, shapes: dict[str, list[int]] = TWO, method: str = "iprm", precision: str = "32", **options: Any):
    """A checkpoint file, and its model in evaluation mode, with λ and running statistics changed from their initial values."""
    torch.manual_seed(0)
    model = FusionClassifier(shapes, CLASSES, method, **{"feature_dim": 8, **options})
    model.train()
    for step in range(3):
        model(inputs_of(shapes, 16, step), torch.arange(16) % CLASSES)
    if precision == "bf16":
        model.bfloat16()
    path = folder / "model.ckpt"
    write(model, path)
    return path, model.eval()


def write(model: L.LightningModule, path: Path) -> None:
    """Writes a checkpoint of a module that was never attached to a trainer."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
