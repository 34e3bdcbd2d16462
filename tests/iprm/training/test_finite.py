"""Non-finite numbers: the error names the first one, and no good checkpoint is lost or overwritten."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from feature_files import PoisonedFeatures
from iprm.data.datasets.features import Features
from iprm.fusion.output import FusionOutput
from iprm.training.classifier import FusionClassifier
from iprm.training.finite import FiniteGuard, NonFiniteError, check_state
from torch import nn
from training import classifier, fit, trainer

GOOD = torch.ones(2, 3)
NAN = torch.tensor([[1.0, 2.0], [math.nan, 1.0]])
INFINITE = torch.tensor([[1.0, -math.inf]])


def watch(guard, step, *, inputs=GOOD, features=GOOD, loss=1.0, logits=GOOD, target=True):
    """One step with modality `sound`, which is finite, and `text`."""
    output = FusionOutput(torch.tensor(loss) if target else None, logits, {})
    guard.watch(step, {"sound": GOOD, "text": inputs}, {"sound": GOOD, "text": features}, output)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"inputs": NAN}, "training step 7: modality 'text': its input is not finite"),
        ({"inputs": INFINITE}, "training step 7: modality 'text': its input is not finite"),
        ({"features": NAN}, "training step 7: modality 'text': its encoder gives features that are not finite"),
        ({"loss": math.nan}, "training step 7: the loss is not finite"),
        ({"logits": NAN, "target": False}, "training step 7: the logits are not finite"),
        ({"inputs": NAN, "features": NAN, "loss": math.nan}, "training step 7: modality 'text': its input is not finite"),
        ({"features": NAN, "loss": math.nan}, "training step 7: modality 'text': its encoder gives features"),
    ],
)
def test_on_the_cpu_a_faulty_step_ends_the_run_at_once_by_its_first_cause(fault, message):
    guard = FiniteGuard("training step")
    for step in range(7):
        watch(guard, step, target=fault.get("target", True))
    with pytest.raises(NonFiniteError, match=message):
        watch(guard, 7, **fault)


def test_the_first_faulty_step_stays_the_one_that_is_named():
    guard = FiniteGuard("training step")
    for step, fault in enumerate(({"features": NAN}, {"features": NAN}, {"inputs": NAN})):
        with pytest.raises(NonFiniteError, match="training step 0: modality 'text': its encoder"):
            watch(guard, step, **fault)


def test_finite_steps_pass_and_nothing_was_seen_before_the_first():
    guard = FiniteGuard("training step")
    guard.look()
    watch(guard, 0, inputs=torch.tensor([[3e38, -3e38]]))
    guard.look()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integer_inputs_pass(dtype):
    watch(FiniteGuard("training step"), 0, inputs=torch.tensor([[1, 2]]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_of_a_type_and_no_rows_pass_and_infinities_that_cancel_do_not(dtype):
    guard, most = FiniteGuard("training step"), torch.finfo(dtype).max
    watch(guard, 0, inputs=torch.full((99, 9), most, dtype=dtype))
    watch(guard, 1, inputs=torch.empty(0, 9, dtype=dtype))
    with pytest.raises(NonFiniteError, match="training step 2: modality 'text': its input"):
        watch(guard, 2, inputs=torch.tensor([[math.inf, -math.inf]], dtype=dtype))


@pytest.mark.gpu
def test_on_a_gpu_it_looks_every_interval_and_names_the_first_faulty_step():
    guard, good, bad = FiniteGuard("training step", interval=3), GOOD.cuda(), NAN.cuda()

    def step(number, x):
        guard.watch(number, {"text": x}, {"text": good}, FusionOutput(good.sum(), good, {}))

    step(0, good)
    step(1, bad)
    with pytest.raises(NonFiniteError, match="training step 1: modality 'text'"):
        step(2, bad)


def test_a_state_is_checked_parameter_by_parameter_and_buffer_by_buffer():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    check_state(module, 4)
    module[1].running_mean[1] = math.inf
    with pytest.raises(NonFiniteError, match=r"after training batch 4: 1\.running_mean is not finite, no checkpoint"):
        check_state(module, 4)
    module[0].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"after training batch 4: 0\.weight and 1 more is not finite"):
        check_state(module, 4)


def test_a_state_without_floating_numbers_passes():
    module = nn.Module()
    module.register_buffer("count", torch.tensor(3))
    check_state(module, 0)


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_run_that_meets_nan_stops_with_step_and_modality_named_and_its_last_checkpoint_intact(tmp_path, features):
    """39 rows in batches of 10: step 5 is the second of the second epoch."""
    unharmed, model = Features(features, batch_size=10), PoisonedFeatures(features, poisoned_step=5)
    kept = fit(tmp_path / "unharmed", unharmed, classifier(unharmed), epochs=1).checkpoint_callback
    runner = trainer(tmp_path / "harmed", epochs=3)
    with pytest.raises(NonFiniteError, match=r"^training batch 5: modality 'text': its input is not finite$"):
        runner.fit(classifier(model), datamodule=model)

    (left,) = (tmp_path / "harmed").rglob("*.ckpt")
    restored = FusionClassifier.load_from_checkpoint(left, weights_only=True)
    expected = FusionClassifier.load_from_checkpoint(kept.best_model_path, weights_only=True)
    torch.testing.assert_close(restored.state_dict(), expected.state_dict(), rtol=0, atol=0)
    (tested,) = runner.test(restored, datamodule=unharmed, verbose=False)
    assert math.isfinite(tested["test_loss"])


def test_nan_in_validation_names_the_training_step_it_followed(tmp_path, features):
    data = PoisonedFeatures(features, poisoned_step=8, stage="validation")
    with pytest.raises(
        NonFiniteError, match=r"^training batch 8, validation batch 0: modality 'text': its input is not finite$"
    ):
        fit(tmp_path, data, classifier(data), epochs=3)
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1, "of the first epoch"


def test_a_model_that_is_not_finite_does_not_replace_a_checkpoint(tmp_path, features):
    data = Features(features)
    model = classifier(data)
    runner = fit(tmp_path, data, model, epochs=1)
    path = tmp_path / "last.ckpt"
    runner.save_checkpoint(path)
    before = digest(path)
    model.encoders["text"][1].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"after training batch 1: encoders\.text\.1\.weight is not finite"):
        runner.save_checkpoint(path)
    assert digest(path) == before


def test_a_run_whose_weights_overflow_stops(tmp_path, features):
    data = Features(features)
    with pytest.raises(NonFiniteError, match=r"^training batch \d+"):
        fit(tmp_path, data, classifier(data, lr=1e30), epochs=5)
    assert not list(tmp_path.rglob("*.ckpt"))
