"""Training rules: what a method does beside its loss. The default rule trains as any classifier is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from iprm.encoders.description import Input
from iprm.fusion.model import FusionModel
from iprm.fusion.output import FusionOutput

from .gradients import Gradients

#: What a rule may ask of whoever drives it, in `Rule.needs`; the words complete "needs ...".
GRADIENTS = "the whole gradient of every parameter"
SEVERAL_UPDATES = "several updates per batch"
VALIDATION = "validation accuracies after every epoch"


@dataclass
class Step:
    """One training batch, as a rule sees it.

    Attributes:
        model: encoders and fusion module.
        inputs: modality -> (B, ...).
        target: (B,) class indices; rows labelled -100 enter no loss and no statistic.
        epoch: from 0.
        batch: number of the batch within the epoch, from 0.
        batches: how many batches the epoch has; None where that is unknown.
        features: modality -> (B, D), with their graph, of the last `forward`.
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
        output: of the forward pass that is learned from; what is logged.
        loss: () to differentiate; the loss of `output` by default.
        trains: tells by its name ("encoders.audio.0.weight", "fusion.head.bias") whether a parameter takes part. Others keep no
            gradient, so that neither momentum nor weight decay moves them. None: all take part.
    """

    output: FusionOutput
    loss: Tensor | None = None
    trains: Callable[[str], bool] | None = None


@dataclass
class Epoch:
    """What a rule sees between epochs.

    Attributes:
        epoch: the one that begins, from 0.
        model: encoders and fusion module.
        loader: yields (inputs, target) of the training split, in an order of its own; None where none was given.
    """

    epoch: int
    model: FusionModel
    loader: Any = None


class Rule(nn.Module):
    """How encoders and fusion module are trained. A subclass overrides what its paper changes.

    A rule is a module, so that its buffers are saved, moved and resumed with the model. Its keyword arguments are options of
    the method. Both of its drivers, `iprm.Balancer` and `iprm.training.classifier.FusionClassifier`, keep this order for each
    update of a batch: forward passes, backward pass, reduction over processes, unscaling of mixed precision, `modulate`,
    clipping, the optimiser's step. Under gradient accumulation `updates` runs once per batch, `modulate` once per step.

    Args:
        modalities: of the fusion module, in its order.
    """

    #: Which of `GRADIENTS`, `SEVERAL_UPDATES`, `VALIDATION` it needs; what cannot serve one refuses the rule by name.
    needs: frozenset[str] = frozenset()

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__()
        self.modalities = tuple(modalities)

    def groups(self, model: FusionModel) -> dict[str, list[nn.Parameter]]:
        """Parameter groups by name, for `rates`; parameters in none of them share one more. Empty: one group for all."""
        return {}

    def rates(self) -> dict[str, float]:
        """Group -> factor of its learning rate, on top of the schedule; groups not named keep theirs."""
        return {}

    def start_epoch(self, epoch: Epoch) -> None:
        """Called before the first batch of an epoch, with the model in training mode."""

    def updates(self, step: Step) -> Iterator[Update]:
        """The updates of one batch. Code after a ``yield`` runs when that update is done."""
        yield Update(step.forward())

    def modulate(self, gradients: Gradients, step: Step) -> None:
        """Called with the gradients of an update: reduced, unscaled, not yet clipped. It may change them in place."""

    def end_epoch(self, accuracies: Mapping[str, float]) -> None:
        """Called after an epoch with the validation accuracy of each modality's head, from 0 to 1, where there was one."""

    def predict(self, output: FusionOutput) -> Tensor:
        """The prediction (B, C) from the output of an evaluation."""
        return output.logits
