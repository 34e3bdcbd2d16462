"""Training steps as CUDA graphs: results equal those of the module, and a warning is logged once where no graph can run."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from iprm.fusion.model import FusionModel
from iprm.fusion.probe_rebalance import ProbeRebalance
from iprm.training.cuda_graphs import GraphedStep
from torch import nn


def model(**options) -> FusionModel:
    """Encoders with running statistics, and IPRM."""
    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)) for m in ("sound", "text")}
    return FusionModel(encoders, ProbeRebalance(8, 3, ("sound", "text"), **options))


class Masked(nn.Sequential):
    """Layers on the values of an input with an integer mask."""

    def forward(self, x):
        return super().forward(x["values"] * x["mask"])


def model_of_masks() -> FusionModel:
    """`model`, whose text is a dict of values and a mask, with the same names and weights."""
    plain = model()
    return FusionModel({"sound": plain.encoders["sound"], "text": Masked(*plain.encoders["text"])}, plain.fusion)


def with_masks(step):
    """`step`, called with a mask of ones beside the values of `text`."""

    def call(inputs, target):
        text = {"mask": torch.ones_like(inputs["text"], dtype=torch.int64), "values": inputs["text"]}
        return step({**inputs, "text": text}, target)

    return call


def batch(seed=0, rows=12, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    inputs = {m: torch.randn(rows, 5, generator=generator).to(device) for m in ("sound", "text")}
    return inputs, torch.randint(3, (rows,), generator=generator).to(device)


def train(step, module, device="cpu", sizes=(12, 12, 12, 7, 12)):
    """Losses, and the module's state after a few steps, the fourth of which is smaller."""
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for seed, rows in enumerate(sizes):
        optimiser.zero_grad()
        features, out = step(*batch(seed, rows, device))
        out.loss.backward()
        optimiser.step()
        losses.append(out.loss.item())
        assert features["text"].shape == (rows, 8)
        assert out.logits_by["mix"].shape == (rows, 3)
    return losses, module.state_dict()


@pytest.mark.gpu
def test_a_graph_trains_as_the_module_does():
    module = model().cuda()
    alone = copy.deepcopy(module)
    losses, state = train(GraphedStep(module), module, "cuda")
    expected, plain = train(alone.with_features, alone, "cuda")
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(state, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_graph_of_inputs_of_several_tensors_trains_as_the_module_does():
    module = model_of_masks().cuda()
    losses, state = train(with_masks(GraphedStep(module)), module, "cuda")
    alone = model().cuda()
    expected, plain = train(alone.with_features, alone, "cuda")
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(state, plain, rtol=1e-5, atol=1e-6)


@pytest.fixture
def captured_here(monkeypatch):
    """Stands in for CUDA's capture on the CPU: runs the module and its backward pass as warm-up, and captures nothing."""

    def warm_up(module, samples):
        for _ in range(3):
            sum(x.sum() for x in module(*samples) if x.requires_grad).backward()
        module.zero_grad()

    monkeypatch.setattr(GraphedStep, "_obstacle", lambda self, target: "")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", warm_up)


def test_capturing_counts_as_no_step(captured_here, caplog):
    module = model()
    alone = copy.deepcopy(module)
    losses, state = train(GraphedStep(module), module)
    expected, plain = train(alone.with_features, alone)
    assert losses == expected
    assert state["fusion.steps"] == 5
    torch.testing.assert_close(state, plain, rtol=0, atol=0)
    assert [record.message for record in caplog.records] == [
        "cuda_graph: this batch has another shape than the one captured; such steps run without a graph"
    ]


def test_inputs_of_several_tensors_are_captured_as_tensors_alone(captured_here, caplog):
    module, alone = model_of_masks(), model()
    losses, state = train(with_masks(GraphedStep(module)), module)
    expected, plain = train(alone.with_features, alone)
    assert losses == expected
    torch.testing.assert_close(state, plain, rtol=0, atol=0)
    assert len(caplog.records) == 1, "of the smaller batch"


def test_without_a_gpu_steps_run_without_a_graph_and_a_warning_is_logged_once(caplog):
    module = model()
    alone = copy.deepcopy(module)
    with caplog.at_level(logging.WARNING):
        assert train(GraphedStep(module), module)[0] == train(alone.with_features, alone)[0]
    assert [record.message for record in caplog.records] == [
        "cuda_graph: a graph needs a GPU, and the batch is on 'cpu'; such steps run without a graph"
    ]


class OnGpu:
    """A target that reports a GPU as its device."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("patched", "options", "words"),
    [
        ("torch.is_autocast_enabled", {}, "mixed precision"),
        ("iprm.training.cuda_graphs.world_size", {}, "several processes"),
        (None, {"pairs": "random"}, "draws on the host"),
    ],
)
def test_what_cannot_be_captured_is_named(monkeypatch, patched, options, words):
    if patched:
        monkeypatch.setattr(patched, lambda *_: 2)
    assert words in GraphedStep(model(**options))._obstacle(OnGpu())


def test_accumulated_gradients_are_no_graphs():
    step = GraphedStep(model())
    step.accumulates = True
    assert "accumulated" in step._obstacle(OnGpu())


def test_what_can_be_captured_has_no_obstacle():
    assert GraphedStep(model())._obstacle(OnGpu()) == ""
