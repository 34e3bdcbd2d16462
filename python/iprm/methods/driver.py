"""Drives a rule batch by batch: the code shared by `Balancer` and the Lightning module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from iprm.encoders.description import Input
from iprm.errors import InputError, plain_values
from iprm.fusion.model import FusionModel
from iprm.fusion.output import FusionOutput

from .gradients import Gradients
from .rule import Epoch, Rule, Step, Update


class Driver:
    """Calls the hooks of a rule around the caller's forward pass, backward pass and optimiser step.

    Args:
        model: encoders and fusion module.
        rule: the training rule.
        run: (inputs, target) -> (features, output), called by `Step.forward`; by default the model's `with_features`.
        freeze: modality -> True for an encoder that is never trained, or the number of first epochs in which it is frozen.
            A frozen encoder keeps its batch statistics, and momentum and weight decay do not change its parameters.

    Raises:
        InputError: `freeze` names an unknown modality, or a value is neither a bool nor a number of epochs from 0 up.
    """

    def __init__(self, model: FusionModel, rule: Rule, run: Any = None, freeze: Mapping[str, bool | int] | None = None) -> None:
        self.model, self.rule, self.run = model, rule, run or model.with_features
        self.freeze = {modality: value for modality, value in plain_values(dict(freeze or {})).items() if value is not False}
        for modality, epochs in self.freeze.items():
            if modality not in model.encoders:
                raise InputError(f"freeze: expected a modality of {', '.join(model.encoders)}, got {modality!r}")
            if not isinstance(epochs, int) or epochs < 0:
                raise InputError(f"freeze of {modality!r}: expected true, or a number of epochs from 0 up, got {epochs!r}")
            if epochs is True:
                model.encoders[modality].requires_grad_(False)
        self._step: Step | None = None
        self._update: Update | None = None

    def start_epoch(self, epoch: int, loader: Any = None) -> None:
        self.rule.start_epoch(Epoch(epoch, self.model, loader))

    def updates(
        self, inputs: Mapping[str, Input], target: Tensor, epoch: int, batch: int, batches: int | None
    ) -> Iterator[Update]:
        """Yields the updates of one batch. Before requesting the next one, the caller differentiates `loss_of(update)`, calls
        `modulate`, and runs the optimiser step inside `scaled_rates`."""
        for modality in self.freeze:
            self.model.encoders[modality].train(not self._frozen(modality, epoch))
        self._step = Step(self.model, inputs, target, epoch, batch, batches, self.run)
        for update in self.rule.updates(self._step):
            self._update = update
            yield update

    @property
    def features(self) -> dict[str, Tensor]:
        """modality -> (B, D) of the last forward pass."""
        assert self._step is not None
        return self._step.features

    def modulate(self) -> None:
        """Call after gradients are reduced and unscaled, before they are clipped."""
        assert self._step is not None
        assert self._update is not None
        trains, frozen = self._update.trains, [m for m in self.freeze if self._frozen(m, self._step.epoch)]
        if trains is not None:
            _drop_gradients(parameter for name, parameter in self.model.named_parameters() if not trains(name))
        for modality in frozen:
            _drop_gradients(self.model.encoders[modality].parameters())
        self.rule.modulate(Gradients(self.model), self._step)

    @contextmanager
    def scaled_rates(self, optimizer: Optimizer) -> Iterator[None]:
        """Multiplies the learning rates of the rule's groups by `Rule.rates` in the context, and restores them afterwards."""
        factors = self.rule.rates()
        scaled = [(group, group["lr"]) for group in optimizer.param_groups if group.get("name") in factors]
        for group, rate in scaled:
            group["lr"] = rate * factors[group["name"]]
        try:
            yield
        finally:
            for group, rate in scaled:
                group["lr"] = rate

    def predicted(self, output: FusionOutput) -> FusionOutput:
        """Replaces the logits of an evaluation output by the prediction of the rule."""
        return output._replace(logits=self.rule.predict(output))

    def _frozen(self, modality: str, epoch: int) -> bool:
        epochs = self.freeze[modality]
        return epochs is True or epoch < epochs


def loss_of(update: Update) -> Tensor:
    """The loss () of an update, with its graph."""
    loss = update.output.loss if update.loss is None else update.loss
    if loss is None:
        raise TypeError("target: a training step needs labels, got None")
    return loss


def _drop_gradients(parameters: Any) -> None:
    parameter: nn.Parameter
    for parameter in parameters:
        parameter.grad = None
