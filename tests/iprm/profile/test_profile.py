"""`iprm profile`: every second of a batch belongs to the stage that took it, and only the profile is written."""

from __future__ import annotations

import json
import random
import sys
import time
from importlib.metadata import version
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from command import iprm
from feature_files import arrays, save
from iprm.data.datasets.features import Features
from iprm.data.split import Split
from iprm.errors import InputError
from iprm.methods import METHODS
from iprm.profile.profiler import (
    DATA,
    DEVICE,
    GRAPH_BACKWARD,
    GRAPH_FORWARD,
    HEAD_BACKWARD,
    HEAD_FORWARD,
    METRICS,
    OPTIMISER,
    REST,
    Profile,
    StageProfiler,
    backward_of,
    forward_of,
)
from iprm.training.classifier import FusionClassifier
from iprm.training.finite import FiniteGuard
from iprm.training.lightning import quiet_lightning
from iprm.training.metrics import EpochMeans
from matplotlib.image import imread
from training import classifier, fit, trainer

AUDIO, TEXT = "audio", "text"


class Clock:
    """A clock that advances only when `second` is called."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def second(self, *_):
        self.seconds += 1

    def after(self, function):
        """The function, slower by one second."""

        def slow(*args, **kwargs):
            result = function(*args, **kwargs)
            self.second()
            return result

        return slow


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def data(features) -> Features:
    return Features(features, batch_size=13)  # three batches of 39 rows


def profiled(folder, data, model, now, *, steps=3, **options) -> Profile:
    profiler = StageProfiler(steps, warm_up=2, now=now)
    runner = trainer(folder, epochs=-1, profiler=profiler, **options)
    with quiet_lightning(), profiler.attached(runner, model):
        runner.fit(model, datamodule=data)
    return profiler.result()


def seconds(profile: Profile) -> dict[str, float]:
    """The stages that took any time."""
    return {name: taken for name, taken in profile.stages.items() if taken}


# each stage


class SlowBackward(torch.autograd.Function):
    """The identity, whose backward pass takes one second."""

    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.second()
        return gradient, None


class SlowCallback(L.Callback):
    def __init__(self, clock, hook):
        setattr(self, hook, clock.second)


def slow_attribute(owner, name):
    return lambda patch, clock, model: patch.setattr(owner, name, clock.after(getattr(owner, name)))


def slow_module(name):
    return lambda patch, clock, model: model.get_submodule(name).register_forward_hook(clock.second)


def slow_head_gradient(patch, clock, model):
    def slow(module, inputs, output):
        return output._replace(loss=SlowBackward.apply(output.loss, clock))

    model.fusion.register_forward_hook(slow)


def slow_gradient(modality):
    """Delays the gradient of the encoder's first weights, which autograd computes last."""
    return lambda patch, clock, model: next(model.encoders[modality].parameters()).register_hook(clock.second)


def slow_hook(name):
    return lambda patch, clock, model: patch.setattr(model, name, clock.after(getattr(model, name)))


SLOW = {
    "fetching a batch": (slow_attribute(Split, "__getitem__"), DATA),
    "work on a batch after its transfer": (slow_attribute(Features, "on_after_batch_transfer"), DEVICE),
    "the first encoder": (slow_module("encoders.audio"), forward_of(AUDIO)),
    "a layer of the second encoder": (slow_module("encoders.text.1"), forward_of(TEXT)),
    "the head": (slow_module("fusion"), HEAD_FORWARD),
    "the head's gradient": (slow_head_gradient, HEAD_BACKWARD),
    "the first encoder's gradient": (slow_gradient(AUDIO), backward_of(AUDIO)),
    "the second encoder's gradient": (slow_gradient(TEXT), backward_of(TEXT)),
    "clearing gradients": (slow_hook("optimizer_zero_grad"), OPTIMISER),
    "clipping gradients": (slow_hook("configure_gradient_clipping"), OPTIMISER),
    "the update of the weights": (slow_attribute(sys.modules[torch.optim.SGD.__module__], "sgd"), OPTIMISER),
    "metrics": (slow_attribute(EpochMeans, "update"), METRICS),
    "the guard": (slow_attribute(FiniteGuard, "watch"), METRICS),
    "a hook of the model": (slow_hook("on_before_zero_grad"), REST),
}


@pytest.mark.parametrize(("slow", "stage"), SLOW.values(), ids=SLOW.keys())
def test_a_second_is_found_in_the_stage_that_took_it_and_in_no_other(tmp_path, data, clock, monkeypatch, slow, stage):
    model = classifier(data)
    slow(monkeypatch, clock, model)
    profile = profiled(tmp_path, data, model, clock)
    assert seconds(profile) == {stage: 1}
    assert (profile.seconds, profile.batches) == (1, 3)


@pytest.mark.parametrize(
    "hook",
    ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"],
)
def test_what_a_callback_takes_is_shown_and_no_stage_of_the_model(tmp_path, data, clock, hook):
    profile = profiled(tmp_path, data, classifier(data), clock, callbacks=[SlowCallback(clock, hook)])
    assert seconds(profile) == {REST: 1}


@pytest.mark.parametrize("method", [*(name for name in METHODS if name != "unimodal"), "unimodal-text"])
def test_stages_add_up_to_the_wall_time_of_the_batch_for_every_method(tmp_path, features, method, monkeypatch):
    generator, passed, ends = random.Random(0), [0.0], []

    def now():
        passed[0] += generator.random()
        return passed[0]

    def end(self, end_batch=StageProfiler._end_batch):
        end_batch(self)
        ends.append(passed[0])

    monkeypatch.setattr(StageProfiler, "_end_batch", end)
    data = Features(features, batch_size=3)  # thirteen batches
    profile = profiled(tmp_path, data, classifier(data, method), now)
    assert 3 * profile.seconds == pytest.approx(ends[4] - ends[1], rel=1e-12), "the third to the fifth batch"
    unread = {backward_of(AUDIO)} if method == "unimodal-text" else set()
    assert set(seconds(profile)) == set(profile.stages) - unread


def test_every_stage_takes_time_on_a_real_clock(tmp_path, data):
    profile = profiled(tmp_path, data, classifier(data), time.perf_counter)
    assert all(taken > 0 for taken in profile.stages.values())


def test_a_batch_of_several_backward_passes_and_updates_has_the_sum_of_each_stage(tmp_path, data, clock, monkeypatch):
    """Like rules that update encoders and heads in turn: no action of Lightning surrounds their passes and steps."""

    class InTurn(FusionClassifier):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            inputs, target = batch
            optimiser = self.optimizers().optimizer
            for turn in range(3):
                optimiser.zero_grad()
                output = self(inputs, target)
                if turn == 0:
                    torch.autograd.grad(output.loss, list(self.fusion.parameters()), retain_graph=True, allow_unused=True)
                output.loss.backward()
                optimiser.step()

    model = InTurn(data.inputs, data.num_classes, "sum", feature_dim=8)
    slow_head_gradient(monkeypatch, clock, model)
    slow_gradient(AUDIO)(monkeypatch, clock, model)
    slow_module("encoders.text")(monkeypatch, clock, model)
    monkeypatch.setattr(torch.optim.SGD, "step", clock.after(torch.optim.SGD.step))
    profile = profiled(tmp_path, data, model, clock)
    assert {name: round(taken) for name, taken in seconds(profile).items()} == {
        HEAD_BACKWARD: 4,
        backward_of(AUDIO): 3,
        forward_of(TEXT): 3,
        OPTIMISER: 3,
    }


def test_features_that_nothing_learns_have_no_backward_pass(tmp_path, data, clock, monkeypatch):
    model = classifier(data, "sum", encoders={AUDIO: "identity", TEXT: "identity"})
    slow_head_gradient(monkeypatch, clock, model)
    assert seconds(profiled(tmp_path, data, model, clock)) == {HEAD_BACKWARD: 1}


def test_three_modalities_have_three_encoders(tmp_path, clock):
    content = arrays() | {"x_video": np.random.default_rng(1).normal(size=(60, 5))}
    data = Features(save(tmp_path, content), batch_size=13)
    model = classifier(data)
    for encoder in model.encoders.values():
        next(encoder.parameters()).register_hook(clock.second)
    modalities = (AUDIO, TEXT, "video")
    profile = profiled(tmp_path, data, model, clock)
    assert seconds(profile) == {backward_of(modality): 1 for modality in modalities}
    assert {forward_of(modality) for modality in modalities} < set(profile.stages)


def test_a_compiled_model_is_measured_around_what_was_compiled(tmp_path, data, clock):
    calls = []

    def slow(graph, inputs):
        calls.append(graph)
        return clock.after(graph.forward)

    torch._dynamo.register_backend(slow, name="slow_for_this_test")
    torch._dynamo.reset()
    profile = profiled(tmp_path, data, classifier(data, "sum", compile="slow_for_this_test"), clock)
    assert seconds(profile) == dict.fromkeys([forward_of(AUDIO), forward_of(TEXT), HEAD_FORWARD], 1)
    assert 3 <= len(calls) <= 6, "graphs without breaks, in training and in evaluation"


# steps and epochs


def test_batches_whose_gradients_are_added_are_measured_each(tmp_path, data, clock):
    model = classifier(data)
    model.encoders[AUDIO].register_forward_hook(clock.second)
    profile = profiled(tmp_path, data, model, clock, accumulate_grad_batches=2)
    assert (profile.rows, profile.batches) == (13, 3)
    assert seconds(profile) == {forward_of(AUDIO): 1}


def test_the_smaller_last_batch_of_an_epoch_is_left_out(tmp_path, features, clock):
    data = Features(features, batch_size=10)  # 10, 10, 10, 9
    model = classifier(data)
    model.encoders[AUDIO].register_forward_hook(lambda module, inputs, output: clock.second() if len(output) == 9 else None)
    model.fusion.register_forward_hook(clock.second)
    profile = profiled(tmp_path, data, model, clock)
    assert (profile.rows, profile.epoch_batches) == (10, 4)
    assert seconds(profile) == {HEAD_FORWARD: 1}


def test_an_epoch_of_one_step_is_measured(tmp_path, features, clock):
    data = Features(features, batch_size=39)
    model = classifier(data)
    model.fusion.register_forward_hook(clock.second)
    profile = profiled(tmp_path, data, model, clock, limit_val_batches=0)
    assert (profile.rows, profile.epoch_batches, profile.epoch) == (39, 1, 1)
    assert profile.validation is None


def test_what_a_validation_takes_is_told_apart(tmp_path, data, clock, monkeypatch):
    model = classifier(data)
    slow_hook("on_validation_epoch_end")(monkeypatch, clock, model)
    slow_gradient(AUDIO)(monkeypatch, clock, model)
    profile = profiled(tmp_path, data, model, clock)
    assert (profile.seconds, profile.validation, profile.epoch) == (1, 1, 4)


def test_the_run_ends_with_a_validation_once_all_batches_are_measured(tmp_path, features):
    data, ended = Features(features, batch_size=3), []  # thirteen batches

    class Steps(L.Callback):
        def on_train_end(self, trainer, pl_module):
            ended.append((trainer.global_step, float(trainer.callback_metrics["val_accuracy"])))

    profile = profiled(tmp_path, data, classifier(data), time.perf_counter, callbacks=[Steps()])
    ((steps, accuracy),) = ended
    assert steps == 2 + 3, "those of the warm-up, and three that are measured"
    assert 0 <= accuracy <= 1
    assert profile.validation > 0


def test_measuring_changes_nothing_of_what_is_learned(tmp_path, data):
    plain, measured = classifier(data), classifier(data)
    fit(tmp_path / "plain", data, plain, epochs=3)
    before = torch.autograd.backward, torch.autograd.grad
    profiler = StageProfiler(1000)
    runner = trainer(tmp_path / "measured", epochs=3, profiler=profiler)
    with quiet_lightning(), profiler.attached(runner, measured):
        runner.fit(measured, datamodule=data)
    assert profiler.result().rows == 13
    assert (torch.autograd.backward, torch.autograd.grad) == before
    assert measured.fusion._compiled_call_impl is None
    torch.testing.assert_close(measured.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_run_that_ends_before_anything_was_measured_is_refused(tmp_path, data, clock):
    with pytest.raises(InputError, match="nothing was measured"):
        profiled(tmp_path, data, classifier(data), clock, limit_train_batches=0)


# GPUs


class OnGpu:
    """A trainer that reports a GPU as its device."""

    strategy = SimpleNamespace(root_device=torch.device("cuda"))

    def __init__(self, runner):
        self.runner = runner

    should_stop = property(None, lambda self, value: setattr(self.runner, "should_stop", value))

    def __getattr__(self, name):
        return getattr(self.runner, name)


@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu_borders_wait_for_it_and_a_graph_has_none_within(tmp_path, data, clock, monkeypatch, graph):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # otherwise the profiler would query its stream
    model = classifier(data, cuda_graph=graph)
    slow_gradient(AUDIO)(monkeypatch, clock, model)
    slow_module("fusion")(monkeypatch, clock, model)
    profiler = StageProfiler(3, warm_up=2, now=clock)
    runner = trainer(tmp_path, epochs=-1, profiler=profiler)
    with quiet_lightning(), profiler.attached(OnGpu(runner), model):
        runner.fit(model, datamodule=data)
    profile = profiler.result()
    assert profile.synchronised
    assert len(waits) > 10 * profile.batches
    assert all(wait.type == "cuda" for wait in waits)
    assert set(seconds(profile)) == ({GRAPH_FORWARD, GRAPH_BACKWARD} if graph else {HEAD_FORWARD, backward_of(AUDIO)})


def test_nothing_waits_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: pytest.fail("a capture cannot wait"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    profiler = StageProfiler(1)
    profiler._device = torch.device("cuda")
    assert profiler._time() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_stages_take_time_on_a_gpu(tmp_path, data, graph):
    profile = profiled(tmp_path, data, classifier(data, cuda_graph=graph), time.perf_counter, steps=10, accelerator="gpu")
    assert profile.synchronised
    assert all(taken > 0 for taken in profile.stages.values())


# the command


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_command_prints_stages_and_leaves_a_picture_and_figures_and_nothing_else(tmp_path, features, monkeypatch):
    def slow(self, batch, dataloader_idx):
        time.sleep(0.02)
        return batch

    monkeypatch.setattr(Features, "on_after_batch_transfer", slow)
    told = ("--config", "features", "--data.path", features, "--data.batch_size", "13", "--model.method", "concat")
    code, out, err = iprm(tmp_path, "profile", *told, "--steps", "3", "--output", "here")
    assert (code, err) == (0, "")
    assert files(tmp_path) == {"features.npz", "here/profile.json", "here/profile.png"}
    assert out.startswith("Features, concat: 13 rows per batch")
    assert "an epoch takes " in out

    found = json.loads((tmp_path / "here/profile.json").read_text())
    stages = found["stages"]
    assert all(name in out for name in stages)
    assert 0.02 <= stages[DEVICE] < found["seconds"]
    assert max(stages, key=stages.get) == DEVICE
    assert found["settings"]["model"]["method"] == "concat"
    assert found["versions"]["torch"] == version("torch")
    assert found["device"].startswith("cpu: ")
    assert found["threads"] == 1
    assert imread(tmp_path / "here/profile.png").shape[1] == 1200


@pytest.mark.parametrize(
    "options",
    [
        ("--model.channels_last", "true", "--model.cuda_graph", "true"),
        ("--trainer.accumulate_grad_batches", "3", "--trainer.gradient_clip_val", "0.5"),
        ("--trainer.max_epochs", "1", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"),
        ("--trainer.precision", "bf16-mixed"),
    ],
)
def test_settings_of_fit_can_be_given_and_those_that_end_or_save_a_run_are_left_aside(tmp_path, options):
    told = ("--config", "digits", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true", *options)
    code, _, err = iprm(tmp_path, "profile", *told, "--steps", "8", "--output", "here")
    assert code == 0, err
    assert files(tmp_path) == {"here/profile.json", "here/profile.png"}
    found = json.loads((tmp_path / "here/profile.json").read_text())
    assert sum(found["stages"].values()) == pytest.approx(found["seconds"])
    assert found["batches"] == 8


def test_it_replaces_its_own_files_and_no_others(tmp_path, features):
    profile = ("profile", "--config", "features", "--data.path", features, "--steps", "1", "--output")
    for name in ("profile.json", "profile.png"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}')
        code, _, err = iprm(tmp_path, *profile, folder.name)
        assert (code, "profile.json" in err or "profile.png" in err) == (2, True)
        assert [file.read_text() for file in folder.iterdir()] == ['{"mine": 1}']
    for _ in range(2):
        assert iprm(tmp_path, *profile, "own").code == 0


def test_without_a_folder_it_writes_into_one_of_its_own_below_runs(tmp_path, features):
    code, out, _ = iprm(tmp_path, "profile", "--config", "features", "--data.path", features, "--steps", "1")
    assert code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("profile-")
    assert f"profile: runs/{folder.name}\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no data: add --data"),
        (("--config", "digts"), "unknown configuration 'digts': did you mean 'digits'?"),
        (("--config", "digits", "--model.feture_dim", "1"), "did you mean --model.feature_dim?"),
        (("--config", "digits", "--steps", "0"), "argument --steps: expected a whole number from 1 up, got 0"),
        (("--model.method", "sum"), "no data: add --data"),
    ],
)
def test_what_it_cannot_use_is_named_and_nothing_is_written(tmp_path, arguments, message):
    code, out, err = iprm(tmp_path, "profile", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []
