"""A killed run resumes bit-identically to an uninterrupted one."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import iprm
from feature_files import arrays, save
from forked import run_commands
from holder import held
from iprm.errors import InputError
from iprm.locks import LOCK
from iprm.training.callbacks.run_state import RunState
from iprm.training.checkpoint import AtomicCheckpointIO, read_checkpoint, state_to_resume
from run_contents import RUN, difference, left

EPOCHS, STEPS = 5, 15  # 39 rows in batches of 13
KILLED_AT = sorted(random.Random(4).sample(range(STEPS), 10))
TERMINATED_AT = (4, 5, 0, 6, 13)  # 4 is the last step of an epoch
INTERRUPTED_AT = (4, 5)
AUGMENTED_KILLED_AT = (4, 7)
BY_STEPS = ("--trainer.max_epochs", "-1", "--trainer.max_steps", "14", "--trainer.val_check_interval", "2")
KILLED_AT_BY_STEPS = (7, 2, 9)
RARELY = ("--state.every_n_batches", "0")
ACCUMULATING = (
    "--trainer.accumulate_grad_batches",
    "2",
    "--trainer.max_epochs",
    "10",
)  # two steps an epoch: of 2 batches and 1

PATHS = os.pathsep.join(filter(None, sys.path))


def fit(
    folder: Path, *more: str, data: str = "NoisyFeatures", signal_step: int = -1, number: int = signal.SIGKILL
) -> tuple[Path, list[str]]:
    """The command that trains in a folder, and sends a signal to itself before a step."""
    folder.mkdir()
    save(folder, arrays())
    of = ("--data", f"feature_files.{data}", "--data.path", "features.npz")
    told = ("--data.signal_step", str(signal_step), "--data.signal_number", str(int(number)))
    settings = ("--trainer.max_epochs", str(EPOCHS), "--trainer.enable_progress_bar", "false", "--state.every_n_batches", "2")
    return folder, ["fit", *of, *told, *settings, *more]


def resume(folder: Path, *more: str) -> tuple[Path, list[str]]:
    return folder, ["resume", str(RUN), "--data.signal_step", "-1", *more]


Commands = list[tuple[tuple[Path, list[str]], int]]  # and the exit code that each is to end with


def ended(folder: Path, *options: str, number: int, step: int, code: int, data: str = "NoisyFeatures") -> Commands:
    """Runs until a signal ends the process, then resumes."""
    return [(fit(folder, *options, data=data, signal_step=step, number=number), code), (resume(folder), 0)]


def check_run(commands: Commands) -> None:
    assert run_commands([command for command, _ in commands]) == [code for _, code in commands]


ENDS = {
    "killed": {"number": signal.SIGKILL, "code": -signal.SIGKILL},
    "terminated": {"number": signal.SIGTERM, "code": 143},
    "interrupted": {"number": signal.SIGINT, "code": 130},
}


class Ran:
    """Runs that end in many ways and are resumed, and uninterrupted ones with the same settings, which are run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def alone(self, *options: str, data: str = "NoisyFeatures") -> Path:
        folder = self.folder / " ".join(("alone", data, *options))
        if not folder.exists():
            check_run([(fit(folder, *options, data=data), 0)])
        return folder

    def ended(self, way: str, step: int, *options: str, data: str = "NoisyFeatures") -> Path:
        folder = self.folder / " ".join((way, str(step), data, *options))
        check_run(ended(folder, *options, step=step, data=data, **ENDS[way]))
        return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    return Ran(tmp_path_factory.mktemp("resume"))


def first(*steps: int, count: int = 1) -> pytest.MarkDecorator:
    """A test for each step; all but the first `count` belong to the tier `slow`."""
    return pytest.mark.parametrize(
        "step", [pytest.param(step, marks=[pytest.mark.slow] if at >= count else []) for at, step in enumerate(steps)]
    )


@first(*KILLED_AT, count=2)
def test_a_killed_run_resumes_bit_identically(ran, step):
    expected = left(ran.alone())
    assert len(expected) > 100
    assert any(name.startswith("best-") for name in expected)
    assert difference(left(ran.ended("killed", step)), expected) == []


@first(*AUGMENTED_KILLED_AT)
def test_a_killed_run_of_convolutions_whose_data_two_workers_augment_resumes_bit_identically(ran, step):
    expected = left(ran.alone(data="AugmentedFeatures"))
    assert any(name.endswith("encoders.image.1.running_var") for name in expected)
    assert difference(left(ran.ended("killed", step, data="AugmentedFeatures")), expected) == []


@first(*KILLED_AT_BY_STEPS)
def test_a_killed_run_that_is_bounded_by_steps_and_validates_within_epochs_resumes_bit_identically(ran, step):
    assert difference(left(ran.ended("killed", step, *BY_STEPS)), left(ran.alone(*BY_STEPS))) == []


@first(*TERMINATED_AT, count=2)
def test_sigterm_saves_the_step_it_came_in_and_the_run_resumes_bit_identically(ran, step):
    """In the middle of an epoch and in its last step; otherwise states are saved only at the beginning of epochs."""
    folder = ran.ended("terminated", step, *RARELY)
    log = (folder / "log.txt").read_text()
    assert f"stopped by SIGTERM; to continue: iprm resume {RUN}" in log
    assert "Traceback" not in log
    last = f"batch={STEPS - 3:08d}.ckpt"  # of the last epoch's beginning: what else is saved is saved by another rule
    found, expected = (
        {name: value for name, value in left(run).items() if name.startswith(("metrics", "best-", last))}
        for run in (folder, ran.alone())
    )
    assert difference(found, expected) == []


@first(*INTERRUPTED_AT)
def test_an_interrupted_run_says_how_to_resume_and_resumes_bit_identically(ran, step):
    folder = ran.ended("interrupted", step)
    log = (folder / "log.txt").read_text()
    assert f"interrupted; to continue: iprm resume {RUN}\n" in log
    assert "Traceback" not in log
    assert difference(left(folder), left(ran.alone())) == []


@first(*INTERRUPTED_AT)
def test_gradients_that_were_being_accumulated_are_computed_anew(ran, step):
    folder = ran.ended("terminated", step, *ACCUMULATING)
    assert difference(left(folder), left(ran.alone(*ACCUMULATING))) == []


def test_a_finished_run_can_be_made_longer(tmp_path):
    longer, folder = tmp_path / "longer", tmp_path / "short"
    two, four = ("--trainer.max_epochs", "2"), ("--trainer.max_epochs", "4")
    decay = ("--lr_scheduler.gamma", "1")  # otherwise the schedule depends on the length of the run
    commands = [fit(longer, *four, *decay), fit(folder, *two, *decay), resume(folder, *four)]
    assert run_commands(commands) == [0, 0, 0]
    assert left(folder)["metrics"] == left(longer)["metrics"]


# runs that cannot be resumed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("seed", "5", "the state has a seed of 0, this run 5"),
        ("batch_size", "16", "the state has a batch of 13 rows over all processes, this run 16"),
    ],
)
def test_other_data_are_refused(run, tmp_path, option, value, message):
    save(tmp_path, arrays())
    with pytest.raises(InputError, match=message):
        resumed(run, tmp_path, f"--data.{option}", value)


REFUSED = {
    "another method": ("--model.method", "sum"),
    "another batch size": ("--data.batch_size", "16"),
    "another optimiser": ("--optimizer", "AdamW"),
    "fewer epochs": ("--trainer.max_epochs", "1"),
    "an interval beyond the epoch": ("--trainer.max_epochs", "6", "--trainer.val_check_interval", "100"),
    "a metric that does not exist": (
        *("--trainer.max_epochs", "6"),
        *("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "nothing"),
    ),
    "a value that cannot be": ("--trainer.accumulate_grad_batches", "0"),
}


OWN = {
    "seed_everything 5": "seed_everything: this run has 0, and cannot be resumed with 5;",
    "optimizer SGD optimizer.lr 0.1": "optimizer.lr: this run has 0.01, and cannot be resumed with 0.1;",
    "optimizer AdamW": "optimizer: this run has 'torch.optim.SGD', and cannot be resumed with 'torch.optim.AdamW';",
    "lr_scheduler null": "lr_scheduler: this run has 'iprm.training.optim.StepAtFraction', and cannot be resumed with None;",
    "lr_scheduler.gamma 0.5": "lr_scheduler.gamma: this run has 0.1, and cannot be resumed with 0.5;",
    "model.modality_options {audio: {freeze: true}}": "model.modality_options: this run has None,",
    "trainer.accumulate_grad_batches 2": "trainer.accumulate_grad_batches: this run has 1,",
    "trainer.precision 16-true": "trainer.precision: this run has None, and cannot be resumed with '16-true';",
    "trainer.overfit_batches 1": "trainer.overfit_batches: this run has 0.0, and cannot be resumed with 1;",
    "trainer.limit_train_batches 0": "trainer.limit_train_batches: this run has None, and cannot be resumed with 0;",
    "trainer.enable_checkpointing false": "trainer.enable_checkpointing: a run cannot be resumed with False,",
    "trainer.logger false": "trainer.logger: a run cannot be resumed with False,",
    "trainer.fast_dev_run true": "trainer.fast_dev_run: a run cannot be resumed with True,",
    "trainer.fast_dev_run 2": "trainer.fast_dev_run: this run has False, and cannot be resumed with 2;",
}


@pytest.mark.parametrize(("settings", "message"), OWN.items(), ids=OWN.keys())
def test_a_setting_that_would_change_the_run_is_refused_by_name(run, tmp_path, settings, message):
    save(tmp_path, arrays())
    before = files(run)
    words = settings.split(maxsplit=1) if "{" in settings else settings.split()
    given = [f"--{name}={value}" for name, value in zip(words[::2], words[1::2], strict=True)]
    with pytest.raises(InputError, match=f"^iprm: {re.escape(message)}"):
        resumed(run, tmp_path, "--trainer.max_epochs", "6", *given)
    assert files(run) == before


def test_length_display_and_callbacks_of_a_run_may_be_changed(run, tmp_path):
    save(tmp_path, arrays())
    callback = ("--trainer.callbacks", "LearningRateMonitor", "--trainer.callbacks.logging_interval", "epoch")
    settings = ("--trainer.enable_model_summary", "false", "--trainer.max_time", "01:00:00:00")
    resumed(run, tmp_path, "--trainer.max_epochs", "6", *callback, *settings, "--optimizer.lr", "0.01", "--state.keep", "3")
    assert "lr-" in (run / "metrics.csv").read_text()


def test_a_run_that_has_ended_is_left_as_it_is(run, tmp_path):
    before = files(run)
    message = f"{run}: this run has ended after 5 epochs; for more: --trainer.max_epochs 10\n"
    assert iprm(tmp_path, "resume", str(run)) == (0, message, "")
    assert files(run) == before


def test_a_run_that_has_ended_at_its_last_step_is_left_as_it_is(tmp_path):
    save(tmp_path, arrays())
    limit = ("--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--state.every_n_batches", "1")
    data = ("--data", "features", "--data.path", "features.npz", "--data.batch_size", "13")
    # in a process of its own: the writer of tensorboardX's events may write some of them late, when its process ends
    assert run_commands([(tmp_path, ["fit", *data, *limit, "--trainer.enable_progress_bar", "false"])]) == [0]
    before = files(tmp_path)
    message = "this run has ended; for more: --trainer.max_epochs, or the limit that it had\n"
    assert iprm(tmp_path, "resume", "runs/fit/version_0") == (0, message, "")
    assert files(tmp_path) == before


def test_a_run_that_is_resumed_in_the_second_of_its_start_has_another_file_of_events(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: 2e9)  # names of files have the second
    save(tmp_path, arrays())
    data = ("--data", "features", "--data.path", "features.npz", "--data.batch_size", "13")
    assert iprm(tmp_path, "fit", *data, "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false").code == 0
    run = tmp_path / "runs/fit/version_0"
    assert iprm(tmp_path, "resume", str(run), "--trainer.max_epochs", "2").code == 0
    assert len(list(run.glob("events.out.tfevents.2000000000.*"))) == 2


def files(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_resume_leaves_the_run_as_it_was(run, tmp_path, options):
    """Except that one which is refused at the end of an epoch has saved states."""
    save(tmp_path, arrays())
    before = files(run)
    with pytest.raises(InputError, match="iprm: "):
        resumed(run, tmp_path, *options)
    after = files(run)
    if "EarlyStopping" in options:
        before, after = (
            {path: text for path, text in found.items() if path.name == "config.yaml"} for found in (before, after)
        )
    assert after == before
    resumed(run, tmp_path)


def test_a_run_is_not_resumed_by_two_processes_at_once(run, tmp_path):
    save(tmp_path, arrays())
    before = files(run)
    with held(run):
        with pytest.raises(InputError, match=f"{run}: another process is using this run"):
            resumed(run, tmp_path)
        (run / LOCK).unlink()
    assert files(run) == before


def test_other_values_of_as_many_rows_with_the_same_labels_are_refused(run, tmp_path):
    save(tmp_path, arrays() | {"x_text": arrays()["x_text"] + 1})
    with pytest.raises(InputError, match="the state has a train split of"):
        resumed(run, tmp_path)


def resumed(run: Path, folder: Path, *more: str) -> None:
    code, _, err = iprm(folder, "resume", str(run), "--data.path", str(folder / "features.npz"), *more)
    if code == 2:
        raise InputError(err)


def states(run: Path) -> list[Path]:
    return sorted((run / "states").glob("*.ckpt"))


@pytest.fixture
def run(ran, tmp_path) -> Path:
    """A copy of a run in another folder."""
    return Path(shutil.copytree(ran.alone() / RUN, tmp_path / "moved"))


@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_truncated_state_is_refused_and_the_one_before_is_offered(run, tmp_path, part):
    last = states(run)[-1]
    last.write_bytes(last.read_bytes()[: int(part * last.stat().st_size)])
    code, _, err = iprm(tmp_path, "resume", str(run))
    assert code == 2
    assert err == (
        f"iprm: {last}: not a checkpoint of iprm fit, or a part of one; to resume from the state before it: "
        f"iprm resume {run} --previous\n"
    )


def test_the_state_before_the_last_is_used_on_request(run, tmp_path):
    before, last = states(run)
    last.write_bytes(b"")
    assert state_to_resume(run, previous=True) == before
    assert iprm(tmp_path, "resume", str(run), "--previous", "--data.path", save(tmp_path, arrays())).code == 0
    assert states(run)[-1] == last
    assert read_checkpoint(last)["global_step"] == STEPS - 1, "written anew"


@pytest.mark.parametrize(("content", "word"), [({"weights": torch.zeros(2)}, "foreign"), ([1, 2], "a list")])
def test_a_foreign_file_is_refused(run, tmp_path, content, word):
    torch.save(content, states(run)[-1])
    code, _, err = iprm(tmp_path, "resume", str(run))
    assert (code, "not a checkpoint of iprm fit" in err) == (2, True), word


def test_a_checkpoint_that_holds_code_is_refused_and_the_code_not_run(run, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "trapped",))

    torch.save({"hyper_parameters": {}, "state_dict": {}, "trap": Trap()}, states(run)[-1])
    code, _, err = iprm(tmp_path, "resume", str(run))
    assert (code, "not a checkpoint of iprm fit" in err) == (2, True)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ("", (), "there is no such run; expected the folder of one, such as runs/digits/fit/version_0"),
        ("config.yaml", (), "no state was saved to resume from"),
        ("config.yaml", ("--previous",), "no state was saved to resume from"),
    ],
)
def test_a_folder_without_a_run_or_a_state_is_refused(tmp_path, made, options, message):
    folder = tmp_path / "run"
    folder.mkdir()
    if made:
        (folder / made).touch()
    assert iprm(tmp_path, "resume", str(folder), *options) == (2, "", f"iprm: {folder}: {message}\n")


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"a": 1}, path)

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


HOURS_AGO = time.time() - 7200


def test_a_save_removes_what_a_killed_one_has_left(tmp_path):
    killed = "import os, sys; from iprm.training.checkpoint import AtomicCheckpointIO; "
    killed += "os.fsync = lambda _: os.kill(os.getpid(), 9); "
    killed += "AtomicCheckpointIO().save_checkpoint({'a': 1}, sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path / "a.ckpt")], env=os.environ | {"PYTHONPATH": PATHS})
    (part,) = tmp_path.iterdir()
    assert (done.returncode, part.suffix) == (-signal.SIGKILL, ".part")
    os.utime(part, (HOURS_AGO, HOURS_AGO))
    AtomicCheckpointIO().save_checkpoint({"a": 2}, tmp_path / "b.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["b.ckpt"]


def test_a_save_leaves_alone_what_another_process_is_writing(tmp_path, monkeypatch):
    """Even if it has waited for its disk for five minutes."""
    fsync, before = os.fsync, time.time() - 300

    def another_saves_meanwhile(file):
        monkeypatch.setattr("os.fsync", fsync)
        os.utime(file, (before, before))
        AtomicCheckpointIO().save_checkpoint({"a": 2}, tmp_path / "b.ckpt")

    monkeypatch.setattr("os.fsync", another_saves_meanwhile)
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    found = {path.name: torch.load(path, weights_only=True) for path in tmp_path.iterdir()}
    assert found == {"a.ckpt": {"a": 1}, "b.ckpt": {"a": 2}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": -1}, "every_n_batches: expected a number from 0 up, got -1"),
        ({"keep": 1}, "keep: expected at least 2"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match=message):
        RunState(**options)
