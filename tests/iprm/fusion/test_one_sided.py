"""λ that stays at 0 or 1 on three modalities of which two hold no information: the state is reproduced, and what avoids it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from iprm.methods.balancer import Balancer
from torch import nn

ROWS, TRAINED, WIDTHS = 900, 640, {"audio": 74, "text": 300, "video": 47}


class Trained(NamedTuple):
    """λ of audio × text, audio × video and text × video, and accuracies on rows that were not trained on."""

    weight: list[float]
    accuracy: dict[str, float]


def trained(method: str, **options) -> Trained:
    """Six epochs on two classes: `text` separates them with errors, `audio` and `video` are noise, `audio` of small numbers."""
    torch.manual_seed(0)
    target = torch.arange(ROWS) % 2
    inputs = {modality: torch.randn(ROWS, width) for modality, width in WIDTHS.items()}
    inputs["audio"] *= 0.05
    inputs["text"] += 1.5 * nn.functional.normalize(torch.randn(2, WIDTHS["text"]), dim=1)[target]
    encoders = {modality: nn.Sequential(nn.Linear(width, 16), nn.ReLU()) for modality, width in WIDTHS.items()}
    optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    balancer = Balancer(encoders, 16, 2, method=method, optimizer=optimizer, **options)
    rows = torch.randperm(ROWS)
    for epoch in range(6):
        balancer.start_epoch(epoch)
        for batch in rows[:TRAINED].split(64):
            balancer.step({modality: x[batch] for modality, x in inputs.items()}, target[batch])
    balancer.model.eval()
    with torch.no_grad():
        held_out = rows[TRAINED:]
        logits_by = balancer.model({modality: x[held_out] for modality, x in inputs.items()}).logits_by
    accuracy = {head: (x.argmax(1) == target[held_out]).float().mean().item() for head, x in logits_by.items()}
    return Trained(balancer.model.fusion.weight.tolist(), accuracy)


def test_lambda_ends_at_the_modality_of_noise_and_the_mixture_learns_nothing():
    """Near λ = 1 the mixture is `audio`, whose KL from it is then the smallest."""
    found = trained("iprm")
    assert min(found.weight[:2]) > 0.98
    assert found.accuracy["text"] > 0.7
    assert found.accuracy["mix"] < 0.6


def test_lambda_that_stays_at_one_half_avoids_it():
    """The options that the note of a comparison names."""
    found = trained("iprm-one-pass", alpha=1.0, ema_start="released")
    assert found.weight == [0.5, 0.5, 0.5]
    assert found.accuracy["mix"] > 0.7


SLOW = ({"mixup": "linear"}, {"passes": 1}, {"shared_mix_head": True})


@pytest.mark.parametrize("options", [{"alpha": 0.95}, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=str)
def test_other_options_do_not_avoid_it(options):
    found = trained("iprm", **options)
    assert found.weight[0] > 0.95
    assert found.accuracy["mix"] < 0.6
