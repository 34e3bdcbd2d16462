"""diagnostics.json: measurements at the end of a run, so that a report needs neither the data nor the model."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from iprm.data.loading import Loader
from iprm.encoders.registry import evaluating
from iprm.environment import chosen_backends, device_name, versions
from iprm.errors import InputError
from iprm.files import write_atomically
from iprm.training.callbacks.best_checkpoint import best_checkpoint
from iprm.training.checkpoint import read_checkpoint
from iprm.training.classifier import FusionClassifier
from iprm.training.lightning import to_device

from .modality_diagnostics import SplitMeasurement

FILE = "diagnostics.json"


class Diagnostics(Callback):
    """Writes diagnostics.json into the run's folder at the end of training, for `iprm report`.

    `iprm fit` adds it. In your own Lightning script, pass it to the trainer::

        trainer = L.Trainer(callbacks=[ModelCheckpoint(monitor="val_accuracy", mode="max"), Diagnostics()])
        trainer.fit(FusionClassifier(data.inputs, data.num_classes), datamodule=data)

    Process 0 evaluates the validation split once, with the best weights of a `ModelCheckpoint` that has a monitor, or else
    with the last weights. Weights, module modes and random states are restored afterwards. Nothing is read back from a GPU
    before the last batch. With M modalities and C classes the file holds

    - ``weights``: ``{"from": "best", "epoch", "monitor", "value"}``, or ``{"from": "last", "epoch"}``;
    - ``method``, ``modalities``, ``num_classes``, ``rows`` (samples that have a label);
    - ``classes``: names of the C classes; ``class_counts``: C counts;
    - ``confusion``: the non-zero counts of the C×C matrix, ``{"target": [...], "prediction": [...], "count": [...]}``;
    - ``angles``: for each pair of modalities with features of equal width, θ = ∠(x, y) in radians:
      ``{"pair": [a, b], "counts": 36 over [0, π], "mean", "undirected"}``; "undirected" counts rows with a zero vector;
    - ``strength``: for each pair that IPRM mixes, with its newest λ, by class:
      ``{"pair": [a, b], "kl": [C sums, C sums], "omega": [C, C]}``, ω = `iprm_kernels.strength_weights` of the two sums;
      null for classes without a sample;
    - ``versions``, ``platform``, ``device``, ``precision``, ``backends``.

    It needs a `FusionClassifier`, a validation split, and a strategy that keeps the whole model in every process. Without one
    of them, or if the file cannot be written, it warns and does nothing.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not on_fit_end: by then Lightning has moved the model off its device
        folder = trainer.log_dir or trainer.default_root_dir  # a collective call: before rank 0 is singled out
        fast = getattr(trainer, "fast_dev_run", False)  # creates no folder
        if fast or not trainer.is_global_zero or not trainer.enable_validation:
            return
        if not isinstance(pl_module, FusionClassifier):
            rank_zero_warn(f"Diagnostics: expected a FusionClassifier, got {type(pl_module).__name__}; nothing is recorded")
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            rank_zero_warn(f"Diagnostics: {type(trainer.strategy).__name__} divides the model; nothing is recorded")
            return
        with isolate_rng(), torch.no_grad(), evaluating(pl_module), _best_weights(trainer, pl_module) as weights:
            measurement = SplitMeasurement(pl_module.fusion)
            for inputs, target in _batches(trainer):
                with trainer.precision_plugin.val_step_context():
                    measurement.update(pl_module.encode(inputs), target)
            record = {
                "weights": weights,
                "method": pl_module.structure["method"],
                "classes": list(pl_module.classes),
                **measurement.compute(),
                **_environment(trainer, pl_module),
            }
        try:
            write_atomically(Path(folder) / FILE, json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            rank_zero_warn(f"Diagnostics: not written: {error}")


@contextlib.contextmanager
def _best_weights(trainer: L.Trainer, module: nn.Module) -> Iterator[dict[str, Any]]:
    """Loads the best parameters and buffers, if there is a checkpoint; restores the last ones bit-identically afterwards."""
    kept = best_checkpoint(trainer)
    checkpoint = None
    if kept is not None and kept.best_model_path:
        try:
            checkpoint = read_checkpoint(kept.best_model_path)
        except InputError as error:
            rank_zero_warn(f"Diagnostics: the last weights are measured: {error}")
    if kept is None or checkpoint is None:
        yield {"from": "last", "epoch": trainer.current_epoch - 1}  # current_epoch is already incremented here
        return
    # copied in place rather than by load_state_dict, whose hooks may change attributes that are not restored
    state = {name: x for name, x in module.state_dict().items() if isinstance(x, Tensor)}
    last = {name: x.clone() for name, x in state.items()}
    try:
        for name, x in state.items():
            x.copy_(checkpoint["state_dict"][name])
        score = None if kept.best_model_score is None else float(kept.best_model_score)
        yield {"from": "best", "epoch": checkpoint["epoch"], "monitor": kept.monitor, "value": score}
    finally:
        for name, x in state.items():
            x.copy_(last[name])


def _batches(trainer: L.Trainer) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of the validation split on the model's device: the whole split, even if it is divided among processes."""
    loader: Any = trainer.val_dataloaders
    count = trainer.num_val_batches[0]
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        count *= trainer.world_size
        dataset, rows = loader.dataset, loader.batch_size
        if isinstance(loader, Loader):
            dataset, rows = loader.dataset.dataset, loader.sampler.batch_size
        loader = DataLoader(dataset, rows, collate_fn=loader.collate_fn, num_workers=loader.num_workers)
    for batch in itertools.islice(loader, None if count == math.inf else int(count)):
        yield to_device(trainer, batch)


def _environment(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device_name(module.device),
        "precision": str(trainer.precision),
        "backends": chosen_backends(),
    }
