"""Private names of Lightning and jsonargparse: those in iprm/training/lightning.py mean what it says; no other file has any."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import pkgutil
import resource
from pathlib import Path

import iprm
import jsonargparse
import lightning as L
import pytest
import torch
from iprm.data.datasets.features import Features
from iprm.training import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.rank_zero import WarningCache
from tensorboardX import SummaryWriter
from training import classifier, fit, trainer


class AtHook(L.Callback):
    """Calls a function with the trainer at a hook, and keeps what it returns."""

    def __init__(self, hook, function):
        self.found = []
        setattr(self, hook, lambda runner, module, *rest: self.found.append(function(runner)))


@pytest.fixture
def data(features) -> Features:
    return Features(features, batch_size=10)  # four batches of 39 rows


def found_at(folder, data, hook, function, **options):
    callback = AtHook(hook, function)
    fit(folder, data, classifier(data), **({"epochs": 1} | options), callbacks=[callback])
    return callback.found


# names of the training loop


def test_should_accumulate_is_true_of_batches_after_which_no_weights_change(tmp_path, data):
    found = found_at(
        tmp_path,
        data,
        "on_train_batch_end",
        lambda runner: (runner.fit_loop.epoch_loop._should_accumulate(), runner.global_step),
        accumulate_grad_batches=2,
    )
    assert found == [(True, 0), (False, 1), (True, 1), (False, 2)]


def test_should_check_val_fx_asks_the_data_fetcher_and_is_true_of_batches_that_a_validation_follows(tmp_path, data):
    def validates(runner):
        return runner.fit_loop.epoch_loop._should_check_val_fx(runner.fit_loop._data_fetcher)

    validations = []
    followed = AtHook("on_validation_start", lambda runner: validations.append(runner.global_step))
    asked = AtHook("on_train_batch_end", lambda runner: (runner.global_step, validates(runner)))
    fit(
        tmp_path,
        data,
        classifier(data),
        epochs=1,
        val_check_interval=2,
        num_sanity_val_steps=0,
        callbacks=[asked, followed],
    )
    assert validations == [2, 4]
    assert asked.found == [(1, False), (2, True), (3, False), (4, True)]


def test_is_last_batch_is_true_of_the_last(tmp_path, data):
    found = found_at(
        tmp_path, data, "on_train_batch_end", lambda runner: runner.fit_loop.epoch_loop.batch_progress.is_last_batch
    )
    assert found == [False, False, False, True]


def test_a_state_is_complete_where_no_gradients_wait_and_no_validation_is_due_within_an_epoch(tmp_path, data):
    found = found_at(tmp_path / "1", data, "on_train_batch_end", lightning.at_batch_boundary)
    assert found == [True, True, True, False]
    found = found_at(tmp_path / "2", data, "on_train_batch_end", lightning.at_batch_boundary, accumulate_grad_batches=2)
    assert found == [False, True, False, False]
    found = found_at(tmp_path / "3", data, "on_train_batch_end", lightning.at_batch_boundary, val_check_interval=2)
    assert found == [True, False, True, False]


def test_an_epoch_is_counted_as_ready_before_its_first_hook(tmp_path, data):
    def counts(runner):
        progress = runner.fit_loop.epoch_progress
        return progress.current.ready, progress.total.ready, progress.current.completed

    assert found_at(tmp_path, data, "on_train_epoch_start", counts, epochs=2) == [(1, 1, 0), (2, 2, 1)]


def test_batch_progress_describes_the_epoch_before_until_lightning_resets_it(tmp_path, data):
    def counts(runner):
        loop = runner.fit_loop.epoch_loop
        return loop.batch_progress.current.completed, loop.val_loop.batch_progress.total.completed > 0

    assert found_at(tmp_path / "1", data, "on_train_epoch_start", counts, epochs=2, num_sanity_val_steps=0)[1] != (0, False)

    def reset(runner):
        with lightning.epoch_not_begun(runner):
            return counts(runner)

    assert found_at(tmp_path / "2", data, "on_train_epoch_start", reset, epochs=2, num_sanity_val_steps=0) == [(0, False)] * 2


def resumed(folder, data, at_start=lightning.resume_at_epoch_start, **options):
    """(epoch, step of the optimiser, step that is logged) of the batches of a run that is resumed at its second epoch."""
    state = folder / "state.ckpt"

    def save(runner):
        if runner.current_epoch == 1:
            with lightning.epoch_not_begun(runner):
                runner.save_checkpoint(state)

    def place(runner):
        return runner.current_epoch, runner.global_step, runner.fit_loop.epoch_loop._batches_that_stepped

    fit(folder / "first", data, classifier(data), callbacks=[AtHook("on_train_epoch_start", save)], epochs=2)
    callbacks = [AtHook("on_train_start", at_start), AtHook("on_train_batch_start", place)]
    fit(folder / "second", data, classifier(data), ckpt_path=str(state), callbacks=callbacks, **options)
    return callbacks[1].found


def test_a_state_of_an_epoch_not_begun_resumes_at_its_first_batch(tmp_path, data):
    assert resumed(tmp_path, data, epochs=2) == [(1, 4, 4), (1, 5, 5), (1, 6, 6), (1, 7, 7)]


def test_a_run_limited_by_steps_that_is_restarting_logs_the_resumed_epoch_one_step_late(tmp_path, data):
    assert resumed(tmp_path / "1", data, epochs=-1, max_steps=6) == [(1, 4, 4), (1, 5, 5)]
    assert resumed(tmp_path / "2", data, lambda runner: None, epochs=-1, max_steps=6) == [(1, 4, 5), (1, 5, 6)]


def test_lightning_asks_for_sigterm_by_the_method_that_is_replaced(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def ask(self):
        raise Asked

    runner = trainer(tmp_path)
    loop = runner.fit_loop.epoch_loop
    monkeypatch.setattr(type(loop), "_broadcast_sigterm_tensor", ask)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda self: 2))
    with pytest.raises(Asked):
        loop.advance(iter(()))
    lightning.skip_sigterm_broadcast(runner)
    with pytest.raises(StopIteration):  # it has gone on to fetch a batch
        loop.advance(iter(()))


def test_the_first_process_is_known_before_the_processes_are_connected(monkeypatch):
    assert lightning.first_process()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not lightning.first_process()


def test_on_before_batch_transfer_calls_the_hook_of_data_or_model(tmp_path, data, monkeypatch):
    def first_alone(self, batch, dataloader_idx):
        return {name: x[:1] for name, x in batch[0].items()}, batch[1][:1]

    monkeypatch.setattr(Features, "on_before_batch_transfer", first_alone)
    take = AtHook("on_train_end", lambda runner: lightning.to_device(runner, next(iter(runner.val_dataloaders))))
    fit(tmp_path, data, classifier(data, encoders={"audio": "linear", "text": "linear"}), epochs=1, callbacks=[take])
    ((inputs, target),) = take.found
    assert [len(x) for x in (*inputs.values(), target)] == [1, 1, 1]


def test_next_version_is_the_number_after_the_highest(tmp_path):
    for number in (0, 4):
        (tmp_path / f"fit/version_{number}").mkdir(parents=True)
    assert lightning.next_version(L.pytorch.loggers.CSVLogger(tmp_path, "fit")) == 5


# names elsewhere


def test_ev_writer_is_what_writes_and_a_full_disk_neither_ends_its_thread_nor_the_run(tmp_path, monkeypatch):
    """Without this, the tenth event after the end of the thread would wait forever."""
    monkeypatch.setattr("threading.excepthook", lambda error: pytest.fail(str(error)))
    writer = SummaryWriter(str(tmp_path))
    lightning.survive_full_disk(writer)
    events = writer.file_writer.event_writer._ev_writer
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        for step in range(100):
            writer.add_scalar("loss", 1.0, step)
        with pytest.raises(OSError, match="File too large"):
            type(events).flush(events)
        writer.flush()
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 0


@functools.cache
def private_names() -> set[str]:
    """Underscored names that Lightning and jsonargparse define: methods, functions, and attributes of self."""
    names = set()
    for package in (L, jsonargparse):
        for file in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    names.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
    names |= {name for name in dir(argparse.ArgumentParser()) if name.startswith("_")}
    return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Names that a file itself defines, as methods, functions, or attributes that it assigns to self."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self":
            names.add(node.attr)
    return names


def foreign(tree: ast.AST, names: set[str]) -> list[str]:
    """Names of `names` that a file reads, assigns or imports without defining them."""
    found, of_others = [], names - defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in of_others:
            found.append(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            found += [
                argument.value for argument in node.args if isinstance(argument, ast.Constant) and argument.value in names
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lightning", "jsonargparse"):
            found += [name for name in [*node.module.split("."), *(alias.name for alias in node.names)] if is_private(name)]
    return found


#: Names of torch, and the public method of named tuples, that Lightning or jsonargparse define or call as well.
OF_OTHERS = {"_apply", "_pytree", "_replace", "_version", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"}
FOLDER = Path(iprm.__file__).parent


def test_no_other_file_touches_a_private_name():
    names = private_names() - OF_OTHERS
    assert {"_should_accumulate", "_data_fetcher", "_parse_ckpt_path", "_get", "_actions", "_action_groups"} <= names
    found = {
        str(file.relative_to(FOLDER)): foreign(ast.parse(file.read_text(encoding="utf-8")), names)
        for file in FOLDER.rglob("*.py")
    }
    assert found.pop("training/lightning.py")
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "trainer.fit_loop._data_fetcher",
        "parser._actions",
        "self._get(config, 'trainer')",
        "setattr(loop, '_should_accumulate', None)",
        "from lightning.pytorch.loops.utilities import _select_data_fetcher",
        "from jsonargparse._core import ArgumentParser",
    ],
)
def test_a_private_name_is_found(line):
    assert foreign(ast.parse(line), private_names())


def test_no_class_overrides_a_private_method_of_lightning_or_jsonargparse():
    for module in pkgutil.walk_packages([str(FOLDER)], "iprm."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    bases = (
        L.LightningModule,
        L.LightningDataModule,
        L.Callback,
        Profiler,
        LightningCLI,
        jsonargparse.ArgumentParser,
    )
    for base in bases:
        for cls in subclasses(base):
            if cls.__module__.startswith("iprm."):
                theirs = {name for b in cls.__mro__ if not b.__module__.startswith("iprm.") for name in vars(b)}
                assert not {name for name in vars(cls) if is_private(name) and not name.startswith("_abc")} & theirs, cls


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def test_a_fit_warns_of_none_of_our_own_hooks(tmp_path, data, monkeypatch, recwarn):
    connector = "lightning.pytorch.trainer.connectors.data_connector.warning_cache"
    monkeypatch.setattr(connector, WarningCache())  # Lightning warns once per process
    trainer(tmp_path, epochs=1).fit(classifier(data), datamodule=data)
    assert [str(warning.message) for warning in recwarn if "overridden" in str(warning.message)] == []
