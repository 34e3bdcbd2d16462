"""MSLR: one learning rate per modality, constant or adapted to its validation accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from iprm.errors import check_choice
from iprm.fusion.model import FusionModel
from iprm_kernels.arguments import real_number

from .rule import VALIDATION, Rule, Step, Update

#: Epochs in the average of accuracies, and between two changes of the cumulative form.
EPOCHS = 5


class MSLR(Rule):
    r"""Modality-specific learning rates: the rate of modality m is ``factor_m`` times that of the schedule, with ``acc_m`` the
    validation accuracy of its own head after an epoch::

        keep        factor_m = initial_m
        window      factor_m = initial_m · acc_m / mean(acc_m of the 5 epochs before this one);  initial_m until there are 5
        cumulative  after every 5th epoch:  factor_m <- factor_m · acc_m / mean(acc_m of the last 5 epochs, this one included)

    The rate applies to a modality's encoder and own head; in the cumulative form to the encoder only. The factor multiplies the
    learning rate, not the gradient: weight decay that the optimiser adds to the gradient is scaled too, momentum is not. If the
    mean accuracy is 0, the factor does not change.

    Args:
        schedule: "window", "keep" or "cumulative".
        initial: modality -> initial_m, above 0; 1 by default. The AGM authors' runs: CREMA-D audio 0.9, visual 1.1.

    Measures: ``rate_<modality>``, its factor.

    Buffers: ``factor`` (M,), ``history`` (M, 5) of accuracies, newest last, ``epochs`` ().

    Source: Yao, Mihalcea, "Modality-specific Learning Rates for Effective Multimodal Additive Late-fusion", Findings of ACL
    2022. The paper's own formula was not available: "window" follows the AGM authors' code, "cumulative" that of AMST.
    """

    factor: Tensor
    history: Tensor
    epochs: Tensor

    def __init__(
        self, modalities: Sequence[str], *, schedule: str = "window", initial: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(modalities)
        check_choice("schedule", schedule, ("window", "keep", "cumulative"))
        initial = dict(initial or {})
        for modality, value in initial.items():
            if modality not in self.modalities:
                raise ValueError(f"initial: expected a modality of {', '.join(self.modalities)}, got {modality!r}")
            number = real_number(value)
            if number is None or not 0 < number < math.inf:
                raise ValueError(f"initial of {modality!r}: expected a number above 0, got {value!r}")
        self.schedule = schedule
        self.needs = frozenset() if schedule == "keep" else frozenset({VALIDATION})
        self.initial = [float(initial.get(modality, 1.0)) for modality in self.modalities]
        self._rates = list(self.initial)  # the factors: reading the buffer would synchronise with a GPU
        self.register_buffer("factor", torch.tensor(self.initial, dtype=torch.float64))
        self.register_buffer("history", torch.zeros(len(self.modalities), EPOCHS, dtype=torch.float64))
        self.register_buffer("epochs", torch.tensor(0, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_read_back)

    def groups(self, model: FusionModel) -> dict[str, list[nn.Parameter]]:
        groups = {modality: list(model.encoders[modality].parameters()) for modality in self.modalities}
        if self.schedule != "cumulative":
            heads = model.fusion.heads
            assert isinstance(heads, nn.ModuleDict)
            for modality, parameters in groups.items():
                parameters += heads[modality].parameters()
        return groups

    def updates(self, step: Step) -> Iterator[Update]:
        output = step.forward()
        measures = {f"rate_{m}": factor for m, factor in zip(self.modalities, self.factor.clone().unbind(), strict=True)}
        yield Update(output._replace(measures=output.measures | measures))

    def rates(self) -> dict[str, float]:
        return dict(zip(self.modalities, self._rates, strict=True))

    def end_epoch(self, accuracies: Mapping[str, float]) -> None:
        if self.schedule == "keep":
            return
        accuracy = torch.tensor([float(accuracies[modality]) for modality in self.modalities], dtype=torch.float64)
        factor, history, epochs = self.factor.cpu(), self.history.cpu(), int(self.epochs)
        newest = torch.cat([history[:, 1:], accuracy[:, None]], 1)
        if self.schedule == "window" and epochs >= EPOCHS:
            factor = torch.tensor(self.initial, dtype=torch.float64) * _ratio(accuracy, history)
        if self.schedule == "cumulative" and (epochs + 1) % EPOCHS == 0:
            factor = factor * _ratio(accuracy, newest)
        self.factor.copy_(factor)
        self.history.copy_(newest)
        self.epochs += 1
        self._rates = factor.tolist()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MSLR:
        exact = {"factor": self.factor, "history": self.history}  # stay in float64 in a module of a narrower dtype
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self


def _ratio(accuracy: Tensor, history: Tensor) -> Tensor:
    """acc_m / mean(history_m), or 1 if that mean is 0.  (M,), (M, 5) -> (M,)"""
    mean = history.mean(1)
    return torch.where(mean > 0, accuracy / mean, torch.ones_like(mean))


def _read_back(module: nn.Module, _: object) -> None:
    """Load hook: sets the rates from the restored factors."""
    assert isinstance(module, MSLR)
    module._rates = module.factor.tolist()
