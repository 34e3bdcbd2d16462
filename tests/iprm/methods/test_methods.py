"""The fusion methods by name: one interface, and for each baseline the formula it stands for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from iprm.fusion.module import FusionModule
from iprm.methods import METHODS, build

B, C = 16, 5
WIDTHS = {"x": 8, "y": 12}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(B, width, generator=generator) for name, width in WIDTHS.items()}
    return features, torch.randint(C, (B,), generator=generator)


def make(name, **options):
    torch.manual_seed(0)
    return build(name, WIDTHS, C, tuple(WIDTHS), **options).fusion


@pytest.mark.parametrize("name", [*(name for name in METHODS if name != "unimodal"), "unimodal-x", "unimodal-y"])
def test_every_method_trains_and_predicts(name, data):
    method = make(name)
    out = method(*data)
    out.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())
    assert out.logits.shape == (B, C)
    more = ["mix"] if name.startswith("iprm") else ["fused"] if name == "dgl" else []
    assert set(out.logits_by) == {*method.modalities, *more}
    assert sum(out.losses_by.values()).item() == pytest.approx(out.loss.item())
    assert method.eval()(data[0]).loss is None


def test_sum_learns_from_the_sum_alone(data):
    features, target = data
    method = make("sum")
    out = method(features, target)
    torch.testing.assert_close(out.logits, method.heads["x"](features["x"]) + method.heads["y"](features["y"]))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, target))


def test_joint_adds_the_unimodal_losses(data):
    features, target = data
    out, plain = make("joint")(features, target), make("sum")(features, target)
    torch.testing.assert_close(out.logits, plain.logits)
    own = sum(F.cross_entropy(logits, target) for logits in out.logits_by.values())
    torch.testing.assert_close(out.loss, plain.loss + own)


def test_concat_is_one_head_whose_parts_sum_to_it(data):
    features, target = data
    method = make("concat")
    out = method(features, target)
    torch.testing.assert_close(out.logits, method.head(torch.cat([features["x"], features["y"]], dim=1)))
    torch.testing.assert_close(out.logits_by["x"], features["x"] @ method.head.weight[:, :8].T + method.head.bias / 2)


def test_weight_normalises_the_softmaxes_across_modalities(data):
    features, target = data
    method = make("weight")
    x, y = features["x"], method.projections["y"](features["y"])
    s_x, s_y = x.softmax(1), y.softmax(1)
    a_x = s_x / (s_x + s_y)
    out = method(features, target)
    torch.testing.assert_close(out.logits, method.head(a_x * x + (1 - a_x) * y))
    torch.testing.assert_close(out.logits_by["x"], method.head(a_x * x))


def test_weight_stands_softmaxes_that_underflow():
    x = torch.zeros(2, 8)
    x[:, 0] = 500  # all other places have a softmax of exactly zero in both modalities
    assert build("weight", 8, C, ("x", "y")).fusion({"x": x, "y": x.clone()}).logits.isfinite().all()


def test_unimodal_reads_its_modality_alone(data):
    features, target = data
    method = make("unimodal", modality="y")
    assert method.modalities == ("y",)
    torch.testing.assert_close(method({"y": features["y"]}, target).logits, method(features, target).logits)


def test_unimodal_says_what_it_misses():
    with pytest.raises(ValueError, match="feature_dim: expected a width for each of x, got none"):
        build("unimodal-x", {"y": 3}, C)
    with pytest.raises(TypeError, match="features: expected a mapping modality -> tensor, got Tensor"):
        build("unimodal-x", 3, C).fusion(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (None, {}, TypeError, "method: expected a name, got None"),
        ("concta", {}, ValueError, "method: unknown name 'concta': did you mean 'concat'"),
        ("unimodal-z", {}, ValueError, "did you mean 'unimodal-"),
        ("iprm", {"alhpa": 0.5}, ValueError, "option of method 'iprm' 'alhpa': did you mean 'alpha'"),
        ("iprm-linear", {"mixup": "geodesic"}, ValueError, "mixup: fixed at 'linear'"),
        ("unimodal", {}, ValueError, "method 'unimodal' needs the option 'modality'"),
        ("unimodal", {"modality": "z"}, ValueError, "modality: expected one of x, y, got 'z'"),
        ("sum", {"alpha": 0.5}, ValueError, "method 'sum' has no options, got 'alpha'"),
    ],
)
def test_unknown_names_and_options_suggest_the_closest(name, options, error, message):
    with pytest.raises(error, match=message):
        make(name, **options)


def test_a_label_out_of_range_is_an_error(data):
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 5\), got 7 in row 0"):
        make("concat")(data[0], torch.full((B,), 7))


@pytest.mark.parametrize("package", ["iprm", "iprm_kernels", "iprm.methods"])
def test_importing_brings_no_training_dependency(package):
    code = f"import sys, {package}; print([m for m in ('lightning', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_method_without_a_forward_is_refused_when_made():
    class Unfinished(FusionModule):
        pass

    with pytest.raises(TypeError, match=r"abstract class Unfinished.*forward"):
        Unfinished(3, C, ("x", "y"))
