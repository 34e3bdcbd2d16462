"""Training rules for tests: each uses one feature of the rule interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from iprm.fusion.late import Sum
from iprm.fusion.output import FusionOutput
from iprm.methods import METHODS, Entry, Rule
from iprm.methods.rule import SEVERAL_UPDATES, Epoch, Step, Update
from torch import Tensor


class Alternating(Rule):
    """One update per modality and batch, of its encoder and head by its own loss."""

    needs = frozenset({SEVERAL_UPDATES})

    def updates(self, step: Step) -> Iterator[Update]:
        for modality in self.modalities:
            output = step.forward()
            own = torch.nn.functional.cross_entropy(output.logits_by[modality], step.target)
            yield Update(output, own, trains=lambda name, modality=modality: f".{modality}." in name)


class Counting(Rule):
    """Counts the rows of the loader between epochs, and records the accuracies after them."""

    seen: Tensor
    told: Tensor

    def __init__(self, modalities) -> None:
        super().__init__(modalities)
        self.register_buffer("seen", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("told", torch.zeros(0, dtype=torch.float64))

    def start_epoch(self, epoch: Epoch) -> None:
        rows = sum(len(target) for _, target in epoch.loader)
        self.seen = torch.cat([self.seen, torch.tensor([rows])])

    def end_epoch(self, accuracies: Mapping[str, float]) -> None:
        self.told = torch.cat([self.told, torch.tensor([accuracies["audio"]], dtype=torch.float64)])


class Audio(Rule):
    """Predicts by the head of audio alone."""

    def predict(self, output: FusionOutput) -> Tensor:
        return output.logits_by["audio"]


RULES = {"alternating": Alternating, "counting": Counting, "by-audio": Audio}


def register(monkeypatch) -> None:
    """Registers these rules as methods, with sum fusion."""
    for name, rule in RULES.items():
        monkeypatch.setitem(METHODS, name, Entry({"sum": Sum}, rule))
