"""One run of a comparison: a method, a seed, a dataset; trained, selected on validation, tested once."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from iprm.data import make_data
from iprm.training.classifier import FusionClassifier
from iprm.training.finite import NonFiniteError
from iprm.training.lightning import quiet_lightning


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share. Plain values, so that it can be sent to a process and written as JSON."""

    data: str
    data_options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 20
    accelerator: str = "auto"


@dataclass(frozen=True)
class Result:
    """What one run gave: test metrics of the model best on validation, and the course of its training, a dict an epoch."""

    method: str
    seed: int
    test: dict[str, float]
    best_epoch: int
    seconds_per_epoch: float
    history: list[dict[str, float]]


class _Course(Logger):
    """Keeps what is logged, an epoch a dict."""

    name, version = "course", 0

    def __init__(self) -> None:
        super().__init__()
        self.epochs: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        epoch = self.epochs.setdefault(int(metrics["epoch"]), {})
        epoch.update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The report's settings.json holds them."""


class _Clock(L.Callback):
    """Times the training steps of each epoch, validation apart, and tells when one is over."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds.append(time.perf_counter() - self._began)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.advance()


def run(settings: Settings, method: str, seed: int, advance: Callable[[], None] = lambda: None) -> Result:
    """Trains and tests one method.

    Args:
        settings: shared by all runs.
        method: its name, "unimodal-<modality>" included.
        seed: decides the splits, the initial weights and the order of batches.
        advance: called once an epoch.

    Raises:
        InputError: the dataset, the method or an option does not exist or cannot be used.
        NonFiniteError: the run met a number that is not finite.
    """
    data = make_data(settings.data, **settings.data_options, seed=seed)
    L.seed_everything(seed, verbose=False)
    model = FusionClassifier(data.shapes, data.num_classes, method, **settings.model_options)
    course, clock = _Course(), _Clock(advance)
    with tempfile.TemporaryDirectory(prefix="iprm-") as folder, quiet_lightning():
        best = ModelCheckpoint(folder, monitor="val_accuracy", mode="max", save_weights_only=True)
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            devices=1,
            max_epochs=settings.epochs,
            callbacks=[best, clock],
            logger=course,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(model, datamodule=data)
            history = [course.epochs[epoch] for epoch in sorted(course.epochs)]
            (test,) = trainer.test(model, datamodule=data, ckpt_path="best", verbose=False, weights_only=True)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (method {method!r}, seed {seed})") from error
    best_epoch = max(range(len(history)), key=lambda epoch: history[epoch]["val_accuracy"])
    metrics = {name.removeprefix("test_"): value for name, value in test.items()}
    return Result(method, seed, metrics, best_epoch, statistics.median(clock.seconds), history)
