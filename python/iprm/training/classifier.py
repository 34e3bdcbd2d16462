"""`FusionClassifier`: encoders, a method and an optimiser as one Lightning module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from iprm.data.labels import listed
from iprm.data.module import MultimodalData
from iprm.data.split import Batch, numbered
from iprm.distributed import gathered, rank, world_size
from iprm.encoders.description import Input, plain
from iprm.encoders.named_modules import NamedModules
from iprm.encoders.registry import build_encoders, canonical
from iprm.errors import InputError, check_number, check_whole, plain_values, unknown
from iprm.fusion.model import FusionModel
from iprm.fusion.module import FusionModule
from iprm.fusion.output import FusionOutput
from iprm.methods import Rule, build
from iprm.methods.balancer import parameter_groups
from iprm.methods.driver import Driver, loss_of
from iprm.methods.rule import GRADIENTS, SEVERAL_UPDATES, VALIDATION, Update

from .cuda_graphs import GraphedStep
from .finite import FiniteGuard, check_state
from .metrics import EpochMeans, EpochMetrics
from .optim import LR_SCHEDULER, OPTIMIZER, Configured, check_methods, check_scheduler, make_optimizer, make_scheduler


class FusionClassifier(L.LightningModule):
    """A multimodal classifier: one encoder per modality, a fusion module, and the training rule of a method.

    Logged once per epoch: `train_loss`, `train_loss_<head>`, `train_accuracy`, `train_accuracy_<head>`, and every measure of
    the method by its own name (IPRM has `weight`, λ at the end of the epoch, and `strength_<modality>`, mean ω); for validation
    and test `<split>_loss`, `_accuracy`, `_macro_f1`, `_map` (mean average precision over classes) and `_accuracy_<head>`. A
    head is a modality, "mix" or "fused". No training step synchronises with a GPU.

    A non-finite input, feature or loss ends the run with `NonFiniteError` (see `FiniteGuard`). A checkpoint is written only
    if all steps so far and all parameters are finite.

    Args:
        inputs: modality -> description of its input, a tensor or a dict of tensors, as `MultimodalData.inputs` returns it.
        num_classes: C.
        method: a key of `iprm.methods.METHODS`, or "unimodal-<modality>".
        method_options: options of the method, such as {"alpha": 0.9}.
        encoders: modality -> "cnn", "mlp", "linear", "identity", "resnet18", or the import path of your own nn.Module; with
            arguments, a mapping of both (see docs/your-model.md). For a modality that is not named, the
            encoder is chosen by the shape of its input.
        feature_dim: width of the features; "identity", "resnet18" and your own classes determine their width themselves.
        optimizer: any class of torch.optim, {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}; None for SGD with
            a learning rate of 0.01, momentum 0.9 and weight decay 1e-4.
        lr_scheduler: any class of torch.optim.lr_scheduler, or `iprm.training.optim.StepAtFraction` (the default) or
            `WarmupCosine`, in the same form, stepped after every epoch; None for a constant rate. The default keeps the rate
            constant in a run that is bounded by steps alone, because the number of epochs is unknown there.
        modality_options: modality -> {"lr_scale": factor of the learning rate of its encoder, "weight_decay": of its encoder,
            "freeze": true, or the number of first epochs in which its encoder is not trained}, each optional.
        channels_last: store images and convolution weights in the channels-last memory format, which is faster on oneDNN and
            on GPUs with tensor cores; under FSDP2, only the images.
        compile: a backend of torch.compile for encoders and fusion, such as "inductor"; none by default.
        classes: names of the C classes, as `MultimodalData.classes` returns them; None for their indices.
        cuda_graph: capture forward and backward pass as CUDA graphs. On a CPU, in mixed precision, in several processes and
            for batches of another shape, steps run without a graph, and a warning is logged (see `GraphedStep`).

    Raises:
        InputError: an unknown method, option or encoder (the message suggests the closest name), or a value out of range.
    """

    model: FusionModel  # encoders and fusion module
    encoders: NamedModules
    fusion: FusionModule
    rule: Rule
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
        optimizer: dict[str, Any] | str | None = None,
        lr_scheduler: dict[str, Any] | str | None = LR_SCHEDULER,
        modality_options: dict[str, dict[str, Any]] | None = None,
        channels_last: bool = False,
        compile: str | None = None,
        cuda_graph: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        # a checkpoint holds plain values: one of numpy could not be read without running code
        optimizer, lr_scheduler, modality_options = map(plain_values, (optimizer, lr_scheduler, modality_options))
        self.save_hyperparameters()
        inputs, encoders, method_options = plain(inputs), canonical(encoders), plain_values(dict(method_options or {}))
        num_classes, feature_dim = check_whole("num_classes", num_classes), check_whole("feature_dim", feature_dim, 1)
        #: the hyperparameters that decide which parameters the model has, in the form that checkpoints hold: plain values
        self.structure: dict[str, Any] = {
            "inputs": inputs,
            "num_classes": num_classes,
            "method": method,
            "method_options": method_options,
            "encoders": encoders,
            "feature_dim": feature_dim,
            "classes": _class_names(classes, num_classes),
        }
        self.hparams.update(self.structure)
        every, widths = build_encoders(inputs, feature_dim, encoders)
        try:
            built = build(method, widths, num_classes, tuple(inputs), **method_options)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        self.fusion, self.rule = built
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model = FusionModel(every, self.fusion, memory_format)
        # only the modalities that the method reads: DistributedDataParallel refuses parameters without a gradient
        self.encoders = model.encoders
        model.encoders.to(memory_format=memory_format)  # type: ignore[call-overload]
        if compile is not None:
            if compile not in (known := torch.compiler.list_backends(exclude_tags=())):
                raise InputError(unknown("backend of torch.compile", compile, known))
            for module in (*model.encoders.values(), self.fusion):
                module.compile(backend=compile)  # in place, so that the keys of checkpoints do not change
        self.__dict__["model"] = model  # not as a submodule, which would register every parameter under a second name
        self.graphed = GraphedStep(model) if cuda_graph else None
        for modality in modality_options or {}:
            if modality not in inputs:
                raise InputError(unknown("modality in modality_options", modality, inputs))
        self.modality_options, freeze = _modality_options(modality_options or {}, tuple(self.encoders))
        self.driver = Driver(model, self.rule, self.graphed, freeze)
        self.automatic_optimization = SEVERAL_UPDATES not in self.rule.needs
        self.optimizer_settings, self.scheduler_settings = optimizer or OPTIMIZER, lr_scheduler
        self._configured: Configured | None = None
        self.means = EpochMeans()
        self._restored_means: list[dict[str, Any]] = []  # one per process
        self._restored_counts: dict[str, int] = {}  # of optimisers and schedules
        self.guard = FiniteGuard("training batch")
        self.val_metrics, self.test_metrics = EpochMetrics(), EpochMetrics()
        self.evaluation_guard = FiniteGuard("evaluation batch")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their indices."""
        names = self.structure["classes"]
        return numbered(self.structure["num_classes"]) if names is None else tuple(names)

    @property
    def batches(self) -> int:
        """Batches trained on so far, 0 without a trainer: the clock of a run, however many steps an optimiser makes."""
        try:
            return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        except RuntimeError:  # Lightning's, of a module that no trainer has
            return 0

    def configure_callbacks(self) -> list[Callback]:
        """Adds no callback. Lightning calls this before it checks any setting, so `check_trainer` can refuse first.

        Raises:
            InputError: a setting of the trainer that this method cannot be trained with.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_trainer(self.trainer)
        return []

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Checks that the method can be trained with this trainer.

        Raises:
            InputError: naming the method and the setting.
        """
        needs, method = self.rule.needs, f"method {self.structure['method']!r}"
        settings = {
            "gradient_clip_val": trainer.gradient_clip_val,
            "accumulate_grad_batches": trainer.accumulate_grad_batches > 1,
            "cuda_graph": self.graphed,
        }
        for setting, value in settings.items():
            if SEVERAL_UPDATES in needs and value:
                raise InputError(f"{method} needs {SEVERAL_UPDATES}, which {setting} cannot be used with")
        if GRADIENTS in needs and isinstance(trainer.strategy, ModelParallelStrategy):
            raise InputError(f"{method} needs {GRADIENTS}, which the strategy fsdp2 does not keep in one place")
        if VALIDATION in needs and (trainer.check_val_every_n_epoch != 1 or trainer.limit_val_batches == 0):
            raise InputError(f"{method} needs {VALIDATION}: expected check_val_every_n_epoch 1 and a validation split")

    def configure_model(self) -> None:
        """Under FSDP2 (Lightning's ``ModelParallelStrategy``), shards each encoder, and the fusion module as one unit, because
        its operator reads the weights of all heads at once."""
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        self.encoders.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 shards contiguous parameters only
        # over all processes: Lightning's default mesh uses tensor parallelism within a machine
        mesh = init_device_mesh(self.device_mesh.device_type, (world_size(),))
        for module in (*self.encoders.values(), self.fusion):
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def check_training(self, rows: int) -> None:
        """Checks that optimiser and schedule can be made, and that `rows` per batch and process suffice for the encoders.

        Raises:
            InputError: the optimiser or schedule cannot be made; or `rows` is 1 and an encoder normalises over the batch.
        """
        optimizer = make_optimizer(parameter_groups(self.model, self.rule, self.modality_options), self.optimizer_settings)
        if self.scheduler_settings is not None:
            check_scheduler(optimizer, self.scheduler_settings, epochs=100)  # any number: the checks do not depend on it
        if rows == 1 and any(isinstance(module, _BatchNorm) for module in self.encoders.modules()):
            raise InputError("batch_size: expected at least 2 to train encoders that normalise over a batch, got 1")

    def encode(self, inputs: Mapping[str, Input]) -> dict[str, Tensor]:
        """modality -> (B, ...) to modality -> (B, D)."""
        return self.model.encode(inputs)

    def forward(self, inputs: Mapping[str, Input], target: Tensor | None = None) -> FusionOutput:
        """modality -> (B, ...), target (B,) int64 or None -> FusionOutput; in evaluation mode, with `Rule.predict`'s logits."""
        output = self.model(inputs, target)
        return output if self.training else self.driver.predicted(output)

    # training

    def on_train_start(self) -> None:
        optimizers, schedules = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        # a run without a schedule has no initial rates; it may be continued with one
        scheduled = any("initial_lr" in group for optimizer in optimizers for group in optimizer.param_groups)
        made = {"optimizer_states": len(optimizers), "lr_schedulers": len(schedules) if scheduled else 0}
        for name, count in self._restored_counts.items():
            if count < made[name]:  # Lightning restores as many as there are
                raise InputError(f"the checkpoint's {name}: expected {made[name]}, got {count}")
        self._restored_counts = {}
        for config in self.trainer.lr_scheduler_configs:
            check_methods(config.scheduler)
        if self._configured is not None:  # None if a subclass overrides configure_optimizers
            self._configured.check()
            self._configured.apply()
        if self.graphed is not None:
            self.graphed.accumulates = self.trainer.accumulate_grad_batches > 1
        if self._restored_means:  # the run is resumed within an epoch
            self.means.load_state_dict(self._restored_means[rank()], self.device)
            self._restored_means = []

    def on_train_epoch_start(self) -> None:
        self.means.reset()
        self.driver.start_epoch(self.current_epoch, self._own_loader())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        inputs, target = batch
        loop = self.trainer.fit_loop.epoch_loop
        batches = None if math.isinf(self.trainer.num_training_batches) else int(self.trainer.num_training_batches)
        updates = self.driver.updates(inputs, target, self.current_epoch, loop.batch_progress.current.ready - 1, batches)
        if self.automatic_optimization:
            update = next(updates)
            self._watch(inputs, target, update)
            self.means.update(update.output, target)
            return loss_of(update)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        for update in updates:
            self._watch(inputs, target, update)
            optimizer.zero_grad()
            self.manual_backward(loss_of(update))
            with self.driver.scaled_rates(optimizer.optimizer):
                optimizer.step()  # Lightning calls on_before_optimizer_step within
        self.means.update(update.output, target)
        return None

    def _watch(self, inputs: Mapping[str, Input], target: Tensor, update: Update) -> None:
        self.guard.watch(self.batches - 1, inputs, self.driver.features, update.output, target)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Lightning calls this after gradients are reduced and unscaled, before they are clipped."""
        self.driver.modulate()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        with self.driver.scaled_rates(getattr(optimizer, "optimizer", optimizer)):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_train_epoch_end(self) -> None:
        self.guard.look()
        self.log_dict(self.train_metrics())
        self.means.reset()
        if not self.automatic_optimization and self._configured is not None and self._configured.scheduler is not None:
            self._configured.scheduler.step()

    def train_metrics(self, *, joint: bool = True) -> dict[str, Tensor]:
        """Metrics of the epoch so far: over all processes, which must all call this, or if not `joint` over this one alone."""
        return self.means.compute(self.fusion.state_measures(), joint=joint)

    def _own_loader(self) -> Any:
        """A separate loader of the training split for `Rule.start_epoch`; None if the rule does not override that hook."""
        data = getattr(self.trainer, "datamodule", None)
        asked = type(self.rule).start_epoch is not Rule.start_epoch
        return data.rule_dataloader(self.current_epoch) if asked and isinstance(data, MultimodalData) else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this before it writes a checkpoint: an error here leaves the previous file untouched."""
        self.guard.look()
        check_state(self, self.batches)
        checkpoint["epoch_means"] = gathered(self.means.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this before it loads the state.

        Raises:
            InputError: the checkpoint belongs to a model with other settings, or to another module.
        """
        settings = checkpoint.get("hyper_parameters", {})
        settings = {"classes": None, **settings}
        if not settings.keys() >= self.structure.keys():
            named = ", ".join(map(str, checkpoint.get("hyper_parameters", {})))
            what = f"its settings are {named}" if named else "it has no settings"
            raise InputError(f"the checkpoint is not of a FusionClassifier: {what}")
        for name, here in self.structure.items():
            if settings[name] != here and name == "classes":
                there, ours = (listed(names or numbered(self.structure["num_classes"])) for names in (settings[name], here))
                raise InputError(f"the checkpoint is of a model of the classes {there}, this one is of {ours}")
            if settings[name] != here:
                raise InputError(f"the checkpoint is of a model with {name} {settings[name]!r}, this one has {here!r}")
        self._restored_counts = {
            name: len(checkpoint[name]) for name in ("optimizer_states", "lr_schedulers") if name in checkpoint
        }
        means = checkpoint.get("epoch_means", [])
        self._restored_means = means if len(means) == world_size() else []
        for state in self._restored_means:
            EpochMeans().load_state_dict(state, torch.device("cpu"))  # which checks it, before anything is restored

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `torch.nn.Module.load_state_dict`.

        Raises:
            InputError: the state does not fit the model; the message names the parameters and shapes that differ, or one whose
                numbers are of another kind.
        """
        for name, here in self.state_dict().items():
            given = state_dict.get(name)
            if isinstance(given, Tensor) and _kind(given) != _kind(here):
                raise InputError(f"the checkpoint's weights {name}: expected {here.dtype}, got {given.dtype}")
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            hint = "if encoders of the saved model were replaced, replace them in this model in the same way"
            raise InputError(
                f"the checkpoint's weights do not fit the model: {' '.join(str(error).split())}; {hint}"
            ) from error

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.rule, self.modality_options)
        optimizer = make_optimizer(groups, self.optimizer_settings)
        epochs = self.trainer.max_epochs
        epochs = None if epochs is None or epochs < 1 else epochs  # unknown in a run bounded by steps or time
        settings = self.scheduler_settings
        scheduler = None if settings is None else make_scheduler(optimizer, settings, epochs)
        self._configured = Configured(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        monitor = {"monitor": "val_loss"} if isinstance(scheduler, ReduceLROnPlateau) else {}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **monitor}}

    # evaluation

    def on_validation_start(self) -> None:
        if isinstance(self, FSDPModule):  # FSDP2 does not synchronise buffers; checkpoints hold those of rank 0
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
        self.evaluation_guard.place = f"training batch {self.batches}, validation batch"

    def on_test_start(self) -> None:
        self.evaluation_guard.place = "test batch"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.val_metrics, batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        values = self._log_metrics("val", self.val_metrics)
        if not self.trainer.sanity_checking and self.trainer.is_last_batch:
            found = {m: float(values[f"accuracy_{m}"]) for m in self.rule.modalities if f"accuracy_{m}" in values}
            self.rule.end_epoch(found)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.test_metrics, batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics)

    def _evaluate(self, metrics: EpochMetrics, batch: Batch, batch_idx: int) -> None:
        inputs, target = batch
        features, output = self.model.with_features(inputs, target)
        output = self.driver.predicted(output)
        if len(target):  # a process may have no rows of a split's last batch
            self.evaluation_guard.watch(batch_idx, inputs, features, output, target)
        metrics.update(output, target)

    def _log_metrics(self, stage: str, metrics: EpochMetrics) -> dict[str, Tensor]:
        self.evaluation_guard.look()
        values = metrics.compute()
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()})
        metrics.reset()
        return values

    def on_predict_start(self) -> None:
        self.evaluation_guard.place = "predicted batch"

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """probability (B, C) and target (B,): what `iprm predict` writes."""
        inputs, target = batch
        features, output = self.model.with_features(inputs)
        output = self.driver.predicted(output)
        self.evaluation_guard.watch(batch_idx, inputs, features, output)
        return {"probability": output.logits.float().softmax(1), "target": target}

    def on_predict_epoch_end(self) -> None:
        self.evaluation_guard.look()


def _kind(x: Tensor) -> tuple[bool, bool]:
    return x.is_floating_point(), x.is_complex()


def _class_names(classes: Sequence[str] | None, num_classes: int) -> list[str] | None:
    """Names of the classes as a checkpoint holds them: None for their indices.

    Raises:
        InputError: they are not `num_classes` different names.
    """
    if classes is None:
        return None
    names = list(map(str, classes))
    if len(names) != num_classes or len(set(names)) != len(names):
        raise InputError(f"classes: expected {num_classes} different names, got {len(names)}: {listed(names)}")
    return None if tuple(names) == numbered(num_classes) else names


def _modality_options(
    options: Mapping[str, Mapping[str, Any]], modalities: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, bool | int]]:
    """Parameter group entries and `freeze` values by modality. Modalities that the method does not read are left out.

    Raises:
        InputError: an unknown option, or a value out of range.
    """
    groups: dict[str, dict[str, Any]] = {}
    freeze = {}
    for modality, given in options.items():
        for name, value in given.items():
            if name not in ("lr_scale", "weight_decay", "freeze"):
                raise InputError(unknown(f"option of modality {modality!r}", name, ("lr_scale", "weight_decay", "freeze")))
            if name != "freeze":
                check_number(f"{name} of modality {modality!r}", value)
        if modality in modalities:
            freeze[modality] = given.get("freeze", False)
            if entries := {name: value for name, value in given.items() if name != "freeze"}:
                groups[modality] = entries
    return groups, freeze
