"""A user-defined encoder class for token ids and their mask, with every command of `iprm`."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from command import iprm, table
from iprm.data.column_stats import scan
from iprm.inference.model import load_inference
from iprm.training.classifier import FusionClassifier
from iprm.training.finite import FiniteGuard, NonFiniteError
from toy_text import LENGTH, WIDTH, Captions, TextTower, save_samples

TOWER = {"class_path": "toy_text.TextTower", "init_args": {"dim": 8, "layers": 2}}
OWN = ("--encoder", "toy_text.TextTower")


class Run(NamedTuple):
    root: Path
    folder: Path
    checkpoint: str
    config: tuple[str, ...]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Two epochs of `iprm fit`, settings in a file."""
    root = tmp_path_factory.mktemp("captions")
    settings = {
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "default_root_dir": "runs"},
        "model": {"encoders": {"text": TOWER, "numbers": "linear"}, "feature_dim": 8},
        "data": {"class_path": "toy_text.Captions"},
    }
    (root / "mine.yaml").write_text(yaml.safe_dump(settings))
    outcome = iprm(root, "fit", "--config", "mine.yaml")
    assert outcome.code == 0, outcome.err
    arguments = re.search(r"iprm test (.+)", outcome.out)[1].split()
    return Run(root, (root / arguments[1]).parent, arguments[3], tuple(arguments[:2]))


def written(path: Path) -> np.ndarray:
    with path.open() as file:
        return np.array([[float(row[f"p_{k}"]) for k in range(3)] for row in csv.DictReader(file)])


def test_the_checkpoint_holds_class_path_arguments_and_descriptions_as_plain_values(run):
    settings = torch.load(run.root / run.checkpoint, weights_only=True)["hyper_parameters"]
    assert settings["encoders"] == {"text": TOWER, "numbers": "linear"}
    assert settings["inputs"]["text"]["ids"] == {"shape": [LENGTH], "dtype": "int64"}
    assert settings["inputs"]["numbers"] == {"shape": [WIDTH], "dtype": "float32"}


def test_test_and_predict_read_it_with_the_configuration_alone(run):
    outcome = iprm(run.root, "test", *run.config, "--ckpt_path", run.checkpoint)
    assert outcome.code == 0, outcome.err
    accuracy = table(outcome.out)["test_accuracy"]
    outcome = iprm(run.root, "predict", *run.config, "--ckpt_path", run.checkpoint, "--output", "split.csv")
    assert outcome.code == 0, outcome.err
    split = Captions().splits["test"]
    with torch.no_grad():
        own = load_inference(run.root / run.checkpoint, OWN)(split.inputs)["probabilities"]
    assert accuracy == pytest.approx((own.argmax(1) == split.target).double().mean().item())
    np.testing.assert_allclose(written(run.root / "split.csv"), own, atol=2e-6)


def test_predict_of_new_samples_and_export_read_it_if_the_class_is_named(run, tmp_path):
    save_samples(tmp_path, rows=23)
    checkpoint = str(run.root / run.checkpoint)
    outcome = iprm(tmp_path, "predict", "--ckpt_path", checkpoint, "--input", "new.npz", *OWN, "--batch_size", "5")
    assert outcome.code == 0, outcome.err
    outcome = iprm(tmp_path, "export", "--ckpt_path", checkpoint, "--output", "out", *OWN)
    assert outcome.code == 0, outcome.err

    with np.load(tmp_path / "new.npz") as file:
        text = {name: torch.from_numpy(file[f"x_text.{name}"]) for name in ("ids", "mask")}
        inputs = {"text": text, "numbers": torch.from_numpy(file["x_numbers"])}
    exported = torch.export.load(tmp_path / "out/model.pt2").module()
    np.testing.assert_allclose(written(tmp_path / "predictions.csv"), exported(inputs)["probabilities"], atol=2e-6)
    description = json.loads((tmp_path / "out/model.json").read_text())
    assert description["encoders"]["text"] == TOWER
    assert description["inputs"]["text"]["mask"] == {"shape": [LENGTH], "dtype": "int64"}


@pytest.mark.parametrize(
    ("command", "options"), [("export", ("--output", "out")), ("predict", ("--input", "new.npz"))], ids=["export", "predict"]
)
def test_a_checkpoint_imports_nothing_that_was_not_named(run, tmp_path, monkeypatch, command, options):
    save_samples(tmp_path, rows=2)
    monkeypatch.delitem(sys.modules, "toy_text")
    path = str(run.root / run.checkpoint)
    for more in ((), ("--encoder", "toy_text.Captions")):
        code, out, err = iprm(tmp_path, command, "--ckpt_path", path, *options, *more)
        assert (code, out) == (2, "")
        assert err.endswith(
            "the class toy_text.TextTower, which would be imported and run; if you trust it, add --encoder toy_text.TextTower\n"
        )
        assert "toy_text" not in sys.modules


def test_a_class_that_is_no_module_is_refused_though_it_is_named(run, tmp_path):
    content = torch.load(run.root / run.checkpoint, weights_only=True)
    content["hyper_parameters"]["encoders"]["text"] = {"class_path": "pathlib.Path", "init_args": {}}
    torch.save(content, tmp_path / "other.ckpt")
    options = ("--ckpt_path", "other.ckpt", "--output", "out", "--encoder", "pathlib.Path")
    code, _, err = iprm(tmp_path, "export", *options)
    assert code == 2
    assert "expected the import path of a subclass of torch.nn.Module, got pathlib.Path" in err


def test_other_arguments_are_another_model(run):
    other = ("--model.encoders.text", '{"class_path": "toy_text.TextTower", "init_args": {"layers": 1, "dim": 8}}')
    code, _, err = iprm(run.root, "test", *run.config, "--ckpt_path", run.checkpoint, *other)
    assert code == 2
    assert "the checkpoint is of a model with encoders" in err


def test_report_shows_the_settings_and_resume_ends_where_a_longer_run_does(run, tmp_path):
    outcome = iprm(run.root, "report", str(run.folder), "--output", "report.html")
    assert outcome.code == 0, outcome.err
    assert "toy_text.TextTower" in (run.root / "report.html").read_text()
    shutil.copytree(run.root / "runs", tmp_path / "runs")
    options = ("--trainer.max_epochs", "3")
    longer = iprm(tmp_path, "fit", "--config", str(run.root / "mine.yaml"), *options, "--trainer.default_root_dir", "longer")
    resumed = iprm(tmp_path, "resume", "runs/fit/version_0", *options)
    assert (longer.code, resumed.code) == (0, 0), (longer.err, resumed.err)
    states = [max((tmp_path / root / "fit/version_0/states").glob("*.ckpt")) for root in ("longer", "runs")]
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in states)
    assert states[0].name == states[1].name
    assert all(one[name].equal(other[name]) for name in other)


def test_profile_times_it(run):
    (run.root / "profiled").mkdir()
    outcome = iprm(run.root / "profiled", "profile", "--config", str(run.root / "mine.yaml"))
    assert outcome.code == 0, outcome.err
    assert "text" in outcome.out


def test_settings_of_the_command_line_serve_as_well(tmp_path):
    settings = (
        "--model.encoders",
        json.dumps({"text": TOWER, "numbers": {"class_path": "mlp"}}),
        "--model.encoders.numbers",
        "linear",
    )
    data = ("--data", "toy_text.Captions", "--data.num_workers", "1", "--trainer.max_epochs", "1")
    outcome = iprm(tmp_path, "fit", *data, *settings, "--trainer.enable_progress_bar", "false")
    assert outcome.code == 0, outcome.err
    code, _, err = iprm(tmp_path, "fit", *data)
    assert (code, "encoder of modality 'text': there is no default for a dict of tensors (ids, mask)" in err) == (2, True)


# the parts


def model(**options) -> FusionClassifier:
    torch.manual_seed(0)
    return FusionClassifier(Captions().inputs, 3, encoders={"text": TOWER}, feature_dim=8, **options)


def test_check_reads_every_tensor_of_a_modality(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {class_path: toy_text.Captions}")
    outcome = iprm(tmp_path, "check", "mine.yaml")
    assert re.search(r"text +train +ids 6", outcome.out)
    text = {"ids": torch.tensor([[0, 0], [0, 0], [3, 0]]), "mask": torch.tensor([[0, 0], [1, 0], [1, 0]])}
    found = scan(text)
    assert found.missing.tolist() == [0], "missing in both"
    assert len(set(found.digest.tolist())) == 3
    assert found.constant.tolist() == [1, 3]


def test_the_digest_of_a_split_sees_every_tensor():
    split, other = Captions().splits["train"], Captions().splits["train"]
    assert split.digest == other.digest
    changed = Captions().splits["train"]
    changed.inputs["text"]["mask"][0, 0] ^= 1
    assert changed.digest != split.digest


def test_a_value_that_is_not_finite_is_named_by_its_tensor():
    output = model()(Captions().splits["train"].first())
    good, bad = torch.ones(2, 3), torch.full((2, 3), torch.nan)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    FiniteGuard("training step").watch(0, {"text": {"ids": ids, "weights": good}}, {}, output)
    with pytest.raises(NonFiniteError, match=r"training step 1: modality 'text\.weights': its input is not finite"):
        FiniteGuard("training step").watch(1, {"text": {"ids": ids, "weights": bad}}, {}, output)


SAMPLES = {
    "floating ids": (
        lambda x: {**x, "x_text.ids": x["x_text.ids"] * 1.0},
        "array 'x_text.ids': expected values of int64, got float64",
    ),
    "no mask": (
        lambda x: {name: array for name, array in x.items() if name != "x_text.mask"},
        "there is no array 'x_text.mask' of modality 'text.mask'",
    ),
    "unsigned ids beyond int64": (
        lambda x: {**x, "x_text.ids": np.full(x["x_text.ids"].shape, 2**63, np.uint64)},
        "array 'x_text.ids': row 0 has a value that is not one of int64; nothing was written",
    ),
    "another length": (lambda x: {**x, "x_text.mask": x["x_text.mask"][:, :5]}, "expected shape (6,) of one sample or (N, 6)"),
}


@pytest.mark.parametrize(("change", "message"), SAMPLES.values(), ids=SAMPLES.keys())
def test_samples_that_do_not_fit_the_description_are_named(run, tmp_path, change, message):
    save_samples(tmp_path, rows=4)
    with np.load(tmp_path / "new.npz") as file:
        content = change(dict(file))
    np.savez(tmp_path / "new.npz", **content)
    code, _, err = iprm(tmp_path, "predict", "--ckpt_path", str(run.root / run.checkpoint), "--input", "new.npz", *OWN)
    assert code == 2
    assert message in err
    assert not (tmp_path / "predictions.csv").exists()


def test_a_folder_with_a_file_for_each_tensor_is_read_alike(run, tmp_path):
    save_samples(tmp_path, rows=7)
    (tmp_path / "new").mkdir()
    with np.load(tmp_path / "new.npz") as file:
        for name in file:
            np.save(tmp_path / f"new/{name.removeprefix('x_')}.npy", file[name])
    for path in ("new", "new.npz"):
        options = ("--input", path, "--output", f"{path}.csv", *OWN)
        outcome = iprm(tmp_path, "predict", "--ckpt_path", str(run.root / run.checkpoint), *options)
        assert outcome.code == 0, outcome.err
    assert np.array_equal(written(tmp_path / "new.csv"), written(tmp_path / "new.npz.csv"))


@pytest.mark.slow
def test_resnet18_of_frames_is_exported(tmp_path):
    from iprm.inference import export

    torch.manual_seed(0)
    video = FusionClassifier({"video": [2, 1, 32, 32], "text": [4]}, 3, "concat", encoders={"video": "resnet18"}, feature_dim=8)
    inputs = {"video": torch.randn(3, 2, 1, 32, 32), "text": torch.randn(3, 4)}
    video.train()(inputs)
    torch.save({"state_dict": video.state_dict(), "hyper_parameters": dict(video.hparams)}, tmp_path / "video.ckpt")
    assert export.export(load_inference(tmp_path / "video.ckpt"), tmp_path) <= export.BOUND
    with torch.no_grad():
        expected = video.eval()(inputs).logits
    torch.testing.assert_close(
        torch.export.load(tmp_path / "model.pt2").module()(inputs)["logits"], expected, rtol=0, atol=1e-5
    )


def test_the_state_of_a_class_is_its_own(run):
    assert isinstance(load_inference(run.root / run.checkpoint, OWN).encoders["text"], TextTower)
