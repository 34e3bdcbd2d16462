"""Hostile states of runs: plain values that would delete, crash or mislead a run that resumes from them. Each is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import iprm
from feature_files import arrays, save
from iprm.training.checkpoint import AtomicCheckpointIO, read_checkpoint, saved_states

RUN = Path("runs/fit/version_0")
OPTIONS = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
KEEPER = ("--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val_loss")
FIT = ("fit", "--data", "features", "--data.path", "features.npz", *KEEPER, *OPTIONS)
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder in which a run of two epochs was started, with a callback of the user's own."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, arrays())
    assert iprm(folder, *FIT, "--trainer.max_epochs", "2").code == 0
    return folder


@pytest.fixture
def folder(run, tmp_path) -> Path:
    """A copy of it, beside a folder that nothing may touch."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.ckpt").write_text("years")
    (copy / RUN / "checkpoints/thesis.ckpt").write_text("years")
    return copy


def change(state: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = read_checkpoint(state)
    edit(content)
    AtomicCheckpointIO().save_checkpoint(content, state)


def callback(content: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(state for name, state in content["callbacks"].items() if name.startswith(kind))


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Path -> the bytes of a file, or None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def naming(
    path: str, kind: str = "BestCheckpoint", entries: tuple[str, ...] = (*PATHS, "best_k_models")
) -> Callable[..., None]:
    """Names a path in the state of a callback."""

    def edit(content: dict[str, Any]) -> None:
        state = callback(content, kind)
        state.update(dict.fromkeys(set(entries) & set(PATHS), path))
        state.pop("dirpath", None)  # as of the run's own folder
        if "best_k_models" in entries:
            state["best_k_models"] = {path: torch.tensor(0.0 if kind == "BestCheckpoint" else 9.0)}

    return edit


def legacy(content: dict[str, Any]) -> None:
    """Lightning moves these entries to the state of a ModelCheckpoint."""
    content.update({"pytorch-lightning_version": "0.9.0", "checkpoint_callback_best_model_path": "/etc/passwd.ckpt"})
    del content["callbacks"]


def within(*names: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets one entry, however deep."""

    def edit(content: dict[str, Any]) -> None:
        for name in names[:-1]:
            content = content[name] if not str(name).startswith("@") else callback({"callbacks": content}, name[1:])
        content[names[-1]] = value

    return edit


LOOPS = ("loops", "fit_loop")
HOSTILE = {
    # deleting
    "a folder above": naming("../../../../../precious"),
    "a folder above, removed at the next better epoch": naming("../config.yaml", entries=PATHS[:2]),
    "an absolute folder": naming("/precious"),
    "a folder": naming("."),
    "a file of the user's in the same folder": naming("thesis.ckpt"),
    "the last model elsewhere": naming("../../../../../precious/thesis.ckpt", entries=("last_model_path",)),
    "the folder of settings": naming("best-epoch=../../epoch=1-step=1.ckpt"),
    "no text": within("callbacks", "@BestCheckpoint", "best_model_path", value=3),
    "the best of no model": within("callbacks", "@BestCheckpoint", "kth_best_model_path", value="best-epoch=7-step=7.ckpt"),
    "a path of the user's own callback": naming("/precious/epoch=0-step=3.ckpt", "ModelCheckpoint"),
    "a path of the user's own callback, of an old version of Lightning": legacy,
    # misleading, or failing with a traceback
    "a score that no epoch exceeds": within("callbacks", "@BestCheckpoint", "kth_value", value=torch.tensor(float("nan"))),
    "a score of text": within("callbacks", "@BestCheckpoint", "best_model_score", value="0.5"),
    "a generator beyond its memory": lambda content: callback(content, "RunState")["generators"][0]["numpy"].__setitem__(
        2, 10**6
    ),
    "a generator of another size": lambda content: callback(content, "RunState")["generators"][0].update(torch=torch.zeros(3)),
    "no generators": within("callbacks", "@RunState", "generators", value=3),
    "metrics that are no table": within("callbacks", "@RunState", "metrics", value=[{"=1+2": "=1+2"}]),
    "data of no run": within("callbacks", "@RunState", "data", value=[]),
    "a counter of text": within(*LOOPS, "epoch_progress", "current", "ready", value="9"),
    "a counter below 0": within(*LOOPS, "epoch_loop.batch_progress", "total", "ready", value=-5),
    "a counter of another name": within(*LOOPS, "epoch_progress", "current", "reset", value=3),
    "no steps": within(*LOOPS, "epoch_loop.state_dict", value={}),
    "means of no epoch": within("epoch_means", value=[{"update": 3}]),
    "a momentum of another shape": lambda content: content["optimizer_states"][0]["state"][0].update(
        momentum_buffer=torch.zeros(7, 7, 7)
    ),
    "a schedule whose step is a number": within("lr_schedulers", 0, "step", value=3),
    "no state of the optimiser": within("optimizer_states", value=[]),
    "no state of the schedule": within("lr_schedulers", value=[]),
    "no states of generators": within("callbacks", "@RunState", "generators", value=[]),
    "no description of the data": within("callbacks", "@RunState", "data", value={}),
    "no state of the run": lambda content: content["callbacks"].pop("RunState"),
    "no rate": lambda content: content["optimizer_states"][0]["param_groups"][0].pop("lr"),
    "a rate of text": within("optimizer_states", 0, "param_groups", 0, "lr", value="0.1"),
    "an initial rate of text": within("optimizer_states", 0, "param_groups", 0, "initial_lr", value="0.1"),
    "a momentum of text": lambda content: content["optimizer_states"][0]["state"][0].update(momentum_buffer="0.9"),
    "a schedule at an epoch of text": within("lr_schedulers", 0, "last_epoch", value="9"),
    "a schedule at an epoch beyond a double": within("lr_schedulers", 0, "last_epoch", value=10**400),
    "a schedule at an infinite epoch": within("lr_schedulers", 0, "last_epoch", value=float("-inf")),
    "a schedule of no optimiser": within("lr_schedulers", 0, "optimizer", value=None),
    "a counter beyond any run": within(*LOOPS, "epoch_progress", "current", "ready", value=10**30),
    "a counter that overflows": within(
        *LOOPS, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "completed", value=10**20
    ),
    "steps beyond any run": within(*LOOPS, "epoch_loop.state_dict", "_batches_that_stepped", value=10**400),
    "metrics whose names are no text": within("callbacks", "@RunState", "metrics", value=[{"\ud800": 1.0}]),
    "a complex score": within("callbacks", "@BestCheckpoint", "best_model_score", value=torch.tensor(1j)),
    "complex weights": lambda content: content["state_dict"].update({name: x + 1j for name, x in weights(content)}),
    "weights of whole numbers": lambda content: content["state_dict"].update({name: x.long() for name, x in weights(content)}),
    "a version that is none": within("pytorch-lightning_version", value="newest"),
    "no version": lambda content: content.pop("pytorch-lightning_version"),
    "settings of another kind": within("hyper_parameters", "inputs", value=3),
    "weights of text": lambda content: content["state_dict"].update(dict.fromkeys(content["state_dict"], "1.0")),
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_state_is_refused_by_resume_and_changes_nothing(folder, edit):
    change(saved_states(folder / RUN)[-1], edit)
    before = contents(folder.parent)
    code, _, err = iprm(folder, "resume", str(RUN), "--trainer.max_epochs", "4", *OPTIONS)
    assert contents(folder.parent) == before
    assert (code, err.count("\n"), err[:6]) == (2, 1, "iprm: "), err


@pytest.mark.parametrize(
    "name", [name for name in HOSTILE if "folder" in name or "own callback" in name or "generator" in name]
)
def test_a_hostile_state_is_refused_by_fit(folder, name):
    state = saved_states(folder / RUN)[-1]
    change(state, HOSTILE[name])
    before = sorted(folder.parent.rglob("*"))
    code, _, err = iprm(folder, *FIT, "--trainer.max_epochs", "4", "--ckpt_path", str(state))
    assert sorted(folder.parent.rglob("*")) == before
    assert (code, err.count("\n"), err[:6]) == (2, 1, "iprm: "), err


def test_the_paths_of_a_callback_in_another_folder_are_not_restored(folder):
    """As of a run whose folder was moved, or of another run."""
    edit, state = naming("/precious/epoch=0-step=3.ckpt", "ModelCheckpoint"), saved_states(folder / RUN)[-1]
    change(state, lambda content: (edit(content), callback(content, "ModelCheckpoint").update(dirpath="/precious")))
    before = set(folder.parent.rglob("*"))
    code, out, err = iprm(folder, *FIT, "--trainer.max_epochs", "4", "--ckpt_path", str(state))
    assert before <= set(folder.parent.rglob("*"))
    assert (code, "precious" in out + err.partition("dirpath has changed")[0]) == (0, False), err


def test_the_run_itself_resumes_and_replaces_its_own_checkpoints(folder):
    code, _, err = iprm(folder, "resume", str(RUN), "--trainer.max_epochs", "8", *OPTIONS)
    assert code == 0, err
    assert len(list((folder / RUN / "checkpoints").glob("best-*"))) == 1
    assert (folder / RUN / "checkpoints/thesis.ckpt").is_file()


@pytest.mark.parametrize("name", ["precious", "precious/notes.txt", "copy/../precious/thesis.ckpt", "precious/folder.ckpt"])
def test_what_is_no_checkpoint_is_not_removed(folder, name):
    path = folder.parent / name
    (folder.parent / "precious/folder.ckpt").mkdir()
    (folder.parent / "precious/notes.txt").touch()
    AtomicCheckpointIO().remove_checkpoint(path)
    assert path.exists()
    AtomicCheckpointIO().remove_checkpoint(folder.parent / "precious/thesis.ckpt")
    assert not (folder.parent / "precious/thesis.ckpt").exists()


@pytest.mark.parametrize("command", ["predict", "test"])
def test_predictions_that_are_not_finite_are_an_error(folder, command):
    best = next((folder / RUN / "checkpoints").glob("best-*.ckpt"))
    change(best, lambda content: content["state_dict"].update({name: x * float("nan") for name, x in weights(content)}))
    code, out, err = iprm(folder, command, "--config", f"{RUN}/config.yaml", "--ckpt_path", str(best))
    assert (code, err.count("\n"), "not finite" in err) == (1, 1, True), err
    assert "predictions" not in out
    assert not (folder / "predictions.csv").exists()


def weights(content: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, x) for name, x in content["state_dict"].items() if x.is_floating_point()]
