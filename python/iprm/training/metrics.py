"""Metrics over an epoch. Values stay on the device until the epoch ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from iprm.distributed import process_group, world_size
from iprm.errors import InputError
from iprm.fusion.module import IGNORE_INDEX
from iprm.fusion.output import FusionOutput
from iprm_kernels.collectives import all_reduce_sum

from .class_metrics import macro_f1, mean_average_precision


def stacked_logits(output: FusionOutput) -> Tensor:
    """The prediction, then every head's logits.  (1 + H, B, C)"""
    return torch.stack([output.logits.detach(), *(logits.detach() for logits in output.logits_by.values())])


def loss_of(output: FusionOutput) -> Tensor:
    """The loss () of an output that was given a target, without its graph."""
    if output.loss is None:
        raise TypeError("output: expected one with a loss; the fusion module was called without a target")
    return output.loss.detach()


class EpochMetrics(Metric):
    """Loss, accuracy, macro-F1, mean average precision over classes, and the accuracy of every head, of a whole split.

    Rows labelled -100 are left out. Probabilities (N, C) are stored until the end, when each metric is computed once: updating
    three metrics at every step costs more than the step of a small model. Rows are gathered from all processes, so the values
    equal those of a single process. Without a labelled row, every value is NaN.
    """

    full_state_update = False
    probability: list[Tensor]
    prediction: list[Tensor]
    target: list[Tensor]
    losses: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.heads: tuple[str, ...] = ()
        for name in ("probability", "prediction", "target", "losses"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, output: FusionOutput, target: Tensor) -> None:
        """Stores one batch: logits and loss of `output`, target (B,)."""
        self.heads = tuple(output.logits_by)
        self.probability.append(output.logits.detach().float().softmax(1))
        self.prediction.append(stacked_logits(output).argmax(2).T)  # (B, 1 + H): the prediction, and that of every head
        self.target.append(target)
        self.losses.append(loss_of(output).float().expand(len(target)))

    def compute(self) -> dict[str, Tensor]:
        """loss, accuracy, macro_f1, map and accuracy_<head>: 0-d tensors."""
        target = dim_zero_cat(self.target)
        labelled = target != IGNORE_INDEX
        states = (self.probability, self.prediction, self.target, self.losses)
        every = bool(labelled.all())  # then nothing is copied
        probability, prediction, target, losses = (x if every else x[labelled] for x in map(dim_zero_cat, states))
        accuracy, *accuracies = (prediction == target[:, None]).float().mean(0).unbind()
        return {
            "loss": losses.mean(),
            "accuracy": accuracy,
            "macro_f1": macro_f1(prediction[:, 0], target, probability.shape[1]),
            "map": mean_average_precision(probability, target),
            **{f"accuracy_{head}": value for head, value in zip(self.heads, accuracies, strict=True)},
        }


class EpochMeans:
    """Running means of a training epoch, in a few small operations per step. Losses and accuracies are means over the rows of
    all processes that have a label; measures, which are equal on all processes, are means over the steps that reported them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.rows: list[Tensor] = []  # () per step: rows with a label
        self.losses: list[Tensor] = []  # (1 + L,) per step
        self.loss_heads: list[str] = []
        self.heads: list[str] = []
        self.correct: Tensor | None = None  # (1 + H,), counts
        self.measured: dict[str, list[Any]] = {}  # names, joined by a line feed -> sums (K,) and the number of steps

    def state_dict(self) -> dict[str, Any]:
        """The means so far, in tensors and plain values."""
        state = {**vars(self), **{name: _stacked(getattr(self, name)) for name in ("rows", "losses")}}
        state["measured"] = {names: [sums.cpu(), steps] for names, (sums, steps) in self.measured.items()}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continues from what `state_dict` returned.

        Raises:
            InputError: `state` is something else.
        """
        known, count = EpochMeans().state_dict().keys(), len(state["rows"])
        heads, losses = ([*state[name]] for name in ("heads", "loss_heads"))
        shapes = {"rows": (count,), "losses": (count, 1 + len(losses)), "correct": (1 + len(heads),)}
        fits = all(state[name].shape == shape for name, shape in shapes.items()) if count else state["correct"] is None
        if state.keys() != known or not fits or not all(type(name) is str for name in (*heads, *losses, *state["measured"])):
            raise InputError("the checkpoint's means of an epoch are damaged")
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)
        self.rows, self.losses = (list(state[name].to(device)) for name in ("rows", "losses"))
        self.measured = {names: [sums.to(device), steps] for names, (sums, steps) in state["measured"].items()}

    def update(self, output: FusionOutput, target: Tensor) -> None:
        """Adds one batch: `output` with a loss, target (B,)."""
        self.rows.append((target != IGNORE_INDEX).sum())
        self.losses.append(torch.stack([loss_of(output), *(loss.detach() for loss in output.losses_by.values())]))
        self.loss_heads, self.heads = list(output.losses_by), list(output.logits_by)
        correct = (stacked_logits(output).argmax(2) == target).sum(1)
        self.correct = correct if self.correct is None else self.correct + correct
        if output.measures:
            sums = torch.stack([value.detach() for value in output.measures.values()])
            total = self.measured.setdefault("\n".join(output.measures), [torch.zeros_like(sums), 0])
            total[0], total[1] = total[0] + sums, total[1] + 1

    def compute(self, state_measures: Mapping[str, Tensor], *, joint: bool = True) -> dict[str, Tensor]:
        """train_loss, train_loss_<head>, train_accuracy, train_accuracy_<head>; each measure by its own name.

        Args:
            state_measures: name -> (), logged unchanged: the result of `FusionModule.state_measures`.
            joint: over the rows of all processes, each of which must call this; else over this process's rows.
        """
        if self.correct is None:
            return {}
        group, processes = (process_group(), world_size()) if joint else (None, 1)
        # each loss is scaled by the process's share of rows: see `joint_sums`
        losses = all_reduce_sum(torch.stack(self.losses), group) / processes
        rows = all_reduce_sum(torch.stack(self.rows), group)
        correct = all_reduce_sum(self.correct.clone(), group)
        weighted = torch.where(rows[:, None] > 0, losses * rows[:, None], 0)  # the loss of no row is NaN
        means = weighted.sum(0) / rows.sum()
        values = dict(zip(_named("train_loss", self.loss_heads), means, strict=True))
        values |= zip(_named("train_accuracy", self.heads), correct / rows.sum(), strict=True)
        values |= state_measures
        for names, (sums, steps) in self.measured.items():
            values |= zip(names.split("\n"), sums / steps, strict=True)
        return {name: value.detach().clone().float() for name, value in values.items()}


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if tensors else torch.empty(0)


def _named(quantity: str, heads: Sequence[str]) -> list[str]:
    return [quantity, *(f"{quantity}_{head}" for head in heads)]
