"""Training rules: what a method does besides its loss. The default rule is plain training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from iprm.encoders.description import Input
from iprm.fusion.model import FusionModel
from iprm.fusion.output import FusionOutput

from .gradients import Gradients

#: Requirements that a rule may list in `Rule.needs`, worded to complete "needs ..." in error messages.
GRADIENTS = "the whole gradient of every parameter"
SEVERAL_UPDATES = "several updates per batch"
VALIDATION = "validation accuracies after every epoch"


@dataclass
class Step:
    """One training batch, as passed to a rule.

    Attributes:
        model: encoders and fusion module.
        inputs: modality -> (B, ...).
        target: (B,) class indices; rows labelled -100 enter no loss and no statistic.
        epoch: from 0.
        batch: number of the batch within the epoch, from 0.
        batches: number of batches in the epoch; None if unknown.
        features: modality -> (B, D), with their graph, from the last call of `forward`.
    """

    model: FusionModel
    inputs: Mapping[str, Input]
    target: Tensor
    epoch: int
    batch: int
    batches: int | None
    run: Callable[[Mapping[str, Input], Tensor], tuple[dict[str, Tensor], FusionOutput]]
    features: dict[str, Tensor] = field(default_factory=dict)

    def forward(self) -> FusionOutput:
        """Encoders and fusion module on this batch, with the graph for `Update.loss`."""
        self.features, output = self.run(self.inputs, self.target)
        return output


@dataclass
class Update:
    """One update of the parameters.

    Attributes:
        output: result of the forward pass; it is logged.
        loss: () to differentiate; by default the loss of `output`.
        trains: parameter name ("encoders.audio.0.weight", "fusion.head.bias") -> whether the parameter is updated. Gradients of
            other parameters are set to None, so that momentum and weight decay do not change them. None: all are updated.
    """

    output: FusionOutput
    loss: Tensor | None = None
    trains: Callable[[str], bool] | None = None


@dataclass
class Epoch:
    """Argument of `Rule.start_epoch`.

    Attributes:
        epoch: number of the epoch that begins, from 0.
        model: encoders and fusion module.
        loader: yields (inputs, target) of the training split, in its own order; None if none was given.
    """

    epoch: int
    model: FusionModel
    loader: Any = None


class Rule(nn.Module):
    """Training rule of encoders and fusion module. A subclass overrides the hooks that its method changes.

    A rule is a module, so its buffers are saved, moved and restored with the model. Its keyword arguments are options of the
    method. Both of its drivers, `iprm.Balancer` and `iprm.training.classifier.FusionClassifier`, keep this order for each
    update of a batch: forward passes, backward pass, reduction over processes, unscaling of mixed precision, `modulate`,
    clipping, the optimiser's step. Under gradient accumulation `updates` runs once per batch, `modulate` once per step.

    Args:
        modalities: modalities of the fusion module, in its order.
    """

    #: Subset of {`GRADIENTS`, `SEVERAL_UPDATES`, `VALIDATION`}; a trainer that does not support one raises an error.
    needs: frozenset[str] = frozenset()

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__()
        self.modalities = tuple(modalities)

    def groups(self, model: FusionModel) -> dict[str, list[nn.Parameter]]:
        """Parameter groups by name, for `rates`. All other parameters form one further group."""
        return {}

    def rates(self) -> dict[str, float]:
        """Group -> factor of its scheduled learning rate; 1 for groups not named."""
        return {}

    def start_epoch(self, epoch: Epoch) -> None:
        """Called before the first batch of an epoch, with the model in training mode."""

    def updates(self, step: Step) -> Iterator[Update]:
        """Yields the updates of one batch. Code after a ``yield`` runs after that update of the parameters."""
        yield Update(step.forward())

    def modulate(self, gradients: Gradients, step: Step) -> None:
        """Called with the gradients of an update: reduced, unscaled, not yet clipped. May modify them in place."""

    def end_epoch(self, accuracies: Mapping[str, float]) -> None:
        """Called after each validated epoch with the accuracy, from 0 to 1, of each modality's own head."""

    def predict(self, output: FusionOutput) -> Tensor:
        """The prediction (B, C) from an output in evaluation mode."""
        return output.logits
