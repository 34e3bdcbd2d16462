"""What is measured over an epoch. Values stay on the device until the epoch ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_average_precision, multiclass_f1_score
from torchmetrics.utilities import dim_zero_cat

from iprm.distributed import process_group, world_size
from iprm.fusion.output import FusionOutput
from iprm_kernels.collectives import all_reduce_sum


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

    Logits are kept to the end, when each metric is computed once: updating three metrics at every step costs more than the
    step of a small model. Across processes the rows are gathered, so the values are those of one process.
    """

    full_state_update = False
    logits: list[Tensor]
    target: list[Tensor]
    losses: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.heads: tuple[str, ...] = ()
        for name in ("logits", "target", "losses"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, output: FusionOutput, target: Tensor) -> None:
        """Keeps one batch: logits and loss of `output`, target (B,)."""
        self.heads = tuple(output.logits_by)
        self.logits.append(stacked_logits(output).float().transpose(0, 1))
        self.target.append(target)
        self.losses.append(loss_of(output).float().expand(len(target)))

    def compute(self) -> dict[str, Tensor]:
        """loss, accuracy, macro_f1, map and accuracy_<head>: 0-d tensors."""
        logits, target = dim_zero_cat(self.logits), dim_zero_cat(self.target)
        whole = logits[:, 0]
        options: dict[str, Any] = {"num_classes": self.num_classes, "validate_args": False}
        values = {
            "loss": dim_zero_cat(self.losses).mean(),
            "accuracy": multiclass_accuracy(whole, target, average="micro", **options),
            "macro_f1": multiclass_f1_score(whole, target, average="macro", **options),
            "map": multiclass_average_precision(whole.softmax(1), target, average="macro", **options),
        }
        for head, part in zip(self.heads, logits[:, 1:].unbind(1), strict=True):
            values[f"accuracy_{head}"] = multiclass_accuracy(part, target, average="micro", **options)
        return values


class EpochMeans:
    """Running means of a training epoch, and λ and ω, in a few small operations a step. Across processes they are those of all
    rows."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.rows: list[int] = []  # of each step
        self.losses: list[Tensor] = []  # (), of each step
        self.heads: list[str] = []
        self.correct: Tensor | None = None  # (1 + H,), counts
        self.strength: Tensor | None = None  # (2,) or (P, 2), summed over steps

    def state_dict(self) -> dict[str, Any]:
        """What there is so far, in tensors and plain values."""
        state = {**vars(self), "losses": torch.stack(self.losses) if self.losses else torch.empty(0)}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Goes on from there."""
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)
        self.losses = list(state["losses"].to(device))

    def update(self, output: FusionOutput, target: Tensor) -> None:
        """Adds one batch: `output` with a loss, target (B,)."""
        self.rows.append(len(target))
        self.losses.append(loss_of(output).clone())
        self.heads = list(output.logits_by)
        self.correct = _added(self.correct, (stacked_logits(output).argmax(2) == target).sum(1))
        if output.strength is not None:
            self.strength = _added(self.strength, output.strength.detach().clone())

    def compute(self, modalities: Sequence[str], weight: Tensor | None = None, *, joint: bool = True) -> dict[str, Tensor]:
        """train_loss, train_accuracy, train_accuracy_<head>, and where ω was measured `strength_<modality>` (its mean) and
        `weight`, the λ given here; numbered `weight_0`, `strength_0_first`, ... where there are several pairs.

        Args:
            modalities: in the order of ω.
            weight: () or (P,), λ at the end of the epoch.
            joint: of all processes, which must all call this; else of this one's rows.
        """
        if self.correct is None:
            return {}
        group, processes = (process_group(), world_size()) if joint else (None, 1)
        losses = all_reduce_sum(torch.stack(self.losses), group) / processes  # each process has its share: see `joint_sums`
        rows = all_reduce_sum(torch.tensor(self.rows, device=losses.device), group)
        correct = all_reduce_sum(self.correct.clone(), group)
        values = {"train_loss": (losses * rows).sum() / rows.sum()}
        for name, count in zip(("train_accuracy", *(f"train_accuracy_{h}" for h in self.heads)), correct, strict=True):
            values[name] = count / rows.sum()
        if weight is not None and self.strength is not None:
            strength = self.strength / len(self.rows)
            if weight.dim() == 0:
                values["weight"] = weight
                values |= {f"strength_{modality}": part for modality, part in zip(modalities, strength, strict=True)}
            else:
                values |= {f"weight_{pair}": part for pair, part in enumerate(weight)}
                for pair, (first, second) in enumerate(strength):
                    values |= {f"strength_{pair}_first": first, f"strength_{pair}_second": second}
        return {name: value.detach().clone().float() for name, value in values.items()}


def _added(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value
