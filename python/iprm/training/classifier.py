"""Training: encoders, a fusion method and an optimiser as one Lightning module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from iprm.data.split import Batch
from iprm.distributed import gathered, rank, world_size
from iprm.encoders.description import Input, plain
from iprm.encoders.registry import build_encoders, canonical
from iprm.errors import InputError
from iprm.fusion.module import FusionModule
from iprm.fusion.output import FusionOutput
from iprm.methods import build

from .checkpoint import misfit
from .cuda_graphs import GraphedStep
from .finite import FiniteGuard, check_state
from .metrics import EpochMeans, EpochMetrics
from .train_step import TrainingStep, encode, prepare


class FusionClassifier(L.LightningModule):
    """A classifier of several modalities: an encoder each, then a fusion method, learned by SGD with one step of decay.

    Logged once an epoch: `train_loss`, `train_accuracy`, `train_accuracy_<head>`, and of IPRM `weight` (λ at its end) and
    `strength_<modality>` (mean ω); of validation and test `<split>_loss`, `_accuracy`, `_macro_f1`, `_map` (mean average
    precision over classes) and `_accuracy_<head>`. A head is a modality or "mix". No step waits for a GPU.

    A step whose input, features or loss is not finite ends the run with `NonFiniteError` (see `FiniteGuard`), and a
    checkpoint is written only of a model whose steps and parameters are finite.

    Args:
        inputs: modality -> description of its input, as `MultimodalData.inputs` has it: a tensor, or a dict of tensors.
        num_classes: C.
        method: "iprm"; its ablations "iprm-linear", "iprm-one-pass", "iprm-no-ema"; the baselines "concat", "sum", "weight",
            "joint"; or "unimodal-<modality>".
        method_options: further options of the method, such as {"alpha": 0.9}.
        encoders: modality -> "cnn", "mlp", "linear", "identity", "resnet18", or the import path of an nn.Module of yours; with
            arguments, a mapping of both (see docs/your-model.md). A modality that is not named gets an encoder by its shape.
        feature_dim: width of the features; those of "identity", "resnet18" and of a class of yours have a width of their own.
        learning_rate: the step of SGD, before its decay.
        momentum: of SGD, from 0 to 1.
        weight_decay: of SGD.
        decay_at: the part of the epochs, from 0 to 1, after which the learning rate is multiplied by `decay`, once. A run that
            is bounded by steps alone has no such part.
        decay: see `decay_at`.
        channels_last: images and convolutions in the channels-last memory format, which oneDNN and GPUs with tensor cores
            prefer; under FSDP2 the images alone.
        compile: a backend of torch.compile for encoders and fusion, such as "inductor"; none by default.
        cuda_graph: whole training steps, but the optimiser's, as CUDA graphs; on a CPU, in mixed precision, in several
            processes and for batches of another shape steps run as they are, and the log says so (see `GraphedStep`).

    Raises:
        InputError: an unknown method, option or encoder (the message suggests the closest), or a number out of its range.
    """

    encoders: nn.ModuleDict
    fusion: FusionModule
    val_metrics: EpochMetrics
    test_metrics: EpochMetrics

    def __init__(
        self,
        inputs: dict[str, Any],
        num_classes: int,
        method: str = "iprm",
        method_options: dict[str, Any] | None = None,
        encoders: dict[str, str | dict[str, Any]] | None = None,
        feature_dim: int = 64,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        decay_at: float = 0.7,
        decay: float = 0.1,
        channels_last: bool = False,
        compile: str | None = None,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        inputs, encoders = plain(inputs), canonical(encoders)  # a checkpoint holds plain values
        self.save_hyperparameters()
        _check_number("learning_rate", learning_rate)
        _check_number("momentum", momentum, highest=1)
        _check_number("weight_decay", weight_decay)
        _check_number("decay_at", decay_at, highest=1)
        _check_number("decay", decay)
        self.structure = _structure(inputs, num_classes, method, method_options, encoders, feature_dim)
        every, widths = build_encoders(inputs, feature_dim, encoders)
        try:
            self.fusion = build(method, widths, num_classes, tuple(inputs), **(method_options or {}))
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        # one that the method does not read would have no gradient, which DistributedDataParallel refuses
        self.encoders = nn.ModuleDict({name: every[name] for name in self.fusion.modalities})
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.decay_at, self.decay = decay_at, decay
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        prepare(self.encoders, self.fusion, self.memory_format, compile)
        step = TrainingStep(self.encoders, self.fusion, self.memory_format)
        self._step = GraphedStep(step) if cuda_graph else step.forward  # no submodule, which would name all parameters twice
        self.means = EpochMeans()
        self._restored_means: list[dict[str, Any]] = []  # of each process
        self._optimiser: torch.optim.SGD | None = None
        self._schedule: torch.optim.lr_scheduler.LambdaLR | None = None
        self.guard = FiniteGuard("training step")
        self.val_metrics, self.test_metrics = EpochMetrics(num_classes), EpochMetrics(num_classes)
        self.evaluation_guard = FiniteGuard("evaluation batch")

    def configure_model(self) -> None:
        """Under FSDP2 (Lightning's ``ModelParallelStrategy``): shards each encoder, and the fusion module as a whole, for its
        operator takes the weights of all heads at once."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        self.encoders.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 shards no other parameters
        # over all processes: of Lightning's mesh those of one machine share tensors by default
        mesh = init_device_mesh(self.device_mesh.device_type, (world_size(),))
        for module in (*self.encoders.values(), self.fusion):
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def check_batch_size(self, rows: int) -> None:
        """Whether it can be trained on batches of so many rows a process.

        Raises:
            InputError: it is one row, and an encoder normalises over the batch.
        """
        if rows == 1 and any(isinstance(module, _BatchNorm) for module in self.encoders.modules()):
            raise InputError("batch_size: expected at least 2 to train encoders that normalise over a batch, got 1")

    def encode(self, inputs: Mapping[str, Input]) -> dict[str, Tensor]:
        """modality -> (B, ...) to modality -> (B, D)."""
        return encode(self.encoders, inputs, self.memory_format)

    def forward(self, inputs: Mapping[str, Input], target: Tensor | None = None) -> FusionOutput:
        """modality -> (B, ...), target (B,) int64 or None -> FusionOutput."""
        return self.fusion(self.encode(inputs), target)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As Lightning does it; on a CPU, where every batch is already, it would walk through all of it."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    # training

    def on_train_start(self) -> None:
        self._apply_settings()
        if isinstance(self._step, GraphedStep):
            self._step.accumulates = self.trainer.accumulate_grad_batches > 1
        if self._restored_means:  # the run goes on within an epoch
            self.means.load_state_dict(self._restored_means[rank()], self.device)
            self._restored_means = []

    def on_train_epoch_start(self) -> None:
        self.means.reset()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        inputs, target = batch
        features, output = self._step(inputs, target)
        self.guard.watch(self.global_step, inputs, features, output)
        self.means.update(output, target)
        return output.loss

    def on_train_epoch_end(self) -> None:
        self.guard.look()
        self.log_dict(self.train_metrics())
        self.means.reset()

    def train_metrics(self, *, joint: bool = True) -> dict[str, Tensor]:
        """Those of the epoch so far: of all processes, which must all call this, or of this one's rows."""
        weight = getattr(self.fusion, "weight", None)  # λ of a method that has one
        return self.means.compute(tuple(self.encoders), weight, joint=joint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this before it writes a checkpoint: an error here leaves the last one as it was."""
        self.guard.look()
        check_state(self, self.global_step)
        checkpoint["epoch_means"] = gathered(self.means.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this before it loads the state.

        Raises:
            InputError: the checkpoint is of a model made with other settings, or of another module.
        """
        settings = checkpoint.get("hyper_parameters", {})
        try:
            there = _structure(**settings)
        except (TypeError, ValueError, AttributeError) as error:
            named = f"its settings are {', '.join(map(str, settings))}" if settings else "it has no settings"
            raise InputError(f"the checkpoint is not of a FusionClassifier: {named}") from error
        for name, here in self.structure.items():
            if there[name] != here:
                raise InputError(f"the checkpoint is of a model with {name} {there[name]!r}, this one has {here!r}")
        means = checkpoint.get("epoch_means", [])
        self._restored_means = means if len(means) == world_size() else []

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's.

        Raises:
            InputError: the state does not fit; the message names what of it.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise InputError(misfit(self.state_dict(), state_dict, strict) or str(error)) from error

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimiser = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        self._optimiser, self._schedule = optimiser, None
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:  # a run bounded by steps or time has no known part of its epochs
            return {"optimizer": optimiser}
        last = max(1, round(self.decay_at * epochs))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda epoch: self.decay if epoch >= last else 1.0)
        return {"optimizer": optimiser, "lr_scheduler": self._schedule}

    def _apply_settings(self) -> None:
        """The settings of this run take the place of those that a restored optimiser and schedule were made with."""
        if self._optimiser is None:  # a subclass has others
            return
        factor = 1.0
        if self._schedule is not None:
            self._schedule.base_lrs = [self.learning_rate] * len(self._optimiser.param_groups)
            factor = self._schedule.lr_lambdas[0](self._schedule.last_epoch)
        for group in self._optimiser.param_groups:
            group.update(lr=self.learning_rate * factor, momentum=self.momentum, weight_decay=self.weight_decay)
            group["initial_lr"] = self.learning_rate

    # evaluation

    def on_validation_start(self) -> None:
        if isinstance(self, FSDPModule):  # which leaves buffers to each process: batch norm's are then the first's, as saved
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
        self.evaluation_guard.place = f"training step {self.global_step}, validation batch"

    def on_test_start(self) -> None:
        self.evaluation_guard.place = "test batch"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.val_metrics, batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.test_metrics, batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics)

    def _evaluate(self, metrics: EpochMetrics, batch: Batch, batch_idx: int) -> None:
        inputs, target = batch
        features = self.encode(inputs)
        output = self.fusion(features, target)
        if len(target):  # of a split's last batch a process may have no rows
            self.evaluation_guard.watch(batch_idx, inputs, features, output)
        metrics.update(output, target)

    def _log_metrics(self, stage: str, metrics: EpochMetrics) -> None:
        self.evaluation_guard.look()
        self.log_dict({f"{stage}_{name}": value for name, value in metrics.compute().items()})
        metrics.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """probability (B, C) and target (B,): what `iprm predict` writes."""
        inputs, target = batch
        return {"probability": self(inputs).logits.float().softmax(1), "target": target}


def _check_number(name: str, value: float, highest: float = math.inf) -> None:
    """Raises InputError unless `value` is a finite number in [0, highest]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and 0 <= value <= highest):
        span = "from 0 up" if highest == math.inf else f"from 0 to {highest:g}"
        raise InputError(f"{name}: expected a number {span}, got {value!r}")


def _structure(
    inputs: Mapping[str, Any],
    num_classes: int,
    method: str,
    method_options: Mapping[str, Any] | None,
    encoders: Mapping[str, Any] | None,
    feature_dim: int,
    **_: Any,
) -> dict[str, Any]:
    """The hyperparameters that decide which parameters a model has, in one form."""
    return {
        "inputs": plain(inputs),
        "num_classes": num_classes,
        "method": method,
        "method_options": dict(method_options or {}),
        "encoders": canonical(encoders),
        "feature_dim": feature_dim,
    }
