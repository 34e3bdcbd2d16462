"""Input that `iprm` cannot use: one line that names it and suggests a correction, exit code 2, no traceback, no training."""

from __future__ import annotations

import sys

import lightning as L
import numpy as np
import pytest
import torch
from checkpoints import write
from command import iprm, refused
from feature_files import arrays, changed, save, without
from iprm.cli import main as cli
from iprm.errors import InputError
from iprm.training.classifier import FusionClassifier

DIGITS = ("fit", "--config", "digits")
FEATURES = ("fit", "--config", "features", "--data.path", "features.npz")


WORDS = {
    "a command": (("fitt",), "unknown command 'fitt': did you mean 'fit'?"),
    "a command like no other": (("xyzzy",), "unknown command 'xyzzy' (known: check, compare, "),
    "a configuration": (("fit", "--config", "digts"), "unknown configuration 'digts': did you mean 'digits'?"),
    "a dataset": (("fit", "--data", "digts"), "unknown dataset 'digts': did you mean 'digits'?"),
    "a dataset after =": (("fit", "--data=features_"), "unknown dataset 'features_': did you mean 'features'?"),
    "a dataset to explain": (("fit", "--data.help", "digts"), "unknown dataset 'digts': did you mean 'digits'?"),
    "a class path": (
        ("fit", "--data", "iprm.data.datasets.digits.Digit"),
        "module 'iprm.data.datasets.digits' has no attribute 'Digit'",
    ),
    "a class that is no dataset": (
        ("fit", "--data", "iprm.training.classifier.FusionClassifier"),
        "iprm.training.classifier.FusionClassifier does not correspond to a subclass of MultimodalData",
    ),
    "a model setting": (
        (*DIGITS, "--model.feture_dim", "1"),
        "unknown option --model.feture_dim: did you mean --model.feature_dim?",
    ),
    "a dataset setting": (
        (*DIGITS, "--data.batchsize", "3"),
        "unknown option --data.batchsize: did you mean --data.batch_size?",
    ),
    "a setting of another dataset": ((*DIGITS, "--data.noise", "3"), "unknown option --data.noise"),
    "a trainer setting": (
        (*DIGITS, "--trainer.max_epoch_s", "3"),
        "unknown option --trainer.max_epoch_s: did you mean --trainer.max_epochs?",
    ),
    "a method": ((*DIGITS, "--model.method", "iprmm"), "method: unknown name 'iprmm': did you mean 'iprm'?"),
    "a modality's method": ((*DIGITS, "--model.method", "unimodal-imag"), "did you mean 'unimodal-image'?"),
    "a method's option": (
        (*DIGITS, "--model.method_options", "{alhpa: 0.3}"),
        "'alhpa': did you mean 'alpha'?",
    ),
    "an encoder": (
        (*DIGITS, "--model.encoders.image", "cn"),
        "'image': unknown encoder 'cn': did you mean 'cnn'?",
    ),
    "a split": ((*DIGITS, "--data.predict_split", "tset"), "unknown split 'tset': did you mean 'test'?"),
    "an argument without a name": (
        ("check", "--data", "features"),
        "unknown option --data: DATA is given without it, as in: iprm check digits",
    ),
    "an option of info": (("info", "--halp"), "unknown option --halp: did you mean --help?"),
}


@pytest.mark.parametrize(("arguments", "message"), WORDS.values(), ids=WORDS.keys())
def test_a_word_that_does_not_exist_is_answered_with_the_one_that_was_meant(tmp_path, arguments, message):
    assert message in refused(tmp_path, *arguments)


KEYS = {
    "trainer: {max_epoch: 3}": "unknown option --trainer.max_epoch: did you mean --trainer.max_epochs?",
    "model: {feture_dim: 1}": "unknown option --model.feture_dim: did you mean --model.feature_dim?",
    "modell: {method: sum}": "unknown option --modell.method: did you mean --model.method?",
    "data: {init_args: {batchsize: 3}}": "unknown option --data.batchsize: did you mean --data.batch_size?",
    "data: {class_path: digits}": "data: Expected a dot import path string: digits",
    "model: {method: concta}": "method: unknown name 'concta': did you mean 'concat'?",
    "model: [": "mine.yaml: not readable as YAML: while parsing a flow node",
}


@pytest.mark.parametrize(("text", "message"), KEYS.items(), ids=KEYS.keys())
def test_a_wrong_key_of_a_configuration_file_is_answered_like_one_of_the_command_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert message in refused(tmp_path, *DIGITS, "--config", "mine.yaml")


VALUES = {
    "a word for a number": (("--model.feature_dim", "wide"), "model.feature_dim: Expected a int. Got value: wide"),
    "a word for a whole number": (("--data.batch_size", "many"), "batch_size: Expected a int. Got value: many"),
    "a word for a number or none": (
        ("--trainer.max_epochs", "many"),
        "trainer.max_epochs: expected a whole number or null, got many; try iprm fit --help",
    ),
    "a learning rate below 0": (("--optimizer.lr", "-1"), "optimizer.lr: expected a number from 0 up, got -1.0"),
    "no width": (("--model.feature_dim", "0"), "feature_dim: expected a whole number from 1 up, got 0"),
    "an empty batch": (("--data.batch_size", "0"), "batch_size: expected a whole number from 1 up, got 0"),
    "a batch of one row": (
        ("--data.batch_size", "1"),
        "batch_size: expected at least 2 to train encoders that normalise over a batch",
    ),
    "a seed below 0": (("--data.seed", "-1"), "seed: expected a whole number from 0 up, got -1"),
    "fractions beyond 1": (("--data.val_fraction", "0.9"), "expected positive numbers with a sum below 1, got 0.9 and 0.25"),
    "an unknown accelerator": (("--trainer.accelerator", "gppu"), "trainer: You selected an invalid accelerator name"),
    "an accelerator that is not there": (("--trainer.accelerator", "tpu"), "trainer: Requirement 'torch_xla"),
    "no devices": (
        ("--trainer.accelerator", "cpu", "--trainer.devices", "0"),
        "value is not a valid input using cpu accelerator",
    ),
    "a checkpoint that is not there": (("--ckpt_path", "no.ckpt"), "no.ckpt: there is no such checkpoint"),
    "no value": (("--config",), "expected one argument"),
    "a stray word": (("stray",), "unrecognized arguments: stray"),
}


@pytest.mark.parametrize(("arguments", "message"), VALUES.values(), ids=VALUES.keys())
def test_a_value_that_cannot_be_is_named(tmp_path, arguments, message):
    assert message in refused(tmp_path, *DIGITS, *arguments)


def test_without_normalisation_over_the_batch_one_row_is_enough(tmp_path, features):
    linear = ("--model.encoders", '{"audio": "linear", "text": "linear"}')
    assert iprm(tmp_path, *FEATURES, *linear, "--data.batch_size", "1", "--trainer.max_epochs", "1").code == 0


@pytest.mark.parametrize("arguments", [("fit",), ("test",), ("predict",), ("fit", "--model.method", "sum")])
def test_a_command_without_data_is_told_to_name_some(tmp_path, arguments):
    message = refused(tmp_path, *arguments)
    assert message.startswith("no data: add --data digits or av-digits or features")


@pytest.mark.parametrize("dataset", ["features", "av-digits"])
def test_a_dataset_without_its_path_is_told_to_name_it(tmp_path, dataset):
    message = refused(tmp_path, "fit", "--config", dataset)
    assert message.startswith("data: Problem with given class_path 'iprm.data.datasets.")
    assert "the following arguments are required: path" in message


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_command_for_a_trained_model_asks_for_one(tmp_path, command):
    assert refused(tmp_path, command, "--config", "digits").startswith(f"{command} needs a trained model: add --ckpt_path")


FILES = {
    "without labels": (without("y"), "features.npz: there is no array 'y' of labels; the file has x_audio, x_text"),
    "with a NaN": (changed("x_text", 11, np.nan), "features.npz: modality 'text': row 11 has a feature that is not finite"),
    "of one modality": (without("x_text"), "modalities: expected at least 2, got 1: ('audio',)"),
    "of one class": (
        without("y") | {"y": np.zeros(60, int)},
        "features.npz: all rows are of class 0; expected at least 2 classes",
    ),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES.keys())
def test_a_file_of_features_that_cannot_be_learned_from_is_named(tmp_path, content, message):
    save(tmp_path, content)
    assert message in refused(tmp_path, *FEATURES)


def test_a_missing_file_of_features_is_named(tmp_path):
    assert refused(tmp_path, *FEATURES) == "features.npz: there is no such file"


def archive(path) -> None:
    with path.open("wb") as file:
        np.savez(file, x=np.zeros(3))


FOREIGN = {
    "text": lambda path: path.write_text("hello"),
    "an archive of arrays": archive,
    "parameters alone": lambda path: torch.save({"weight": torch.zeros(3)}, path),
    "a pickled object": lambda path: torch.save(path, path),
    "a part": lambda path: (torch.save({"hyper_parameters": {}}, path), path.write_bytes(path.read_bytes()[:-100])),
}


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_what_is_no_checkpoint_is_refused(tmp_path, write, command):
    write(tmp_path / "some.ckpt")
    message = refused(tmp_path, command, "--config", "digits", "--ckpt_path", "some.ckpt")
    assert message.startswith("some.ckpt: not a checkpoint of iprm fit, or a part of one")


class Theirs(L.LightningModule):
    """A module that is not a `FusionClassifier`."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.linear = torch.nn.Linear(width, 1)


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_a_checkpoint_of_another_lightning_module_is_refused(tmp_path, features, command):
    write(Theirs(), tmp_path / "theirs.ckpt")
    code, _, err = iprm(tmp_path, command, "--data", "features", "--data.path", features, "--ckpt_path", "theirs.ckpt")
    assert (code, err) == (2, "iprm: the checkpoint is not of a FusionClassifier: its settings are width\n")


@pytest.mark.parametrize("command", ["test", "predict", "export"])
def test_a_checkpoint_of_a_model_whose_encoder_was_replaced_is_refused_by_what_does_not_fit(tmp_path, command):
    model = FusionClassifier({"audio": [4], "text": [6]}, 3)
    model.encoders["audio"] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 32), torch.nn.Linear(32, 64))
    write(model, tmp_path / "theirs.ckpt")
    data = ("--output", "new") if command == "export" else ("--data", "features", "--data.path", save(tmp_path, arrays()))
    code, _, err = iprm(tmp_path, command, *data, "--ckpt_path", "theirs.ckpt")
    assert code == 2
    assert "Traceback" not in err
    assert (
        "the checkpoint's weights do not fit the model: Error(s) in loading state_dict for FusionClassifier: Missing key" in err
    )
    assert '"encoders.audio.2.running_mean"' in err
    assert err.endswith("replace them in this model in the same way\n")


def test_of_weights_of_another_shape_both_shapes_are_told(tmp_path):
    one, other = (FusionClassifier({"audio": [width], "text": [6]}, 3) for width in (4, 5))
    with pytest.raises(InputError, match=r"encoders.audio.1.weight: .*\(\[64, 5\]\).*\(\[64, 4\]\)"):
        one.load_state_dict(other.state_dict(), strict=False)


def test_predictions_that_cannot_be_written_are_refused_before_any_work(tmp_path, features):
    torch.save({"hyper_parameters": {}, "state_dict": {}}, tmp_path / "some.ckpt")
    arguments = ("--config", "features", "--data.path", "features.npz", "--ckpt_path", "some.ckpt")
    assert "File exists: 'features.npz'" in refused(tmp_path, "predict", *arguments, "--output", "features.npz/new.csv")


@pytest.mark.parametrize(("asked", "hint"), [("cppp", "did you mean 'cpp'?"), ("tpu", "known: cpp, cuda, reference, triton")])
def test_an_unknown_backend_in_the_environment_is_answered_with_the_known(tmp_path, features, monkeypatch, asked, hint):
    monkeypatch.setenv("IPRM_KERNELS_BACKEND", asked)
    message = refused(tmp_path, *FEATURES)
    assert message.startswith(f"IPRM_KERNELS_BACKEND: unknown backend '{asked}'")
    assert hint in message


def test_without_the_packages_for_training_it_says_how_to_install_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    for name in [name for name in sys.modules if name.startswith(("iprm.cli.f", "lightning."))]:
        monkeypatch.delitem(sys.modules, name)
    assert 'pip install "iprm-kernels[train]"' in refused(tmp_path, *DIGITS)


@pytest.mark.parametrize("by_lightning", [False, True], ids=["before training", "in training"])
def test_an_interrupt_leaves_with_130(tmp_path, monkeypatch, by_lightning):
    def interrupted(_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if by_lightning:
                sys.exit(1)
            raise

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert iprm(tmp_path, *DIGITS) == (130, "", "iprm: interrupted\n")
