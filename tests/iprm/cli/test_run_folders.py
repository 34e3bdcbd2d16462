"""What the commands write and where: a run has a folder of its own, and no other file is replaced or added."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch
import yaml
from command import iprm
from feature_files import arrays, save
from forked import run_at_once
from holder import held
from iprm import locks
from iprm.cli.fit import FitCLI
from iprm.compare import run as compared
from iprm.files import check_output, created, new_folder
from iprm.locks import LOCK, locked
from iprm.training.callbacks.csv_logger import RunLog
from run_folders import write_comparison, write_run

RUN = "runs/fit/version_0"
FIT = (
    *("fit", "--data", "features", "--data.path", "features.npz", "--data.batch_size", "13", "--model.feature_dim", "8"),
    *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"),
)


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    save(folder, arrays())
    assert iprm(folder, *FIT).code == 0
    return folder


def checkpoint(folder: Path) -> str:
    return str(next((folder / RUN / "checkpoints").iterdir()))


# runs at once


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    logs = [RunLog(tmp_path) for _ in range(6)]
    assert sorted(log.log_dir for log in logs) == [str(tmp_path / f"fit/version_{n}") for n in range(6)]
    assert all(Path(log.log_dir).is_dir() for log in logs)


@pytest.mark.slow
def test_six_runs_of_fit_that_start_at_once_leave_six_runs(tmp_path):
    save(tmp_path, arrays())
    commands = [(tmp_path, [*FIT, "--seed_everything", str(seed)]) for seed in range(6)]
    assert run_at_once(commands) == [0] * 6
    runs = [path for path in (tmp_path / "runs/fit").iterdir() if path.is_dir()]
    assert len(runs) == 6
    assert sorted(yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] for run in runs) == list(range(6))
    for run in runs:
        assert {path.name for path in run.iterdir()} >= {
            "checkpoints",
            "config.yaml",
            "diagnostics.json",
            "metrics.csv",
            "states",
        }
        assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_comparisons_and_profiles_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    for name in ("runs/compare", "runs/compare-1", "runs/compare-2"):
        with created(tmp_path / "runs/compare", anew=True) as folder:
            assert folder == tmp_path / name


def test_a_folder_that_another_process_has_just_created_is_not_taken(tmp_path):
    (tmp_path / "1").mkdir()
    assert new_folder([tmp_path / "1", tmp_path / "2"]) == tmp_path / "2"


def test_a_new_folder_is_removed_if_the_command_fails_before_it_writes(tmp_path):
    def fail(*written: Path) -> None:
        for path in written:
            path.touch()
        raise KeyError

    with pytest.raises(KeyError), created(tmp_path / "a/b"):
        fail()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), created(tmp_path / "a/b") as folder:
        fail(folder / "result")
    assert (tmp_path / "a/b/result").exists()


def test_a_lock_ends_with_its_context_and_is_not_held_by_a_forked_process(tmp_path):
    with locked(tmp_path, "run"):
        child = os.fork()
        if child == 0:
            os._exit(len(locks._handles))
        assert os.waitpid(child, 0)[1] == 0
    with locked(tmp_path, "run"):
        pass


# test and predict


@pytest.mark.parametrize("root", [".", "runs"])
@pytest.mark.parametrize("command", ["test", "predict"])
def test_test_and_predict_write_what_they_were_asked_for_and_nothing_else(fitted, tmp_path, command, root):
    save(tmp_path, arrays())
    settings = f"""\
# mine
seed_everything: 7
trainer:
  default_root_dir: {root}
  enable_progress_bar: false
  logger: {{class_path: CSVLogger, init_args: {{save_dir: theirs}}}}
  callbacks: [{{class_path: LearningRateMonitor}}]
model: {{feature_dim: 8}}
data: {{class_path: iprm.data.datasets.features.Features, init_args: {{path: features.npz}}}}
"""
    (tmp_path / "config.yaml").write_text(settings)
    before = files(tmp_path)
    output = ("--output", "new/predictions.csv") if command == "predict" else ()
    code, _, err = iprm(tmp_path, command, "--config", "config.yaml", "--ckpt_path", checkpoint(fitted), *output)
    assert (code, err) == (0, "")
    after = files(tmp_path)
    added = {"new", "new/predictions.csv"} if command == "predict" else set()
    assert after.keys() - before.keys() == added
    assert {name: after[name] for name in before} == before


def test_a_logger_that_is_asked_for_on_the_command_line_records_a_test(fitted, tmp_path):
    config = ("--config", str(fitted / RUN / "config.yaml"), "--data.path", str(fitted / "features.npz"))
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs")
    assert iprm(tmp_path, "test", *config, "--ckpt_path", checkpoint(fitted), *logger).code == 0
    with next(tmp_path.glob("logs/**/metrics.csv")).open() as file:
        assert "test_accuracy" in next(csv.reader(file))


def test_a_failed_predict_leaves_no_folder(fitted, tmp_path):
    save(tmp_path, arrays())
    config = ("--config", str(fitted / RUN / "config.yaml"), "--model.method", "sum")
    before = files(tmp_path)
    found = iprm(tmp_path, "predict", *config, "--ckpt_path", checkpoint(fitted), "--output", "new/predictions.csv")
    assert (found.code, files(tmp_path)) == (2, before)


@pytest.mark.parametrize("command", ["predict", "report"])
def test_a_file_of_another_kind_is_not_replaced(fitted, tmp_path, command):
    save(tmp_path, arrays())
    write_run(tmp_path / "run")
    config = ("--config", str(fitted / RUN / "config.yaml"), "--ckpt_path", checkpoint(fitted))
    arguments = {"predict": config, "report": ("run",)}[command]
    before = files(tmp_path)
    code, _, err = iprm(tmp_path, command, *arguments, "--output", "features.npz")
    assert (code, files(tmp_path)) == (2, before)
    message = "features.npz: this file was not written by this command, and is not replaced; choose another --output"
    assert err == f"iprm: {message}\n"
    for _ in range(2):  # the second replaces what the first has written
        assert iprm(tmp_path, command, *arguments, "--output", "own").code == 0


def test_a_folder_is_no_file_to_write_and_a_folder_above_must_be_one(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(IsADirectoryError):
        check_output(tmp_path)
    with pytest.raises(OSError, match="file"):
        check_output(tmp_path / "file/new.csv")
    check_output(tmp_path / "a/b/new.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# fit


@pytest.mark.parametrize("option", [("--trainer.logger", "false"), ("--trainer.fast_dev_run", "true")])
def test_a_run_without_a_folder_of_its_own_replaces_nothing(tmp_path, option):
    save(tmp_path, arrays())
    (tmp_path / "config.yaml").write_text("# mine\n")
    for _ in range(2):
        assert iprm(tmp_path, *FIT, *option).code == 0
    assert (tmp_path / "config.yaml").read_text() == "# mine\n"
    assert len(list(tmp_path.rglob("*.ckpt"))) == (0 if "fast" in option[0] else 2), "one per run"


def test_config_yaml_has_the_batch_size_that_was_found_and_the_run_resumes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # by the finder, seconds in this process
    save(tmp_path, arrays())
    finder = ("--trainer.callbacks", "BatchSizeFinder", "--trainer.callbacks.max_trials", "3")
    code, _, err = iprm(tmp_path, *FIT, *finder)
    assert (code, err) == (0, "")
    settings = yaml.safe_load((tmp_path / RUN / "config.yaml").read_text())
    assert settings["data"]["init_args"]["batch_size"] == 8
    assert settings["trainer"]["callbacks"] == []
    state = torch.load(max((tmp_path / RUN / "states").iterdir()), weights_only=True)
    assert state["callbacks"]["RunState"]["data"]["rows a step"] == 8
    assert iprm(tmp_path, "resume", RUN, "--trainer.max_epochs", "2").code == 0
    code, _, err = iprm(tmp_path, "resume", RUN, "--trainer.max_epochs", "3", *finder)
    assert (code, err) == (2, "iprm: BatchSizeFinder cannot be used in a run that starts from a checkpoint\n")


CALLBACKS = {
    "an enum": (("Timer", "--trainer.callbacks.duration", "00:00:01:00"), "interval", "step"),
    "a device": (("StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.1"), "device", "cpu"),
}


@pytest.mark.parametrize(("callback", "name", "value"), CALLBACKS.values(), ids=CALLBACKS.keys())
def test_a_default_of_a_callback_that_is_no_plain_value_is_written_as_one(tmp_path, recwarn, callback, name, value):
    save(tmp_path, arrays())
    code, _, err = iprm(tmp_path, *FIT, "--trainer.callbacks", *callback)
    assert (code, err) == (0, "")
    assert not [warning for warning in recwarn if "serialize" in str(warning.message)]
    (written,) = yaml.safe_load((tmp_path / RUN / "config.yaml").read_text())["trainer"]["callbacks"]
    assert written["init_args"][name] == value


def test_the_folder_of_a_run_that_is_resumed_may_be_in_the_root():
    """As that of a volume."""
    cli = object.__new__(FitCLI)
    for folder in ("/run", "/runs/fit", "/runs/fit/version_0"):
        cli.folder = Path(folder)
        assert cli._log("runs").log_dir == folder


# compare


def compare(folder: Path, *arguments: str) -> tuple[int, str]:
    size = ("--methods", "sum", "--seeds", "1", "--jobs", "1", "--epochs", "1", "--model.feature_dim", "8")
    code, _, err = iprm(folder, "compare", "--data", "features", "--path", "features.npz", *size, *arguments)
    return code, err


def test_compare_replaces_no_file_that_is_not_of_a_comparison(tmp_path):
    save(tmp_path, arrays())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/plot.png").write_text("mine")
    before = files(tmp_path)
    message = "iprm: mine: plot.png there was not written by iprm compare, and is not replaced; choose another --output\n"
    assert compare(tmp_path, "--output", "mine") == (2, message)
    assert files(tmp_path) == before


def test_compare_resumes_no_comparison_of_other_methods_with_other_settings_and_none_of_other_data(tmp_path, monkeypatch):
    save(tmp_path, arrays())
    assert compare(tmp_path, "--output", "report") == (0, "")
    before = files(tmp_path / "report")
    code, err = compare(tmp_path, "--output", "report", "--methods", "concat", "--epochs", "3")
    message = "iprm: report: trainer.max_epochs of this comparison is 1, not 3; choose another --output\n"
    assert (code, err) == (2, message)
    save(tmp_path, arrays() | {"x_text": arrays()["x_text"] + 1})
    monkeypatch.setattr(compared, "_last_read", {})
    code, err = compare(tmp_path, "--output", "report")
    assert code == 2
    assert err.startswith("iprm: report/sum/seed=0: this run is of other data: its train split was {'rows': ")
    assert files(tmp_path / "report") == before


def test_a_run_that_failed_before_it_saved_a_state_may_be_repeated_with_other_settings(tmp_path):
    save(tmp_path, arrays())
    assert compare(tmp_path, "--output", "report", "--trainer.val_check_interval", "100") == (1, "")
    assert compare(tmp_path, "--output", "report", "--trainer.val_check_interval", "200") == (1, "")
    settings = yaml.safe_load((tmp_path / "report/sum/seed=0/config.yaml").read_text())
    assert settings["trainer"]["val_check_interval"] == 200
    assert compare(tmp_path, "--output", "report") == (0, "")
    assert compare(tmp_path, "--output", "report", "--trainer.enable_progress_bar", "false") == (0, "")
    early = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss")
    code, err = compare(tmp_path, "--output", "report", *early)
    assert (code, len(err) < 250) == (2, True)
    assert err.startswith("iprm: report/sum/seed=0: trainer.callbacks of this run is None, not [{'class_path': ")


def test_a_comparison_is_not_continued_by_two_processes_at_once(tmp_path):
    save(tmp_path, arrays())
    write_comparison(tmp_path / "report")
    before = files(tmp_path)
    with held(tmp_path / "report"):
        code, err = compare(tmp_path, "--output", "report")
        (tmp_path / "report" / LOCK).unlink()
    assert (code, files(tmp_path)) == (2, before)
    assert err.startswith("iprm: report: another process is using this comparison; wait until it has ended (process ")
