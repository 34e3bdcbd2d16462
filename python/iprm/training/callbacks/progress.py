"""The progress bar of `iprm fit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from iprm.streams import printable
from iprm.training.classifier import FusionClassifier

#: Refreshes of the bar per second. Lightning's default of 100 took an eighth of the time of small steps on a CPU.
DRAWN_A_SECOND = 10
#: Steps between updates within an epoch: an update takes a tenth of a small step, and synchronises with a GPU.
READ_EVERY = 50


class RunProgress(RichProgressBar):
    """Lightning's progress bar with a short summary: loss, λ and ω of the epoch so far (on the first process) or, after it has
    ended, of the whole epoch; and validation accuracies in percent, of the prediction and of every head."""

    def __init__(self, refresh_rate: int = DRAWN_A_SECOND, **options: Any) -> None:
        # Lightning configures rich's console anew, which also prints the names of metrics after `iprm test`
        super().__init__(refresh_rate, **{"console_kwargs": {"markup": False, "emoji": False}, **options})
        self._said: dict[str, str] = {}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return self._said

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % READ_EVERY == 0 and isinstance(pl_module, FusionClassifier):
            self._read(trainer, pl_module.train_metrics(joint=False))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:  # which evaluates two batches only
            self._read(trainer)
        super().on_validation_end(trainer, pl_module)

    def _read(self, trainer: L.Trainer, newer: Mapping[str, Tensor] | None = None) -> None:
        self._said = summary({name: float(value) for name, value in {**trainer.callback_metrics, **(newer or {})}.items()})


def summary(metrics: dict[str, float]) -> dict[str, str]:
    """The columns of the bar from the metrics of an epoch."""

    def of(prefix: str) -> list[float]:
        return [value for name, value in metrics.items() if name.startswith(prefix)]

    heads = {name.removeprefix("val_accuracy_"): 100 * v for name, v in metrics.items() if name.startswith("val_accuracy_")}
    said = {
        "loss": "/".join(f"{value:.3f}" for value in of("train_loss")),
        "λ": "/".join(f"{value:.2f}" for value in of("weight")),
        "ω": "/".join(f"{value:.2f}" for value in of("strength_")),
        "val %": "/".join(f"{100 * value:.1f}" for name, value in metrics.items() if name == "val_accuracy"),
        **{name: f"{value:.1f}" for name, value in heads.items()},
    }
    return {printable(name): text for name, text in said.items() if text}
