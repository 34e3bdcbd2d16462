"""`FusionClassifier` in small Lightning runs: learning, logging, checkpoints and errors."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from iprm.data.datasets.features import Features
from iprm.errors import InputError
from iprm.training.classifier import FusionClassifier
from iprm.training.lightning import quiet_lightning
from sklearn.metrics import accuracy_score
from training import classifier, fit, sgd, values

EVALUATED = ("loss", "accuracy", "macro_f1", "map")


@pytest.fixture
def data(features) -> Features:
    return Features(features, batch_size=13)


def step_at(fraction: float = 0.7, gamma: float = 0.1) -> dict:
    """Settings of the schedule that drops once."""
    return {"class_path": "iprm.training.optim.StepAtFraction", "init_args": {"fraction": fraction, "gamma": gamma}}


class Rates(L.Callback):
    """Records the learning rate of every epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


class Losses(L.Callback):
    """Records the loss of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


@pytest.mark.parametrize("method", ["iprm", "concat", "unimodal-audio"])
def test_training_halves_the_cross_entropy_of_the_prediction(tmp_path, data, method):
    model = classifier(data, method, lr=0.1)
    split = data.splits["train"]
    before = F.cross_entropy(model(split.inputs).logits, split.target)
    fit(tmp_path, data, model, epochs=12)
    assert F.cross_entropy(model.train()(split.inputs).logits, split.target) < before / 2


@pytest.mark.parametrize(
    ("method", "heads", "weights"),
    [
        ("iprm", ("audio", "text", "mix"), ("weight", "strength_audio", "strength_text")),
        ("sum", ("audio", "text"), ()),
        ("unimodal-text", ("text",), ()),
    ],
)
def test_what_is_logged_is_what_is_documented(tmp_path, data, method, heads, weights):
    runner = fit(tmp_path, data, classifier(data, method), epochs=1)
    expected = {f"val_{name}" for name in (*EVALUATED, *(f"accuracy_{head}" for head in heads))}
    losses = heads if method == "iprm" else ("fused",)
    expected |= {"train_loss", *(f"train_loss_{head}" for head in losses)}
    expected |= {"train_accuracy", *(f"train_accuracy_{head}" for head in heads), *weights}
    assert set(values(runner)) == expected


def test_the_training_loss_is_the_mean_of_its_own_epoch(tmp_path, data):
    losses = Losses()
    runner = fit(tmp_path, data, classifier(data, lr=0.1), epochs=2, callbacks=[losses])
    assert len(losses.seen) == 6
    assert values(runner)["train_loss"] == pytest.approx(sum(losses.seen[3:]) / 3)


def test_validation_and_test_metrics_are_those_of_the_model_on_the_whole_split(tmp_path, data):
    model = classifier(data)
    runner = fit(tmp_path, data, model, epochs=2)
    logged = values(runner)
    with quiet_lightning():
        (tested,) = runner.test(model, datamodule=data, verbose=False)
    for stage, found in (("val", logged), ("test", tested)):
        split = data.splits[stage]
        with torch.no_grad():
            out = model.eval()(split.inputs, split.target)
        assert found[f"{stage}_accuracy"] == pytest.approx(accuracy_score(split.target, out.logits.argmax(1)))
        assert found[f"{stage}_accuracy_text"] == pytest.approx(accuracy_score(split.target, out.logits_by["text"].argmax(1)))
        if stage == "val":
            assert found["val_loss"] == pytest.approx(out.loss.item()), "of six rows, one batch"


def test_the_logged_lambda_is_the_one_the_model_predicts_with(tmp_path, data):
    model = classifier(data)
    runner = fit(tmp_path, data, model, epochs=1)
    assert runner.global_step == 3, "so that an average has moved"
    assert values(runner)["weight"] == pytest.approx(model.eval()(data.splits["val"].inputs).weight.item())


def test_the_learning_rate_drops_once_after_its_part_of_the_epochs(tmp_path, data):
    rates = Rates()
    model = classifier(data, lr=0.5, lr_scheduler=step_at(0.6, 0.25))
    fit(tmp_path, data, model, epochs=5, limit_train_batches=1, callbacks=[rates])
    assert rates.seen == [0.5, 0.5, 0.5, 0.125, 0.125]


@pytest.mark.parametrize("decay_at", [0.0, 0.2, 0.5])
def test_the_learning_rate_drops_only_once(tmp_path, data, decay_at):
    rates = Rates()
    model = classifier(data, lr=0.5, lr_scheduler=step_at(decay_at, 0.5))
    fit(tmp_path, data, model, epochs=5, limit_train_batches=1, callbacks=[rates])
    first = max(1, round(5 * decay_at))
    assert rates.seen == [0.5] * first + [0.25] * (5 - first)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_has_the_settings_it_is_given_and_a_schedule_of_its_own_length(tmp_path, data):
    first = fit(tmp_path, data, classifier(data, lr=0.5, lr_scheduler=step_at(0.5)), epochs=2)
    first.save_checkpoint(tmp_path / "at_2.ckpt")
    rates, model = Rates(), classifier(data, optimizer=sgd(lr=0.25, momentum=0.5, weight_decay=0.0), lr_scheduler=step_at(0.75))
    checkpoint = str(tmp_path / "at_2.ckpt")
    again = fit(tmp_path / "again", data, model, ckpt_path=checkpoint, epochs=8, limit_train_batches=1, callbacks=[rates])
    assert rates.seen == pytest.approx([0.25, 0.25, 0.25, 0.25, 0.025, 0.025])
    (group,) = again.optimizers[0].param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.0)


def test_a_process_without_rows_of_a_batch_evaluates_nothing_of_it(data):
    model, split = classifier(data).eval(), data.splits["val"]
    nothing = ({modality: x[:0] for modality, x in split.inputs.items()}, split.target[:0])
    model.validation_step(nothing, 0)
    model.validation_step((split.inputs, split.target), 1)
    assert model.val_metrics.compute()["loss"].isfinite()


def test_a_run_bounded_by_steps_keeps_its_learning_rate(tmp_path, data):
    rates = Rates()
    runner = fit(tmp_path, data, classifier(data, lr=0.5), epochs=-1, max_steps=5, callbacks=[rates])
    assert runner.global_step == 5
    assert rates.seen == [0.5, 0.5]


def test_a_seed_gives_the_same_model_again(tmp_path, features):
    runs = []
    for folder in ("one", "two"):
        data = Features(features, batch_size=13)
        model = classifier(data)
        runs.append((values(fit(tmp_path / folder, data, model)), model.state_dict()))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


def test_a_checkpoint_gives_the_model_back(tmp_path, data):
    model = classifier(data, "iprm-no-ema", encoders={"text": "linear"}, feature_dim=5)
    runner = fit(tmp_path, data, model, epochs=1)
    restored = FusionClassifier.load_from_checkpoint(runner.checkpoint_callback.best_model_path, weights_only=True)
    split = data.splits["test"]
    for one, other in zip(restored.eval()(split.inputs), model.eval()(split.inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_interrupted_run_is_continued_with_its_lambda_and_count_of_steps(tmp_path, data):
    model, continued = classifier(data), classifier(data)
    first = fit(tmp_path, data, model, epochs=2)
    checkpoint = str(tmp_path / "at_2.ckpt")
    first.save_checkpoint(checkpoint)
    fit(tmp_path / "second", data, continued, ckpt_path=checkpoint, epochs=3, limit_train_batches=0)
    assert continued.fusion.steps == model.fusion.steps == 6
    torch.testing.assert_close(continued.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ("sum", {}, "model with method 'iprm', this one has 'sum'"),
        ("iprm", {"feature_dim": 9}, "model with feature_dim 8, this one has 9"),
        ("iprm", {"encoders": {"text": "linear"}}, "model with encoders {}, this one has {'text': 'linear'}"),
        ("iprm", {"method_options": {"alpha": 0.5}}, "model with method_options {}, this one has {'alpha': 0.5}"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_the_first_that_differs(tmp_path, data, made, options, message):
    runner = fit(tmp_path, data, classifier(data), epochs=1)
    with quiet_lightning(), pytest.raises(InputError, match=message):
        runner.test(classifier(data, made, **options), datamodule=data, ckpt_path="best", weights_only=True)


def test_a_prediction_is_the_softmax_of_the_logits_with_the_target_beside_it(data):
    model = classifier(data).eval()
    split = data.splits["val"]
    row = model.predict_step((split.inputs, split.target), 0)
    torch.testing.assert_close(row["probability"], model(split.inputs).logits.softmax(1))
    assert row["target"] is split.target


def test_a_unimodal_method_predicts_from_its_modality_alone(data):
    model = classifier(data, "unimodal-audio").eval()
    inputs = dict(data.splits["val"].inputs)
    logits = model(inputs).logits
    assert model(inputs | {"text": inputs["text"] + 1}).logits.equal(logits)
    assert not model(inputs | {"audio": inputs["audio"] + 1}).logits.equal(logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "iprmm"}, "method: unknown name 'iprmm': did you mean 'iprm'"),
        ({"method_options": {"alhpa": 0.5}}, "option of method 'iprm' 'alhpa': did you mean 'alpha'"),
        ({"method_options": {"alpha": 2.0}}, "alpha: expected a number from 0 to 1, got 2.0"),
        ({"encoders": {"audio": "cnnn"}}, "encoder of modality 'audio': unknown encoder 'cnnn': did you mean 'cnn'"),
        ({"lr": -0.1}, r"optimizer\.lr: expected a number from 0 up, got -0.1"),
        ({"lr": float("nan")}, r"optimizer\.lr: expected a number from 0 up, got nan"),
        ({"lr": "fast"}, r"optimizer\.lr: expected a number from 0 up, got 'fast'"),
        ({"optimizer": sgd(momentum=1.5)}, r"optimizer\.momentum: expected a number from 0 to 1, got 1.5"),
        ({"optimizer": sgd(weight_decay=-1)}, r"optimizer\.weight_decay: expected a number from 0 up, got -1"),
        ({"optimizer": "torch.optim.AdmW"}, r"unknown optimizer 'torch\.optim\.AdmW': did you mean 'torch\.optim\.AdamW'"),
        ({"optimizer": "torch.nn.Linear"}, "optimizer: expected a subclass of Optimizer, got torch.nn.Linear"),
        ({"optimizer": {"class_path": "SGD", "lr": 1}}, "optimizer: expected a class_path and init_args"),
        ({"optimizer": {"class_path": "SGD", "init_args": {"beta": 1}}}, "optimizer SGD: .*unexpected keyword argument 'beta'"),
        ({"lr_scheduler": "StepL"}, "unknown lr_scheduler 'StepL': did you mean 'StepLR'"),
        ({"lr_scheduler": step_at(7)}, "lr_scheduler: fraction: expected a number from 0 to 1, got 7"),
        ({"lr_scheduler": step_at(gamma=float("inf"))}, "lr_scheduler: gamma: expected a number from 0 up, got inf"),
        ({"modality_options": {"audio": {"lr_scal": 1}}}, "unknown option of modality 'audio' 'lr_scal': did you mean 'lr_s"),
        ({"modality_options": {"audio": {"lr_scale": -1}}}, "lr_scale of modality 'audio': expected a number from 0 up"),
        ({"modality_options": {"audio": {"freeze": -1}}}, "freeze of 'audio': expected true, or a number of epochs from 0"),
        ({"modality_options": {"sound": {}}}, "unknown modality in modality_options 'sound'"),
    ],
)
def test_settings_that_cannot_be_are_named(data, options, message):
    with pytest.raises(InputError, match=message):
        classifier(data, **options).check_training(2)


# performance options


def images(rows=32):
    torch.manual_seed(3)
    return {"image": torch.randn(rows, 1, 12, 12), "text": torch.randn(rows, 6)}, torch.arange(rows) % 3


def image_classifier(**options):
    L.seed_everything(0, verbose=False)
    return FusionClassifier({"image": [1, 12, 12], "text": [6]}, 3, feature_dim=8, **options)


@pytest.mark.parametrize("options", [{"channels_last": True}, {"compile": "aot_eager"}, {"cuda_graph": True}])
def test_an_option_of_speed_changes_neither_names_nor_results(options):
    plain, fast = image_classifier(), image_classifier(**options)
    assert list(fast.state_dict()) == list(plain.state_dict())
    for seed in range(2):
        torch.manual_seed(seed)
        (_, one), (_, other) = (model.driver.run(*images()) for model in (plain, fast))
        torch.testing.assert_close(other.loss, one.loss)
        one.loss.backward()
        other.loss.backward()
    gradients = [[parameter.grad for parameter in model.parameters()] for model in (plain, fast)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_channels_last_is_the_format_of_convolutions_and_of_what_they_see():
    model, seen = image_classifier(channels_last=True), []
    convolution = next(module for module in model.encoders["image"].modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inputs, _ = images()
    model.encode({**inputs, "image": inputs["image"].expand(-1, 3, -1, -1)[:, :1]})
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    wide = [p for p in model.encoders.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert wide
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


def test_compilation_reaches_every_encoder_and_the_fusion_module():
    graphs = []

    def backend(graph, inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph.forward

    torch._dynamo.register_backend(backend, name="listing")
    torch._dynamo.reset()
    image_classifier(compile="listing", encoders={"text": "linear"}, method="sum").model.with_features(*images())
    assert len(graphs) == 3
    assert torch.conv2d in graphs[0]


def test_an_unknown_backend_of_compilation_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"unknown backend of torch\.compile 'inductr': did you mean 'inductor'"):
        image_classifier(compile="inductr")


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}])
def test_settings_of_the_trainer_reach_the_step(tmp_path, data, options):
    runner = fit(tmp_path, data, classifier(data), epochs=2, **options)
    assert runner.global_step == (4 if "accumulate_grad_batches" in options else 6)
    assert values(runner)["train_loss"] > 0


def test_strength_is_measured_on_every_micro_batch(tmp_path, data):
    model = classifier(data)
    fit(tmp_path, data, model, epochs=1, accumulate_grad_batches=3)
    assert model.fusion.steps == 3, "of one optimiser step"
