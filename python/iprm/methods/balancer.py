"""`Balancer`: any method in a custom training loop, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from iprm.distributed import process_group, world_size
from iprm.encoders.description import Input
from iprm.errors import InputError, check_whole
from iprm.fusion.model import FusionModel
from iprm.fusion.output import FusionOutput

from . import build
from .driver import Driver, loss_of
from .rule import VALIDATION

SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)


class Balancer:
    """Trains encoders with a method, in a custom training loop::

        b = iprm.Balancer({"audio": a, "image": i}, 512, num_classes=31, method="ogm-ge", epochs=50)
        for epoch in range(50):
            b.start_epoch(epoch, loader)
            for inputs, target in loader:
                out = b.step(inputs, target)
            b.end_epoch({"audio": 0.61, "image": 0.43})  # validation accuracies, for methods that need them
        b.model(inputs).logits

    If torch.distributed is initialised, gradients are averaged over the processes before the method modifies them: losses and
    statistics are those of the joint batch. `iprm.training.classifier.FusionClassifier` uses the same rules: from the same
    weights, batches and optimiser, both give bit-identical results.

    Args:
        encoders: modality -> module (B, ...) -> (B, D). Their order is that of the modalities.
        feature_dim: width D of all features, or a mapping modality -> width.
        num_classes: C.
        method: a key of `iprm.methods.METHODS`, or "unimodal-<modality>".
        optimizer: parameter groups -> Optimizer. Each group has a ``name``; there is one group unless the method needs more.
        epochs: number of epochs, for methods whose documentation mentions it.
        steps_per_epoch: batches per epoch, for methods with a schedule within an epoch.
        freeze: modality -> True, or the number of first epochs in which its encoder is not trained.
        scaler: a `torch.amp.GradScaler`, for float16: losses are scaled, and gradients unscaled before the method modifies
            them. The scaler skips steps with non-finite gradients.
        accumulate: batches per optimiser step; their losses are averaged.
        clip: largest total norm of the gradients, applied after the method has modified them; None for no clipping.
        options: options of the method.

    Attributes:
        model: `FusionModel`; its parameters are ``encoders.<modality>.*`` and ``fusion.*``.
        rule: the method's `Rule`.
        optimizer: the optimiser; give it a learning rate scheduler as usual.

    Raises:
        InputError, TypeError, ValueError: an invalid method, option or argument, which the message names.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        feature_dim: int | Mapping[str, int],
        num_classes: int,
        method: str = "iprm",
        *,
        optimizer: Callable[..., Optimizer] = SGD,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        freeze: Mapping[str, bool | int] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        **options: Any,
    ) -> None:
        accumulate = check_whole("accumulate", accumulate, 1)
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.scaler, self.accumulate, self.clip = scaler, accumulate, clip
        fusion, self.rule = build(method, feature_dim, num_classes, tuple(encoders), **options)
        self.model = FusionModel(encoders, fusion)
        device = next(self.model.parameters()).device
        self.model.to(device)
        self.rule.to(device)
        self.driver = Driver(self.model, self.rule, freeze=freeze)
        self.model.register_forward_hook(self._predict)
        self.optimizer = optimizer(parameter_groups(self.model, self.rule))
        self.epoch = self.batch = self._pending = 0
        self._accuracies_due = VALIDATION in self.rule.needs

    def start_epoch(self, epoch: int, loader: Any = None) -> None:
        """Runs the method's computation before an epoch. Call it before the first batch.

        Args:
            epoch: number of the epoch that begins, from 0.
            loader: yields (inputs, target) of the training split, for methods that need it. It is iterated separately.
        """
        self.epoch, self.batch = epoch, 0
        self.model.train()
        self.driver.start_epoch(epoch, loader)

    def step(self, inputs: Mapping[str, Input], target: Tensor) -> FusionOutput:
        """Trains on one batch. The parameters are updated at every `accumulate`-th batch.

        Args:
            inputs: modality -> (B, ...).
            target: (B,) class indices; -100 excludes a row from losses and statistics.

        Returns:
            The output of the forward pass that the loss was computed from.
        """
        self._pending += 1
        due = self._pending == self.accumulate
        output: FusionOutput | None = None
        for update in self.driver.updates(inputs, target, self.epoch, self.batch, self.steps_per_epoch):
            output = update.output
            loss = loss_of(update) / self.accumulate
            (self.scaler.scale(loss) if self.scaler else loss).backward()
            if due:
                self._update()
        if output is None:
            raise RuntimeError(f"{type(self.rule).__name__}: the rule gave no update for this batch")
        self.batch += 1
        self._pending %= self.accumulate
        return output

    def end_epoch(self, accuracies: Mapping[str, float] | None = None) -> None:
        """Passes validation accuracies, from 0 to 1, of each modality's own head (``out.logits_by``) to the method.

        Raises:
            InputError: the method needs them, and one is missing.
        """
        if self._accuracies_due:
            missing = [modality for modality in self.rule.modalities if modality not in (accuracies or {})]
            if missing:
                raise InputError(f"accuracies: this method needs the validation accuracy of {', '.join(missing)}")
        if accuracies is not None:
            self.rule.end_epoch(accuracies)

    def state_dict(self) -> dict[str, Any]:
        """State of model, rule, optimiser, scaler and run, as tensors and plain values. Only between optimiser steps."""
        if self._pending:
            raise RuntimeError("state_dict: gradients are being accumulated; save after an optimiser step")
        return {
            "model": self.model.state_dict(),
            "rule": self.rule.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "place": {"epoch": self.epoch, "batch": self.batch},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`. Training resumes bit-identically."""
        self.model.load_state_dict(state["model"])
        self.rule.load_state_dict(state["rule"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch = state["place"]["epoch"], state["place"]["batch"]

    def _update(self) -> None:
        _average_gradients(self.model)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        self.driver.modulate()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        with self.driver.scaled_rates(self.optimizer):
            if self.scaler:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        self.optimizer.zero_grad()

    def _predict(self, model: nn.Module, _: Any, output: FusionOutput) -> FusionOutput:
        return output if model.training else self.driver.predicted(output)


def parameter_groups(model: FusionModel, rule: nn.Module, settings: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Parameter groups for the optimiser, in the order of the model's parameters.

    Args:
        model: encoders and fusion module.
        rule: a `Rule`, which defines groups and may have parameters.
        settings: modality -> entries for the group of its encoder, such as {"weight_decay": 0}.

    Returns:
        One group "all", or one per name in `Rule.groups` or `settings`, and "rest" for the parameters in none of them
        ("_rest" if a modality has that name).
    """
    groups = {name: list(parameters) for name, parameters in rule.groups(model).items()}  # type: ignore[operator]
    for modality in settings or {}:
        groups.setdefault(modality, list(model.encoders[modality].parameters()))
    placed = {id(parameter) for parameters in groups.values() for parameter in parameters}
    every = [*model.parameters(), *rule.parameters()]
    rest = [parameter for parameter in every if id(parameter) not in placed]
    name = "rest" if groups else "all"
    while name in groups:
        name = f"_{name}"
    named = [*groups.items(), (name, rest)]
    return [{"params": params, "name": name, **(settings or {}).get(name, {})} for name, params in named if params]


@torch.no_grad()
def _average_gradients(model: nn.Module) -> None:
    """Averages gradients over the processes, with one all-reduce per dtype. Does nothing in a single process."""
    if process_group() is None:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in same])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, part in zip(same, flat.split([gradient.numel() for gradient in same]), strict=True):
            gradient.copy_(part.view_as(gradient))
