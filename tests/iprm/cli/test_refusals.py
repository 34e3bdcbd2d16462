"""Settings that Lightning, jsonargparse or torch refuse: one line, exit code 2, nothing written. Errors of the user's own code
keep their traceback."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from command import iprm, refused
from iprm.cli.refusals import refusal

FIT = (
    *("fit", "--data", "features", "--data.path", "features.npz", "--data.batch_size", "13"),  # three batches
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
)

SETTINGS = {
    "seed_everything=-1": "seed_everything: expected a number from 0 to 4294967295, got -1",
    "seed_everything=4294967296": "seed_everything: expected a number from 0 to 4294967295, got 4294967296",
    "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches: expected a whole number from 1 up, got 0",
    "trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch: expected a whole number from 1 up, got 0",
    "trainer.log_every_n_steps=-1": "trainer.log_every_n_steps: expected a whole number from 0 up, got -1",
    "trainer.max_epochs=-2": "trainer.max_epochs: expected a whole number from -1 up, got -2",
    "trainer.num_sanity_val_steps=-2": "trainer.num_sanity_val_steps: expected a whole number from -1 up, got -2",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val: expected a number from 0 up, got -1",
    "trainer.gradient_clip_val=.nan": "trainer.gradient_clip_val: expected a number from 0 up, got nan",
    "trainer.val_check_interval=0": "trainer.val_check_interval: expected a number above 0, got 0",
    "trainer.val_check_interval=100": "`val_check_interval` (100) must be less than or equal to the number of",
    "trainer.limit_train_batches=-1": "trainer: You have passed invalid value -1 for limit_train_batches",
    "trainer.devices=99": "processes on this CPU, got 99",
    "trainer.strategy=dpp": "trainer: You selected an invalid strategy name: `strategy='dpp'`",
    "trainer.strategy=ddp_spawn": "trainer.strategy: expected ddp or fsdp2, whose processes run the command, got ddp_spawn",
    "trainer.num_nodes=2": "trainer.num_nodes: 2 machines need torchrun or SLURM",
    "trainer.precision=17": "trainer.precision: expected 64, 32, 16, transformer-engine, transformer-engine-float16, 16-true, ",
    "trainer.max_epochs=1.5": "trainer.max_epochs: expected a whole number or null, got 1.5; try iprm fit --help",
    "trainer.deterministic=foo": "trainer.deterministic: expected true, false, warn or null, got foo; try iprm fit --help",
    "trainer.max_time=soon": "trainer: ",
    "trainer.gradient_clip_algorithm=norms": "trainer: `gradient_clip_algorithm` norms is invalid",
    "trainer.callbacks=NoSuchCallback": "trainer.callbacks: Expected a dot import path string: NoSuchCallback",
    "trainer.callbacks=EarlyStopping": "callbacks.EarlyStopping': the following arguments are required: monitor; try",
    "trainer.callbacks=LearningRateFinder": "LearningRateFinder cannot be used: the learning rate is --optimizer.lr",
    "trainer.logger=NoSuchLogger": "trainer.logger: Expected a dot import path string: NoSuchLogger",
    "trainer.logger=lightning.pytorch.loggers.NoLogger": "module 'lightning.pytorch.loggers' has no attribute 'NoLogger'",
    "trainer.profiler=fast": "trainer: ",
    "trainer.default_root_dir=features.npz": "features.npz",
    "config=.": "unknown configuration '.'",
    "config=/dev/null": "/dev/null: expected a file, got a device or pipe",
    "config=features.npz": "features.npz: not readable as YAML: 'utf-8' codec can't decode",
    "config=list.yaml": "list.yaml: expected a mapping of settings, got list",
    "trainer=features.npz": "features.npz: not readable as YAML",
    "optimizer=features.npz": "features.npz: not readable as YAML",
    "data.path=.": ".: there is no such file",
    "ckpt_path=.": ".: there is no such checkpoint",
}

NOTHING = "no batch was trained on: expected trainer.max_epochs, max_steps, max_time and limit_train_batches above 0"
SETTINGS |= dict.fromkeys(
    ("trainer.max_epochs=0", "trainer.max_steps=0", "trainer.max_time=00:00:00:00", "trainer.limit_train_batches=0"), NOTHING
)


@pytest.mark.parametrize(("setting", "message"), SETTINGS.items(), ids=SETTINGS.keys())
def test_a_setting_that_cannot_be_is_refused(tmp_path, features, setting, message):
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert message in refused(tmp_path, *FIT, f"--{setting}")


CALLBACKS = {
    "EarlyStopping monitor val_loss mode least": "`mode` can be min, max, got least",
    "EarlyStopping monitor val_loss patience long": "EarlyStopping': patience: Expected a int. Got value: long",
    "EarlyStopping monitr val_loss": "unknown option --trainer.callbacks.monitr: did you mean --trainer.callbacks.monitor?",
    "ModelCheckpoint save_top_k 3": "ModelCheckpoint(save_top_k=3, monitor=None) is not a valid configuration",
    "LearningRateMonitor logging_interval foo": "logging_interval: expected step, epoch or null, got foo; try iprm fit --help",
    "EarlyStopping monitor val_acc": "unknown metric of EarlyStopping 'val_acc': did you mean 'val_accuracy'?",
    "ModelCheckpoint monitor val_lss": "unknown metric of ModelCheckpoint 'val_lss': did you mean 'val_loss'?",
    "StochasticWeightAveraging swa_lrs -1": "The `swa_lrs` should a positive float",
}


@pytest.mark.parametrize(("callback", "message"), CALLBACKS.items(), ids=CALLBACKS.keys())
def test_an_argument_of_a_callback_that_cannot_be_is_refused(tmp_path, features, callback, message):
    name, *given = callback.split()
    pairs = zip(given[::2], given[1::2], strict=True)
    options = [f"--trainer.callbacks.{option}={value}" for option, value in pairs]
    assert message in refused(tmp_path, *FIT, f"--trainer.callbacks={name}", *options)


@pytest.mark.parametrize("schedule", ["StepLR step_size 0", "CosineAnnealingLR T_max 0"])
def test_a_schedule_that_divides_by_its_length_is_refused_with_its_settings(tmp_path, features, schedule):
    name, argument, value = schedule.split()
    message = refused(tmp_path, *FIT, f"--lr_scheduler={name}", f"--lr_scheduler.{argument}={value}")
    assert message.startswith(f"lr_scheduler {name}: ZeroDivisionError: ")
    assert f"{argument} {value}" in message


def test_a_logger_whose_package_is_missing_is_refused_with_how_to_install_it(tmp_path, features, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", False)
    message = refused(tmp_path, *FIT, "--trainer.logger", "MLFlowLogger")
    assert message.startswith("Problem with given class_path 'lightning.pytorch.loggers.MLFlowLogger': ")


LATER = {
    "a metric that is not logged": (
        ("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=nothing"),
        "Early stopping conditioned on metric `nothing` which is not available.",
    ),
    "a checkpoint of a metric that is not logged": (
        ("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=nothing"),
        "`ModelCheckpoint(monitor='nothing')` could not find the monitored key in the returned metrics",
    ),
    "gradients that are not sparse": (
        ("--optimizer=SparseAdam",),
        "optimizer: SparseAdam does not support dense gradients, please consider Adam instead",
    ),
}


@pytest.mark.parametrize(("options", "message"), LATER.values(), ids=LATER.keys())
def test_a_setting_that_fails_once_training_has_begun_is_told_in_one_line(tmp_path, features, options, message):
    code, _, err = iprm(tmp_path, *FIT, *options)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"iprm: {message}")


@pytest.mark.parametrize("option", ["--trainer.precision=17", "--trainer.accumulate_grad_batches=0", "--trainer.strategy=dpp"])
def test_a_comparison_is_refused_before_any_run(tmp_path, features, option):
    compare = ("compare", "--data", "features", "--path", "features.npz", "--methods", "sum", "--seeds", "1", "--output", "new")
    assert option.partition("=")[0].removeprefix("--trainer.") in refused(tmp_path, *compare, "--jobs", "1", option)


# the user's own code

THEIRS = """
import lightning as L
from iprm.data.datasets.features import Features
from torch import nn

class Data(Features):
    def __init__(self, path: str = "features.npz"):
        raise ValueError("theirs")

class Reading(Features):
    def __init__(self, path: str = "features.npz"):
        super().__init__(path)
    def read(self):
        raise TypeError("theirs")

class Callback(L.Callback):
    def __init__(self):
        raise ValueError("theirs")

class Hook(L.Callback):
    def on_train_start(self, trainer, module):
        raise RuntimeError("theirs")

class Misused(L.Callback):
    def on_train_start(self, trainer, module):
        module.log("theirs", "a word")

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_features, self.linear = 8, nn.Linear(4, 8)

class Shape(Encoder):
    def forward(self, x):
        return self.linear(x[:, :3].float())

class Backward(Encoder):
    def forward(self, x):
        y = self.linear(x.float()).sigmoid()
        z = y * y
        y.mul_(2)
        return z
"""
ERRORS = {
    "a dataset": (("--data", "theirs.Data"), ValueError, "theirs"),
    "a dataset that reads": (("--data", "theirs.Reading"), TypeError, "theirs"),
    "a module": (("--data", "broken.Data"), NameError, "undefined"),
    "a module without its package": (("--data", "missing.Data"), ModuleNotFoundError, "no_such_package"),
    "a module that is no Python": (("--data", "unfinished.Data"), SyntaxError, "unfinished"),
    "a callback": (("--trainer.callbacks", "theirs.Callback"), ValueError, "^theirs"),
    "a callback in training": (("--trainer.callbacks", "theirs.Hook"), RuntimeError, "theirs"),
    "a callback that Lightning refuses": (("--trainer.callbacks", "theirs.Misused"), ValueError, "cannot be logged"),
    "an encoder": (("--model.encoders.audio", "theirs.Shape"), RuntimeError, "shapes cannot be multiplied"),
    "an encoder in the backward pass": (("--model.encoders.audio", "theirs.Backward"), RuntimeError, "inplace operation"),
}


@pytest.mark.parametrize(("options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_in_the_users_own_code_keeps_its_traceback(tmp_path, features, monkeypatch, options, kind, message):
    modules = {"theirs": THEIRS, "broken": "undefined", "missing": "import no_such_package", "unfinished": "def ("}
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(kind, match=message):
        iprm(tmp_path, *FIT, *options)


def test_an_error_of_ours_is_not_taken_for_one_of_a_setting():
    with pytest.raises(RuntimeError) as error:
        torch.nn.Linear(2, 3)(torch.zeros(3))  # torch raises it, but this file calls torch
    assert refusal(error.value) is None
