"""Training rules in Lightning: bit-identity with `iprm.Balancer`, order of hooks, accumulation, float16, resumption, errors;
and the settings of optimisers."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import iprm
import lightning as L
import pytest
import torch
import toy_rules
from command import iprm as command
from iprm.data.datasets.features import Features
from iprm.errors import InputError
from iprm.inference.model import Inference
from iprm.training.callbacks.run_state import RunState
from iprm.training.checkpoint import AtomicCheckpointIO, saved_states
from lightning.pytorch.plugins import MixedPrecision
from training import classifier, fit, sgd, values

LINEAR = {"audio": "linear", "text": "linear"}
PLAIN = {"lr": 0.1, "lr_scheduler": None}
RULES = {
    "ogm": {"alpha": 0.7},
    "ogm-ge": {"alpha": 0.7},
    "mslr": {"initial": {"audio": 0.5}},
    "dgl": {},
    "ensemble": {},
    "iprm": {},
    "alternating": {},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toy_rules.register(monkeypatch)


@pytest.fixture
def data(features) -> Features:
    return Features(features, batch_size=13)


def made(data: Features, method: str, **options):
    return classifier(data, method, method_options=RULES.get(method, {}), encoders=LINEAR, **PLAIN, **options)


def balanced(data: Features, model, method: str, epochs: int) -> iprm.Balancer:
    """The same training in a custom loop, from the same weights."""
    optimizer = functools.partial(torch.optim.SGD, **model.optimizer_settings["init_args"])
    initial = copy.deepcopy(model)
    b = iprm.Balancer(initial.encoders, 8, data.num_classes, method, optimizer=optimizer, **RULES[method])
    b.model.fusion.load_state_dict(model.fusion.state_dict())
    b.rule.load_state_dict(model.rule.state_dict())
    loader = data.train_dataloader()
    for epoch in range(epochs):
        b.start_epoch(epoch)
        loader.sampler.set_epoch(epoch)
        for inputs, target in loader:
            b.step(inputs, target)
        b.model.eval()
        split = data.splits["val"]
        with torch.no_grad():
            out = b.model(split.inputs)
        right = {name: (logits.argmax(1) == split.target).float().mean().item() for name, logits in out.logits_by.items()}
        b.end_epoch({name: right[name] for name in b.rule.modalities})
    return b


@pytest.mark.parametrize("method", RULES)
def test_lightning_and_a_loop_of_ones_own_are_bit_identical(tmp_path, data, method):
    model = made(data, method)
    b = balanced(data, model, method, epochs=9)
    fit(tmp_path, data, model, epochs=9)
    for name, value in b.model.state_dict().items():
        assert model.state_dict()[name].equal(value), name
    for name, value in b.rule.state_dict().items():
        assert model.rule.state_dict()[name].equal(value), name


class Order(L.Callback):
    """Records the gradient norm when the rule is called, and when the optimiser steps."""

    def __init__(self, model) -> None:
        self.modulated: list[float] = []
        self.stepped: list[float] = []
        before = model.driver.modulate

        def modulate() -> None:
            self.modulated.append(self._norm(model))
            before()

        model.driver.modulate = modulate

    @staticmethod
    def _norm(model) -> float:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if any(p.grad is not None for p in pl_module.parameters()):
            self.stepped.append(self._norm(pl_module))


def test_a_rule_sees_gradients_before_they_are_clipped(tmp_path, data):
    model = made(data, "sum")
    order = Order(model)
    fit(tmp_path, data, model, epochs=1, gradient_clip_val=1e-3, callbacks=[order])
    assert min(order.modulated) > 1e-2
    assert max(order.stepped) <= 1.001e-3


def test_a_rule_sees_unscaled_gradients_in_float16(tmp_path, data):
    def seen(folder, plugins):
        model = made(data, "ogm-ge")
        order = Order(model)
        fit(folder, data, model, epochs=1, callbacks=[order], plugins=plugins)
        return order.modulated

    half = seen(tmp_path / "half", [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))])
    assert half[0] == pytest.approx(seen(tmp_path / "plain", [])[0], rel=2e-3)


def test_a_rule_acts_once_per_accumulation_window(tmp_path, data):
    model = made(data, "ogm-ge")
    runner = fit(tmp_path, data, model, epochs=2, accumulate_grad_batches=2)
    assert int(model.rule.count) == runner.global_step == 4, "two and one of three batches"
    whole = made(data, "ogm-ge")
    fit(tmp_path / "whole", Features(data.path, batch_size=26), whole, epochs=1, limit_train_batches=1)
    halves = made(data, "ogm-ge")
    fit(tmp_path / "halves", data, halves, epochs=1, limit_train_batches=2, accumulate_grad_batches=2)
    torch.testing.assert_close(halves.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", RULES)
def test_a_run_resumed_within_an_epoch_has_the_bits_of_one_that_was_not_stopped(tmp_path, data, method):
    def run(folder: Path, epochs: int, ckpt_path=None, **options):
        model = made(data, method)
        state = RunState(every_n_batches=2, keep=100)
        runner = fit(
            folder,
            data,
            model,
            epochs=epochs,
            callbacks=[state],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder,
            ckpt_path=ckpt_path,
            **options,
        )
        return model, runner

    whole, _ = run(tmp_path / "whole", 9)
    states = saved_states(tmp_path / "whole")
    assert [int(path.stem.removeprefix("batch=")) for path in states][:4] == [0, 2, 3, 5], "batches, whatever a step is made of"
    for state in (states[1], states[13], states[14]):  # within an epoch, at the beginning of one
        L.seed_everything(7, verbose=False)
        again, _ = run(tmp_path / "again", 9, ckpt_path=str(state))
        assert all(again.state_dict()[name].equal(value) for name, value in whole.state_dict().items()), state


def test_several_updates_per_batch_are_counted_as_one_batch(tmp_path, data):
    model = made(data, "alternating")
    runner = fit(tmp_path, data, model, epochs=2)
    assert runner.global_step == 12
    assert model.batches == 6
    assert values(runner)["train_loss"] > 0


def test_the_schedule_moves_also_where_a_batch_has_several_updates(tmp_path, data):
    model = classifier(data, "alternating", encoders=LINEAR, lr=0.5)
    runner = fit(tmp_path, data, model, epochs=4)
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)


def test_work_between_epochs_leaves_the_bits_of_the_run_alone(tmp_path, data):
    counting, plain = made(data, "counting"), made(data, "sum")
    fit(tmp_path / "counting", data, counting, epochs=3)
    runner = fit(tmp_path / "plain", data, plain, epochs=3)
    assert counting.rule.seen.tolist() == [len(data.splits["train"])] * 3
    assert counting.rule.told[-1] == pytest.approx(values(runner)["val_accuracy_audio"])
    for name, value in plain.state_dict().items():
        assert counting.state_dict()[name].equal(value), name


def test_the_prediction_of_a_rule_is_what_is_evaluated_and_predicted(tmp_path, data):
    model = made(data, "by-audio")
    runner = fit(tmp_path, data, model, epochs=2)
    assert values(runner)["val_accuracy"] == values(runner)["val_accuracy_audio"]
    split = data.splits["val"]
    model.eval()
    expected = model.fusion(model.encode(split.inputs)).logits_by["audio"]
    assert model(split.inputs).logits.equal(expected)
    torch.testing.assert_close(Inference(model)(split.inputs)["logits"], expected)


@pytest.mark.parametrize(
    ("method", "options", "trainer", "message"),
    [
        (
            "alternating",
            {},
            {"gradient_clip_val": 1.0},
            "method 'alternating' needs several updates per batch, which grad",
        ),
        ("alternating", {}, {"accumulate_grad_batches": 2}, "needs several updates per batch, which accumulate_grad_batches"),
        ("alternating", {"cuda_graph": True}, {}, "needs several updates per batch, which cuda_graph"),
        ("mslr", {}, {"check_val_every_n_epoch": 2}, "method 'mslr' needs validation accuracies after every epoch"),
        ("mslr", {}, {"limit_val_batches": 0}, "needs validation accuracies after every epoch"),
    ],
)
def test_what_a_rule_cannot_do_is_refused_by_name_before_training(tmp_path, data, method, options, trainer, message):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, data, made(data, method, **options), epochs=1, **trainer)


def test_sharded_gradients_are_refused_to_a_rule_that_needs_whole_ones(data):
    from lightning.pytorch.strategies import ModelParallelStrategy

    runner = L.Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", devices=1, logger=False)
    with pytest.raises(InputError, match="method 'ogm-ge' needs the whole gradient of every parameter, which the"):
        made(data, "ogm-ge").check_trainer(runner)


# optimisers


class Rates(L.Callback):
    """Records the learning rate of every group, by name, in each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})


def test_any_optimiser_and_schedule_by_its_class_path(tmp_path, data):
    warm_up = {"class_path": "iprm.training.optim.WarmupCosine", "init_args": {"warmup_epochs": 2, "floor": 0.1}}
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.3}}
    rates, model = Rates(), classifier(data, optimizer=adam, lr_scheduler=warm_up)
    runner = fit(tmp_path, data, model, epochs=6, callbacks=[rates])
    assert isinstance(runner.optimizers[0], torch.optim.AdamW)
    half = 0.3 * (0.1 + 0.9 * 0.5)
    found = [rate["all"] for rate in rates.seen]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.3 * (0.1 + 0.9 * (1 + 2**-0.5) / 2), half, found[5]])
    assert found[5] < half
    plateau = {"class_path": "ReduceLROnPlateau", "init_args": {"patience": 0}}
    fit(tmp_path / "plateau", data, classifier(data, lr_scheduler=plateau), epochs=2)


def test_modalities_have_rates_and_decays_of_their_own_which_a_resumed_run_keeps(tmp_path, data):
    own = {"audio": {"lr_scale": 0.1}, "text": {"weight_decay": 0.0, "lr_scale": 2.0}}

    def run(folder, epochs, **options):
        model, rates = made(data, "mslr", modality_options=own), Rates()
        runner = fit(folder, data, model, epochs=epochs, callbacks=[rates, *options.pop("callbacks", [])], **options)
        return rates, runner

    rates, runner = run(tmp_path / "first", 2)
    assert rates.seen[0] == pytest.approx({"audio": 0.01, "text": 0.2})
    assert [group["weight_decay"] for group in runner.optimizers[0].param_groups] == [1e-4, 0.0]
    runner.save_checkpoint(tmp_path / "at_2.ckpt")
    rates, _ = run(tmp_path / "second", 4, ckpt_path=str(tmp_path / "at_2.ckpt"))
    assert rates.seen[-1] == pytest.approx({"audio": 0.01, "text": 0.2})


@pytest.mark.parametrize(("freeze", "still"), [(True, 3), (2, 2), (0, 0)])
def test_a_frozen_encoder_does_not_move_and_neither_do_its_statistics(tmp_path, data, freeze, still):
    class Watch(L.Callback):
        moved: list[bool] = []  # noqa: RUF012

        def on_train_epoch_start(self, trainer, pl_module):
            self.before = copy.deepcopy(pl_module.encoders.state_dict())

        def on_train_epoch_end(self, trainer, pl_module):
            now = pl_module.encoders.state_dict()
            moved = {m: any(not now[n].equal(v) for n, v in self.before.items() if n.startswith(m)) for m in ("audio", "text")}
            assert moved["text"]
            Watch.moved.append(moved["audio"])

    model = classifier(data, "sum", modality_options={"audio": {"freeze": freeze}})
    assert any(name.endswith("running_mean") for name in model.encoders.state_dict())
    fit(tmp_path, data, model, epochs=3, callbacks=[Watch()])
    assert Watch.moved == [False] * still + [True] * (3 - still)


def test_the_command_takes_any_optimiser(tmp_path, features):
    settings = (
        "--data",
        "features",
        "--data.path",
        features,
        "--trainer.max_epochs",
        "2",
        "--trainer.enable_progress_bar",
        "false",
    )
    adam = ("--optimizer", "AdamW", "--optimizer.lr", "1e-3", "--optimizer.betas", "[0.8,0.9]")
    warm = ("--lr_scheduler", "iprm.training.optim.WarmupCosine", "--lr_scheduler.warmup_epochs", "1")
    out = command(tmp_path, "fit", *settings, *adam, *warm, "--model.method", "ogm-ge")
    assert out.code == 0, out.err
    checkpoint = next((tmp_path / "runs/fit/version_0/checkpoints").iterdir())
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["hyper_parameters"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert saved["optimizer_states"][0]["param_groups"][0]["betas"] == (0.8, 0.9)
    assert command(tmp_path, "resume", str(tmp_path / "runs/fit/version_0"), "--trainer.max_epochs", "3").code == 0
    out = command(tmp_path, "fit", *settings, "--optimizer", "AdmW")
    assert out.code == 2
    assert sgd()["class_path"] == "torch.optim.SGD"
