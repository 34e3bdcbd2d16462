"""The command `iprm` as a user calls it: help, and whole runs of fit, test and predict."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from command import Outcome, iprm, table
from iprm import __version__
from iprm.cli.main import COMMANDS
from iprm.cli.settings_help import EXAMPLES
from iprm.data.datasets.digits import Digits
from sklearn.metrics import accuracy_score

CHECKPOINT = re.compile(r"^best on validation(?: until then)?: (?P<path>.+\.ckpt)$", re.MULTILINE)

# help


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_first_help_names_every_command_and_a_way_to_start(tmp_path, arguments):
    code, out, err = iprm(tmp_path, *arguments)
    assert (code, err) == (0, "")
    assert all(re.search(rf"^  {command} +\w", out, re.MULTILINE) for command in COMMANDS)
    assert "iprm compare --data digits" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_begins_with_how_to_call_it_and_is_free_of_type_names(tmp_path, command):
    code, out, err = iprm(tmp_path, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: iprm {command} ")
    assert not re.search(r"lightning\.pytorch|known subclasses|class_path|Union\[", out)


def test_the_help_of_fit_explains_the_settings_of_data_and_model_and_the_few_of_the_trainer_that_most_runs_need(tmp_path):
    out = iprm(tmp_path, "fit", "--help").out
    settings = (
        "data.path",
        "data.help",
        "model.method",
        "model.feature_dim",
        "optimizer",
        "trainer.max_epochs",
        "ckpt_path",
    )
    assert all(f"--{setting}" in out for setting in settings)
    assert "--trainer.sync_batchnorm" not in out
    assert "--model.feature_dim" not in iprm(tmp_path, "test", "--help").out


def test_the_options_of_a_dataset_are_explained_by_its_name(tmp_path):
    out = iprm(tmp_path, "fit", "--data.help", "av-digits").out
    assert re.search(r"--data\.noise NOISE\s+standard deviation of the noise on the pixels", out)


@pytest.mark.parametrize("example", EXAMPLES["fit"].splitlines())
def test_the_examples_of_fit_are_settings_that_exist(tmp_path, example):
    arguments = example.partition(">")[0].removesuffix("--print_config ").split()[1:]
    code, out, _ = iprm(tmp_path, *arguments, "--print_config")
    assert code == 0
    assert set(yaml.safe_load(out)) >= {"trainer", "model", "data"}


def test_a_printed_configuration_is_one_to_start_from(tmp_path):
    first = iprm(tmp_path, "fit", "--config", "digits", "--model.method", "concat", "--print_config").out
    (tmp_path / "mine.yaml").write_text(first)
    assert yaml.safe_load(first)["model"]["method"] == "concat"
    assert iprm(tmp_path, "fit", "--config", "mine.yaml", "--print_config").out == first


def test_the_version_is_the_packages(tmp_path):
    assert iprm(tmp_path, "--version") == (0, f"{__version__}\n", "")


# fit, test, predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def fitted(folder) -> Outcome:
    return iprm(folder, "fit", "--config", "digits", "--trainer.max_epochs", "2")


@pytest.fixture(scope="module")
def trained(fitted) -> tuple[str, ...]:
    """The arguments of `iprm test` that `iprm fit` printed: configuration and checkpoint."""
    return tuple(shlex.split(re.search(r"iprm test (.+)", fitted.out)[1]))


def test_fit_keeps_the_checkpoint_best_on_validation_and_the_course_of_the_run(folder, fitted):
    assert fitted.code == 0
    checkpoint = CHECKPOINT.search(fitted.out)["path"]
    assert (folder / checkpoint).is_file()
    with (folder / checkpoint).parents[1].joinpath("metrics.csv").open() as file:
        accuracy = {row["epoch"]: float(row["val_accuracy"]) for row in csv.DictReader(file) if row["val_accuracy"]}
    assert list(accuracy) == ["0", "1"]
    assert f"epoch={max(accuracy, key=accuracy.get)}-" in checkpoint


def test_test_evaluates_the_checkpoint_and_predict_writes_a_row_an_input(folder, trained, recwarn):
    code, out, err = iprm(folder, "test", *trained)
    assert (code, err) == (0, "")
    code, printed, err = iprm(folder, "predict", *trained, "--output", "new/predictions.csv")
    assert (code, err) == (0, "")
    assert "predictions: new/predictions.csv" in printed
    assert not [warning for warning in recwarn if "checkpoint" in str(warning.message)]

    with (folder / "new/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    split = Digits().splits["test"]
    assert list(rows[0]) == ["row", "target", "prediction", *(f"p_{k}" for k in range(10))]
    assert [int(row["row"]) for row in rows] == list(range(len(split)))
    assert [int(row["target"]) for row in rows] == split.target.tolist()
    probability = torch.tensor([[float(row[f"p_{k}"]) for k in range(10)] for row in rows])
    prediction = [int(row["prediction"]) for row in rows]
    assert probability.argmax(1).tolist() == prediction
    assert probability.sum(1).tolist() == pytest.approx([1] * len(rows), abs=1e-5), "six digits each"
    assert table(out)["test_accuracy"] == pytest.approx(accuracy_score(split.target, prediction))


def test_predict_can_be_given_another_split(folder, trained):
    assert iprm(folder, "predict", *trained, "--data.predict_split", "val", "--output", "val.csv").code == 0
    with (folder / "val.csv").open() as file:
        assert [int(row["target"]) for row in csv.DictReader(file)] == Digits().splits["val"].target.tolist()


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_checkpoint_is_not_read_as_another_model(folder, trained, command):
    code, _, err = iprm(folder, command, *trained, "--model.method", "sum")
    assert (code, err) == (2, "iprm: the checkpoint is of a model with method 'iprm', this one has 'sum'\n")


def test_fit_needs_no_progress_bar_and_no_checkpoint(tmp_path, features):
    options = ("--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false")
    assert iprm(tmp_path, "fit", "--data", "features", "--data.path", features, "--trainer.max_epochs", "1", *options)[:2] == (
        0,
        "",
    )


def test_a_run_that_meets_nan_leaves_with_1_naming_step_modality_and_the_checkpoint_that_is_left(tmp_path, features):
    data = ("--data", "feature_files.PoisonedFeatures", "--data.path", features, "--data.poisoned_step", "5")
    code, _, err = iprm(tmp_path, "fit", *data, "--trainer.max_epochs", "3")
    assert code == 1
    assert err.startswith("iprm: stopped at training batch 5: modality 'text': its input is not finite\n")
    assert "Traceback" not in err
    assert (tmp_path / CHECKPOINT.search(err)["path"]).is_file()


def test_the_command_that_fit_suggests_can_be_pasted_whatever_the_folder_is_called(tmp_path, features):
    folder = tmp_path / "my $runs; (2)"
    fit = ("fit", "--config", "features", "--data.path", features, "--trainer.max_epochs", "1")
    out = iprm(tmp_path, *fit, "--trainer.default_root_dir", str(folder)).out
    suggested = shlex.split(out.partition("on the test split: ")[2].splitlines()[0])
    assert suggested[:4] == ["iprm", "test", "--config", str(folder / "fit/version_0/config.yaml")]
    assert iprm(tmp_path, *suggested[1:]).code == 0


def test_a_run_prints_no_warning(tmp_path, features, recwarn):
    data = ("--config", "features", "--data.path", features)
    assert iprm(tmp_path, "fit", *data, "--trainer.max_epochs", "1").err == ""
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)] == []


def test_checkpoints_and_loggers_of_a_users_own_stand_beside_those_of_the_run(tmp_path, features):
    (tmp_path / "mine.yaml").write_text("""\
trainer:
  max_epochs: 3
  enable_progress_bar: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: theirs}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_top_k: -1, every_n_epochs: 1}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
""")
    out = iprm(tmp_path, "fit", "--config", "mine.yaml", "--data", "features", "--data.path", features)
    assert out.code == 0, out.err
    run = tmp_path / "runs/fit/version_0"
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert len([name for name in names if name.startswith("epoch=")]) == 3
    assert re.fullmatch(r"best-epoch=\d-step=\d\.ckpt", Path(CHECKPOINT.search(out.out)["path"]).name)
    assert list((tmp_path / "theirs").rglob("metrics.csv"))
    with (run / "metrics.csv").open() as file:
        assert "lr-SGD" in file.readline()
    assert iprm(tmp_path, "report", str(run)).code == 0


@pytest.mark.parametrize("options", [("--trainer.logger", "false"), ("--trainer.fast_dev_run", "true")])
def test_a_run_without_a_folder_of_its_own_saves_no_state(tmp_path, features, options):
    data = ("--data", "features", "--data.path", features, "--trainer.enable_progress_bar", "false")
    assert iprm(tmp_path, "fit", *data, "--trainer.max_epochs", "1", *options).code == 0
    assert not list(tmp_path.rglob("states"))
