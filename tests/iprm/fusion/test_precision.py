"""16-mixed on a CPU: unscaled gradients equal those without a `GradScaler`; steps that overflow are skipped."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from iprm import ProbeRebalance
from iprm.data.datasets.features import Features
from iprm.training.classifier import FusionClassifier
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from training import classifier, fit

MODALITIES = ("sound", "image", "text")
SCALE = 2.0**16  # initial scale of GradScaler
ROUNDING = 2.0**-11  # of float16, relative


def step(count: int, half: bool, scaler: torch.amp.GradScaler | None = None, **options) -> tuple[ProbeRebalance, Tensor]:
    """A module of `count` modalities after a backward pass, and its feature gradients, still scaled if the loss was."""
    torch.manual_seed(0)
    fusion = ProbeRebalance(16, 5, MODALITIES[:count], **options)
    x = torch.randn(count, 32, 16, requires_grad=True)
    with torch.autocast("cpu", torch.float16, enabled=half):
        loss = fusion(dict(zip(fusion.modalities, x, strict=True)), torch.randint(5, (32,))).loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    return fusion, x.grad


@pytest.mark.parametrize("options", [{}, {"mixup": "linear"}, {"passes": 1}], ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_unscaled_gradients_are_those_of_the_step_in_float32_but_for_the_rounding(count, options):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    fusion, by_features = step(count, True, scaler, **options)
    plain, expected = step(count, False, **options)
    assert close(by_features / SCALE, expected)
    optimiser = torch.optim.SGD(fusion.parameters(), lr=0.1)
    scaler.unscale_(optimiser)
    for (name, parameter), other in zip(fusion.named_parameters(), plain.parameters(), strict=True):
        assert close(parameter.grad, other.grad), name
    before = [parameter.clone() for parameter in fusion.parameters()]
    scaler.step(optimiser)
    for parameter, old in zip(fusion.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old - 0.1 * parameter.grad)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < 4 * ROUNDING * expected.norm())


class Watch(L.Callback):
    """Records the gradients of each optimiser step, and scale and parameters before and after it."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.scales: list[float] = []
        self.parameters: list[Tensor] = []

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler else 1.0)
        self.parameters.append(torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()]))

    def on_train_start(self, trainer, pl_module):
        self._keep(trainer, pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([parameter.grad.clone() for parameter in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._keep(trainer, pl_module)


def trained(folder: Path, path: str, scale: float | None) -> tuple[FusionClassifier, Watch]:
    """A run in 16-mixed with an initial scale, or in float32."""
    data, watch = Features(path, batch_size=13), Watch()
    model = classifier(data, encoders={"audio": "linear", "text": "linear"}, lr=0.1)
    scaled = [] if scale is None else [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]
    fit(folder, data, model, plugins=scaled, callbacks=[watch])
    return model, watch


def test_the_optimiser_of_a_run_is_given_unscaled_gradients_and_steps(tmp_path, features):
    _, watch = trained(tmp_path / "half", features, SCALE)
    _, plain = trained(tmp_path / "plain", features, None)
    assert watch.scales == [SCALE] * 10, "nothing overflowed in nine steps"
    for found, expected in zip(watch.gradients[0], plain.gradients[0], strict=True):
        assert close(found, expected)
    moved, expected = (w.parameters[-1] - w.parameters[0] for w in (watch, plain))
    assert (moved - expected).norm() < 0.01 * expected.norm()


def test_steps_whose_scaled_gradients_overflow_are_left_out_at_half_the_scale_and_the_run_continues(tmp_path, features):
    model, watch = trained(tmp_path, features, 4 * SCALE)
    left_out = [not all(gradient.isfinite().all() for gradient in step) for step in watch.gradients]
    assert 0 < sum(left_out) < 9
    for step, skipped in enumerate(left_out):
        assert watch.scales[step + 1] == watch.scales[step] / (2 if skipped else 1)
        assert watch.parameters[step + 1].equal(watch.parameters[step]) == skipped
    assert model.fusion.steps == 9, "what a step that is left out measured was finite"
