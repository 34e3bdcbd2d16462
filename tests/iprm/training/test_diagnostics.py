"""diagnostics.json: values against a direct computation, and no effect on the run itself."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from command import iprm
from feature_files import arrays, save
from forked import run_command_on_ranks
from iprm.data.datasets.features import Features
from iprm.environment import chosen_backends, versions
from iprm.methods import build
from iprm.training.callbacks.diagnostics import Diagnostics
from iprm.training.callbacks.modality_diagnostics import BINS, SplitMeasurement
from iprm.training.classifier import FusionClassifier
from iprm.training.lightning import quiet_lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from run_contents import RUN
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix
from training import classifier, fit


@pytest.fixture
def data(features) -> Features:
    return Features(features, batch_size=7, val_fraction=0.4)


@pytest.fixture
def three(tmp_path) -> Features:
    rows = arrays()
    rows["x_video"] = np.random.default_rng(1).normal(size=(60, 5)) + 0.5 * rows["y"][:, None]
    return Features(save(tmp_path, rows), batch_size=7, val_fraction=0.4)


def recorded(folder: Path, data: Features, method: str = "iprm", **options) -> tuple[dict, L.Trainer]:
    """The diagnostics of a short run, and its trainer."""
    model = classifier(data, method, lr=0.1, **options.pop("model", {}))
    runner = fit(folder, data, model, callbacks=[Diagnostics()], default_root_dir=folder, **options)
    return json.loads((folder / "diagnostics.json").read_text()), runner


def best_model(runner: L.Trainer) -> FusionClassifier:
    """The model loaded from the best checkpoint on validation."""
    return FusionClassifier.load_from_checkpoint(runner.checkpoint_callback.best_model_path, weights_only=True).eval()


def outputs(model: FusionClassifier, data: Features):
    """Features and output of the whole validation split, in one batch."""
    split = data.splits["val"]
    with torch.no_grad():
        features = model.encode(split.inputs)
        return {name: x.double().numpy() for name, x in features.items()}, model.fusion(features), split.target.numpy()


def dense(record: dict) -> np.ndarray:
    cells = record["confusion"]
    matrix = np.zeros((record["num_classes"],) * 2, int)
    matrix[cells["target"], cells["prediction"]] = cells["count"]
    return matrix


def directly(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """θ in float64.  (N, D) x2 -> (N,)"""
    return np.arccos((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))


def divergence(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """KL(P ‖ Q) in float64 by its definition.  (N, C) x2 -> (N,)"""
    log_p, log_q = (log_softmax(logits.double().numpy(), axis=1) for logits in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


# numbers


@pytest.mark.parametrize("method", ["iprm", "iprm-linear", "concat", "weight", "unimodal-text"])
def test_the_confusion_is_that_of_the_weights_best_on_validation(tmp_path, data, method):
    record, runner = recorded(tmp_path, data, method)
    _, output, target = outputs(best_model(runner), data)
    prediction = output.logits.argmax(1).numpy()
    assert dense(record).tolist() == confusion_matrix(target, prediction, labels=range(3)).tolist()
    assert record["class_counts"] == np.bincount(target, minlength=3).tolist()
    assert record["rows"] == len(target)
    assert record["method"] == method
    assert record["weights"]["value"] == pytest.approx(accuracy_score(target, prediction))


@pytest.mark.parametrize("method", ["iprm", "concat", "weight", "joint"])
def test_the_angles_are_those_between_the_features_whether_they_are_mixed_or_not(tmp_path, data, method):
    record, runner = recorded(tmp_path, data, method)
    features, _, _ = outputs(best_model(runner), data)
    theta = directly(features["audio"], features["text"])
    (angles,) = record["angles"]
    assert angles["pair"] == ["audio", "text"]
    assert angles["counts"] == np.histogram(theta, BINS, (0, np.pi))[0].tolist()
    assert angles["mean"] == pytest.approx(theta.mean(), rel=1e-6)
    assert angles["undirected"] == 0


def test_kl_and_omega_are_summed_by_class_over_all_batches(tmp_path, data):
    record, runner = recorded(tmp_path, data)
    _, output, target = outputs(best_model(runner), data)
    (strength,) = record["strength"]
    assert strength["pair"] == ["audio", "text"]
    kl = np.stack(
        [
            [divergence(output.logits_by[m], output.logits_by["mix"])[target == k].sum() for k in range(3)]
            for m in ("audio", "text")
        ]
    )
    assert np.array(strength["kl"]) == pytest.approx(kl, rel=1e-5)
    assert np.array(strength["omega"]) == pytest.approx(kl[::-1] / kl.sum(0), rel=1e-5)


def test_of_three_modalities_every_pair_is_measured_against_its_own_mixture(tmp_path, three):
    record, runner = recorded(tmp_path, three)
    model = best_model(runner)
    features, output, target = outputs(model, three)
    pairs = [list(pair) for pair in itertools.combinations(("audio", "text", "video"), 2)]
    assert record["modalities"] == ["audio", "text", "video"]
    assert [angles["pair"] for angles in record["angles"]] == [strength["pair"] for strength in record["strength"]] == pairs
    mixtures = model.fusion.mixtures({name: torch.from_numpy(x).float() for name, x in features.items()})
    assert torch.stack(mixtures).mean(0).allclose(output.logits_by["mix"])
    for (a, b), angles, strength, mixture in zip(pairs, record["angles"], record["strength"], mixtures, strict=True):
        assert angles["mean"] == pytest.approx(directly(features[a], features[b]).mean(), rel=1e-6)
        for name, sums in zip((a, b), strength["kl"], strict=True):
            kl = divergence(output.logits_by[name], mixture.detach())
            assert sums == pytest.approx([kl[target == k].sum() for k in range(3)], rel=1e-5)


@pytest.mark.parametrize("method", ["concat", "joint", "unimodal-audio"])
def test_a_method_that_mixes_nothing_has_no_strength(tmp_path, data, method):
    record, _ = recorded(tmp_path, data, method)
    assert record["strength"] == []
    assert len(record["angles"]) == (0 if method == "unimodal-audio" else 1)


def measured(features: dict[str, torch.Tensor], target: torch.Tensor, classes: int = 3) -> dict:
    torch.manual_seed(0)
    widths = {name: x.shape[1] for name, x in features.items()}
    measurement = SplitMeasurement(build("iprm", widths, classes, tuple(features)).fusion.eval())
    measurement.update(features, target)
    return measurement.compute()


def test_a_row_whose_features_are_zero_has_no_angle_and_one_without_a_label_is_left_out():
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    x[1] = 0
    x[4] = 0
    record = measured({"x": x, "y": y}, torch.tensor([0, 1, 2, 0, -100]))
    assert record["rows"] == sum(record["class_counts"]) == dense(record).sum() == 4
    (angles,) = record["angles"]
    assert (angles["undirected"], sum(angles["counts"])) == (1, 3)
    kept = [0, 2, 3]
    assert angles["mean"] == pytest.approx(directly(x[kept].double().numpy(), y[kept].double().numpy()).mean(), rel=1e-6)


def test_a_class_without_a_sample_has_no_strength():
    record = measured({"x": torch.randn(4, 4), "y": torch.randn(4, 4)}, torch.tensor([0, 0, 2, 2]))
    for rows in (record["strength"][0]["kl"], record["strength"][0]["omega"]):
        assert [[value is None for value in row] for row in rows] == [[False, True, False]] * 2


def test_equal_and_opposite_features_lie_in_the_first_and_the_last_bin():
    x = torch.randn(6, 4)
    (angles,) = measured({"x": x, "y": torch.cat([x[:4], -x[4:]])}, torch.arange(6) % 3)["angles"]
    assert (angles["counts"][0], angles["counts"][-1], sum(angles["counts"])) == (4, 2, 6)


def test_angles_of_unequal_widths_are_those_of_the_projections_and_without_them_there_are_none():
    features = {"x": torch.randn(6, 4), "y": torch.randn(6, 7)}
    assert len(measured(features, torch.arange(6) % 3)["angles"]) == 1
    measurement = SplitMeasurement(build("concat", {"x": 4, "y": 7}, 3, ("x", "y")).fusion.eval())
    measurement.update(features, torch.arange(6) % 3)
    assert measurement.compute()["angles"] == []


def test_versions_platform_and_backend_are_recorded(tmp_path, data):
    record, _ = recorded(tmp_path, data)
    assert record["versions"] == versions()
    assert record["backends"] == chosen_backends()
    assert record["device"].startswith("cpu: ")
    assert record["precision"] == "32-true"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_computes_in_the_precision_of_the_run(tmp_path, data, precision):
    record, runner = recorded(tmp_path, data, precision=precision)
    assert record["precision"] == precision
    assert np.trace(dense(record)) / record["rows"] == pytest.approx(runner.checkpoint_callback.best_model_score.item())
    assert record["angles"][0]["undirected"] == 0
    assert all(value > 0 for row in record["strength"][0]["kl"] for value in row)


# the run


class Spoiling(L.Callback):
    """Zeroes the fusion module before the validation of one epoch, so that this epoch cannot be the best."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_validation_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            with torch.no_grad():
                for parameter in pl_module.fusion.parameters():
                    parameter.zero_()


class Modes(L.Callback):
    """Freezes an encoder, and records module modes at the end of training."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_start(self, trainer, pl_module):
        pl_module.encoders["text"].eval()

    def on_train_end(self, trainer, pl_module):
        self.seen = [part.training for part in pl_module.modules()]


def test_the_best_weights_are_measured_and_the_last_are_put_back_bit_for_bit(tmp_path, data):
    def run(name: str, *callbacks: L.Callback) -> tuple[L.Trainer, dict[str, torch.Tensor]]:
        model = classifier(data, lr=0.1)
        runner = fit(
            tmp_path / name, data, model, epochs=3, callbacks=[Spoiling(2), *callbacks], default_root_dir=tmp_path / name
        )
        return runner, model.state_dict()

    _, without = run("without")
    runner, state = run("with", Diagnostics())
    assert state.keys() == without.keys()
    assert all(torch.equal(x, without[name]) for name, x in state.items())
    record = json.loads((tmp_path / "with/diagnostics.json").read_text())
    best = runner.checkpoint_callback
    assert record["weights"]["from"] == "best"
    assert record["weights"]["epoch"] < 2
    assert np.trace(dense(record)) / record["rows"] == pytest.approx(best.best_model_score.item())
    assert record["weights"]["value"] == best.best_model_score.item()


@pytest.mark.parametrize("checkpoints", [[], [ModelCheckpoint(every_n_epochs=1)]], ids=["none", "without a monitor"])
def test_without_a_checkpoint_that_is_the_best_the_last_weights_are_measured(tmp_path, data, checkpoints):
    model = classifier(data, lr=0.1)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [*checkpoints, Diagnostics()]
    runner = L.Trainer(
        max_epochs=3, callbacks=callbacks, enable_checkpointing=bool(checkpoints), default_root_dir=tmp_path, **options
    )
    with quiet_lightning():
        runner.fit(model, datamodule=data)
    record = json.loads((tmp_path / "diagnostics.json").read_text())
    assert record["weights"] == {"from": "last", "epoch": 2}
    _, output, target = outputs(model.eval(), data)
    assert dense(record).tolist() == confusion_matrix(target, output.logits.argmax(1), labels=range(3)).tolist()


def test_random_states_and_module_modes_are_what_they_would_be_without_it(tmp_path, data):
    def drawn(*callbacks: L.Callback) -> tuple:
        modes = Modes()
        fit(tmp_path, data, classifier(data), epochs=2, callbacks=[*callbacks, modes], default_root_dir=tmp_path)
        return modes.seen, torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    without = drawn()
    assert len(set(without[0])) == 2
    assert drawn(Diagnostics()) == without


def test_a_limit_on_the_validation_batches_holds_here_too(tmp_path, data):
    assert recorded(tmp_path, data, limit_val_batches=2)[0]["rows"] == 14


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"fast_dev_run": True}], ids=["no validation", "fast_dev_run"])
def test_a_run_that_validates_nothing_or_leaves_nothing_records_nothing(tmp_path, data, options):
    fit(tmp_path, data, classifier(data), epochs=1, callbacks=[Diagnostics()], default_root_dir=tmp_path, **options)
    assert not list(tmp_path.rglob("diagnostics.json*"))


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, data):
    (tmp_path / "diagnostics.json").mkdir()
    with pytest.warns(UserWarning, match="Diagnostics: not written"):
        fit(tmp_path, data, classifier(data), epochs=1, callbacks=[Diagnostics()], default_root_dir=tmp_path)


def test_another_module_than_a_fusion_classifier_is_a_warning(tmp_path, data):
    class Other(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.head(batch[0]["audio"]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", 0.5)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="expected a FusionClassifier, got Other"):
        fit(tmp_path, data, Other(), epochs=1, callbacks=[Diagnostics()], default_root_dir=tmp_path)


def test_fit_writes_it_into_the_folder_of_the_run(tmp_path, features):
    assert iprm(tmp_path, "fit", "--config", "features", "--data.path", features, "--trainer.max_epochs", "2").code == 0
    folder = tmp_path / "runs/features/fit/version_0"
    record = json.loads((folder / "diagnostics.json").read_text())
    assert (record["method"], record["modalities"], record["num_classes"]) == ("iprm", ["audio", "text"], 3)
    files = {path.name.partition(".tfevents")[0] for path in folder.iterdir()}
    assert files == {"checkpoints", "states", "config.yaml", "hparams.yaml", "metrics.csv", "diagnostics.json", "events.out"}


def test_of_two_processes_the_first_measures_the_whole_split(tmp_path, features):
    data = ("--data", "features", "--data.path", features, "--data.batch_size", "7", "--data.val_fraction", "0.4")
    size = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1")
    ranks = run_command_on_ranks(tmp_path, 2, "fit", *data, *size)
    assert [code for code, _ in ranks] == [0, 0], ranks
    rows = len(Features(features, val_fraction=0.4).splits["val"])
    assert json.loads((tmp_path / RUN / "diagnostics.json").read_text())["rows"] == rows
