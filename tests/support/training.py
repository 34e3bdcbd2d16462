"""A small Lightning run of `FusionClassifier` on a file of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from iprm.data.module import MultimodalData
from iprm.training.classifier import FusionClassifier
from iprm.training.lightning import quiet_lightning
from iprm.training.optim import OPTIMIZER
from lightning.pytorch.callbacks import ModelCheckpoint


def classifier(data: MultimodalData, method: str = "iprm", **options: Any) -> FusionClassifier:
    L.seed_everything(0, verbose=False)
    if (rate := options.pop("lr", None)) is not None:
        options["optimizer"] = sgd(lr=rate)
    return FusionClassifier(data.inputs, data.num_classes, method, **{"feature_dim": 8, **options})


def sgd(**arguments: Any) -> dict[str, Any]:
    """The default settings of SGD, with changes."""
    return {"class_path": "torch.optim.SGD", "init_args": OPTIMIZER["init_args"] | arguments}


def trainer(folder: Path, epochs: int = 3, **options: Any) -> L.Trainer:
    """Keeps the best checkpoint on validation in `folder`."""
    callbacks = [ModelCheckpoint(folder / "best", monitor="val_accuracy", mode="max"), *options.pop("callbacks", [])]
    settings = {"max_epochs": epochs, "callbacks": callbacks, "logger": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**(settings | quiet | options))


def fit(folder: Path, data: MultimodalData, model: FusionClassifier, ckpt_path: str | None = None, **options: Any) -> L.Trainer:
    """Trains `model`, and returns the trainer."""
    runner = trainer(folder, **options)
    with quiet_lightning():
        runner.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return runner


def values(runner: L.Trainer) -> dict[str, float]:
    """The values logged last, by name."""
    return {name: value.item() for name, value in runner.callback_metrics.items()}
