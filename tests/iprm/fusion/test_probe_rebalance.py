"""`ProbeRebalance`: updates of its state, options, gradients and errors."""

from __future__ import annotations

import copy
import itertools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from iprm import ProbeRebalance
from iprm.fusion.early import DGL
from iprm.methods.mslr import MSLR
from watching import Watching

import iprm_kernels as ik

B, D, C = 16, 12, 5
TRIO = ("audio", "text", "video")
#: Operators that launch no kernel.
VIEWS = tuple(f"aten.{name}." for name in ("alias", "detach", "select", "slice", "unbind", "view"))


def batch(modalities=("x", "y"), widths=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = widths if isinstance(widths, dict) else dict.fromkeys(modalities, widths)
    features = {name: torch.randn(B, widths[name], generator=generator) for name in modalities}
    return features, torch.randint(C, (B,), generator=generator)


def module(*args, **options):
    torch.manual_seed(0)
    return ProbeRebalance(*(args or (D, C)), **options)


def state(fusion):
    return {name: value.clone() for name, value in fusion.named_buffers()}


# λ and ω


@pytest.mark.parametrize("alpha", [0.8, 0.0, 1.0])
@pytest.mark.parametrize("start", ["paper", "released"])
def test_lambda_is_the_average_of_omega(start, alpha):
    fusion, weight = module(alpha=alpha, ema_start=start), 0.5
    for step in range(4):
        out = fusion(*batch(seed=step))
        assert out.weight.item() == pytest.approx(weight, abs=1e-6), "a step probes with the λ of the steps before"
        omega, probed = out.strength[0].item(), weight
        weight = omega if step == 0 and start == "paper" else alpha * weight + (1 - alpha) * omega
        assert fusion.weight.item() == pytest.approx(weight, abs=1e-6)
        assert fusion.steps == step + 1
        evaluated = fusion.eval()(batch()[0]).weight.item()
        fusion.train()
        assert evaluated == pytest.approx(weight if start == "paper" else probed, abs=1e-6)


@pytest.mark.parametrize(("modalities", "most"), [(("x", "y"), 5), (TRIO, 8)])
def test_beside_the_head_step_a_training_step_is_a_few_launches(modalities, most):
    """One launch averages λ, two copy λ and ω; the others sum logits and, for pairs, average logits and losses."""
    fusion, (features, target) = module(D, C, modalities), batch(modalities)
    with Watching() as watching:
        fusion(features, target)
    looking = ("aten.aminmax", "aten._local_scalar_dense")  # at labels on the CPU
    launching = [name for name in watching.seen.elements() if not name.startswith((*looking, *VIEWS))]
    head = [name for name in launching if name.startswith("iprm.linear_probe_rebalance")]
    assert len(head) == 1
    assert "iprm.average_strength.default" in launching
    assert len(launching) - 1 <= most, launching


def test_strength_is_measured_against_the_probe():
    fusion = module()
    (features, target), heads = batch(), fusion.heads
    probe = fusion.mix_heads["x_y"](ik.geodesic_mixup(features["x"], features["y"], 0.5))
    kl = torch.stack([ik.batch_kl(heads[name](features[name]), probe) for name in "xy"])
    torch.testing.assert_close(fusion(features, target).strength, ik.strength_weights(kl).detach())


def test_one_pass_learns_from_the_probe():
    features, target = batch()
    fusion = module(passes=1)
    expected = fusion.mix_heads["x_y"](ik.geodesic_mixup(features["x"], features["y"], 0.5))
    out = fusion(features, target)
    torch.testing.assert_close(out.logits_by["mix"], expected)
    torch.testing.assert_close(out.strength, module()(features, target).strength)
    assert fusion.weight == out.strength[0]


def test_linear_mixup_mixes_unnormalised_features():
    features, target = batch()
    fusion = module(mixup="linear")
    out = fusion(features, target)
    w = out.strength[0]
    torch.testing.assert_close(out.logits_by["mix"], fusion.mix_heads["x_y"](w * features["x"] + (1 - w) * features["y"]))


@pytest.mark.parametrize("options", [{}, {"passes": 1}, {"mixup": "linear"}])
def test_a_step_without_labels_probes_as_one_with_labels(options):
    features, target = batch()
    labelled, unlabelled = module(**options), module(**options)
    out, bare = labelled(features, target), unlabelled(features)
    assert bare.loss is None
    torch.testing.assert_close(bare.logits, out.logits)
    torch.testing.assert_close(state(unlabelled), state(labelled))


@pytest.mark.parametrize("options", [{}, {"passes": 1}, {"mixup": "linear"}])
def test_loss_and_prediction_are_sums(options):
    features, target = batch()
    out = module(**options)(features, target)
    torch.testing.assert_close(out.loss, sum(F.cross_entropy(logits, target) for logits in out.logits_by.values()))
    torch.testing.assert_close(out.logits, sum(out.logits_by.values()))


def test_evaluation_changes_nothing_and_has_a_loss():
    fusion = module()
    fusion(*batch())
    before = state(fusion)
    out = fusion.eval()(*batch(seed=1))
    assert out.loss.isfinite()
    torch.testing.assert_close(state(fusion), before, rtol=0, atol=0)
    torch.testing.assert_close(out.strength, before["strength"])


@pytest.mark.parametrize("options", [{}, {"passes": 1}, {"ema_start": "released"}])
def test_a_batch_that_is_not_finite_leaves_lambda_as_it_was(options):
    fusion, (features, target) = module(**options), batch()
    fusion(*batch(seed=1))
    before = state(fusion)
    features["x"][3, 2] = torch.nan
    out = fusion(features, target)
    assert out.loss.isnan()
    after = state(fusion)
    for name in ("weight", "strength", "steps"):
        assert torch.equal(after[name], before[name]), name
    assert fusion(*batch(seed=2)).loss.isfinite()


@pytest.mark.parametrize("with_target", [True, False])
def test_an_empty_batch_measures_nothing(with_target):
    fusion = module()
    fusion({name: torch.zeros(0, D) for name in "xy"}, torch.zeros(0, dtype=torch.int64) if with_target else None)
    assert fusion.steps == 0
    assert fusion.weight == 0.5


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, np.array])
@pytest.mark.parametrize(
    "number", [np.float16, np.float32, np.float64, np.longdouble, Fraction, Decimal, np.array, torch.tensor]
)
def test_numbers_of_numpy_and_torch_are_numbers(integer, number):
    fusion = ProbeRebalance(integer(D), integer(C), alpha=number(0.5), passes=integer(2))
    assert fusion.heads["x"].weight.shape == (C, D)
    assert fusion.alpha == 0.5
    assert type(fusion.alpha) is float
    assert type(fusion.passes) is type(fusion.num_classes) is int
    assert DGL(D, C, alpha=number(0.5)).alpha == 0.5
    assert MSLR(["x"], initial={"x": number(0.5)}).rates() == {"x": 0.5}


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), torch.tensor(True)], ids=repr)
def test_no_bool_is_a_number(value):
    for arguments in ({"alpha": value}, {"passes": value}, {"num_classes": value}, {"feature_dim": value}):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(arguments))}: expected"):
            ProbeRebalance(**{"feature_dim": D, "num_classes": C, **arguments})
    with pytest.raises(TypeError, match="alpha: expected a number above 0"):
        DGL(D, C, alpha=value)


def test_state_survives_saving_copying_and_narrow_types():
    fusion = module()
    for seed in range(3):
        fusion(*batch(seed=seed))
    restored = module()
    restored.load_state_dict(fusion.state_dict())
    for twin in (restored, copy.deepcopy(fusion), copy.deepcopy(fusion).bfloat16(), copy.deepcopy(fusion).half()):
        torch.testing.assert_close(state(twin), state(fusion), rtol=0, atol=0)


# three modalities


@pytest.mark.parametrize("shared", [False, True])
def test_three_modalities_average_their_pairs(shared):
    features, target = batch(TRIO)
    fusion = module(D, C, TRIO, shared_mix_head=shared)
    names = ["shared"] if shared else [f"{a}_{b}" for a, b in itertools.combinations(TRIO, 2)]
    assert list(fusion.mix_heads) == names
    out = fusion(features, target)
    mixed = []
    for pair, (a, b) in enumerate(itertools.combinations(TRIO, 2)):
        head = fusion.mix_heads[names[0 if shared else pair]]
        result = ik.probe_rebalance(
            features[a], features[b], fusion.heads[a](features[a]), fusion.heads[b](features[b]), head, 0.5
        )
        torch.testing.assert_close(out.strength[pair], result.strength)
        mixed.append(result.logits)
    torch.testing.assert_close(out.logits_by["mix"], torch.stack(mixed).mean(0))
    unimodal = [F.cross_entropy(out.logits_by[name], target) for name in TRIO]
    torch.testing.assert_close(out.loss, sum(F.cross_entropy(z, target) for z in mixed) / 3 + sum(unimodal))
    assert out.weight.shape == (3,)
    assert out.strength.shape == (3, 2)


@pytest.mark.parametrize("pairs", ["all", "random"])
def test_three_modalities_learn_as_around_any_head(pairs):
    """The operator for each pair gives the gradients of separate mixing, heads and divergences."""
    features, target = batch(TRIO)
    fusion = module(D, C, TRIO, pairs=pairs)
    general = copy.deepcopy(fusion)
    general._fused_step = general._step
    gradients = []
    for twin in (fusion, general):
        leaves = {name: x.clone().requires_grad_() for name, x in features.items()}
        twin(leaves, target).loss.backward()
        gradients.append([x.grad for x in leaves.values()] + [p.grad for p in twin.parameters()])
    torch.testing.assert_close(*gradients)


def test_random_pairs_are_all_drawn_one_a_step():
    fusion = module(D, C, TRIO, pairs="random", shared_mix_head=True)
    for step in range(24):
        before = fusion.weight.clone()
        fusion(*batch(TRIO, seed=step))
        assert (fusion.weight != before).sum() == 1
        assert fusion.steps.sum() == step + 1
    assert (fusion.steps > 0).all()


def test_a_restored_module_continues_its_draws():
    fusion, restored = (module(D, C, TRIO, pairs="random") for _ in range(2))
    for step in range(5):
        fusion(*batch(TRIO, seed=step))
    restored.load_state_dict(fusion.state_dict())
    for step in range(8):
        for twin in (fusion, restored):
            twin(*batch(TRIO, seed=step))
        assert torch.equal(fusion.steps, restored.steps)


# gradients, types, compilation


@pytest.mark.parametrize(
    ("modalities", "options"),
    [(("x", "y"), {}), (("x", "y"), {"passes": 1}), (("x", "y"), {"mixup": "linear"}), (TRIO, {})],
)
def test_gradients_reach_every_parameter_and_the_encoders(modalities, options):
    widths = {name: D + 4 * place for place, name in enumerate(modalities)}
    features, target = batch(modalities, widths)
    for x in features.values():
        x.requires_grad_()
    fusion = module(widths, C, modalities, **options)
    assert list(fusion.projections) == list(modalities[1:])
    fusion(features, target).loss.backward()
    for tensor in [*fusion.parameters(), *features.values()]:
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"passes": 1}, {"mixup": "linear"}])
def test_autocast_trains_in_bfloat16_and_keeps_lambda_in_float32(options):
    features, target = batch()
    fusion = module(**options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fusion(features, target)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == fusion.weight.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training):
    fusion = module().train(training)
    compiled = torch.compile(copy.deepcopy(fusion), fullgraph=True, backend="aot_eager")
    for seed in range(2):
        expected, out = fusion(*batch(seed=seed)), compiled(*batch(seed=seed))
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(out.weight, expected.weight)


# errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 1.5}, ValueError, "alpha: expected a number from 0 to 1, got 1.5"),
        ({"alpha": "high"}, ValueError, "alpha: expected a number"),
        ({"pairs": "some"}, ValueError, "pairs: expected one of 'all', 'random', got 'some'"),
        ({"mixup": "cubic"}, ValueError, "mixup: expected one of 'geodesic', 'linear'"),
        ({"passes": 3}, ValueError, "passes: expected one of 1, 2, got 3"),
        ({"ema_start": "late"}, ValueError, "ema_start: expected one of 'paper', 'released'"),
        ({"modalities": ("x",)}, ValueError, "modalities: expected at least 2, got 1"),
        ({"modalities": "xy"}, TypeError, "modalities: expected a sequence of names"),
        ({"modalities": None}, TypeError, "modalities: expected a sequence of names, got None"),
        ({"modalities": ("x", "x")}, ValueError, "modalities: expected different names"),
        ({"modalities": ("x", "mix")}, ValueError, "modality 'mix': the name of a head"),
        ({"modalities": ("x", "a\nb")}, ValueError, "expected a name without control characters"),
        ({"feature_dim": {"x": 3}}, ValueError, "feature_dim: expected a width for each of x, y, got x"),
        ({"feature_dim": 0}, ValueError, "feature_dim: expected a width of at least 1"),
        ({"feature_dim": 2.5}, TypeError, "feature_dim: expected an integer width"),
        ({"num_classes": 1}, ValueError, "num_classes: expected at least 2, got 1"),
    ],
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ProbeRebalance(**{"feature_dim": D, "num_classes": C, **arguments})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: f.pop("y"), ValueError, "expected the modalities x, y, got x"),
        (lambda f: f.update(z=f["x"]), ValueError, "expected the modalities x, y, got x, y, z"),
        (lambda f: f.update(y=f["y"][0]), ValueError, r"features\['y'\]: expected shape \(B, 12\), got \(12,\)"),
        (lambda f: f.update(y=f["y"][:, :3]), ValueError, r"features\['y'\]: expected shape \(B, 12\), got \(16, 3\)"),
        (lambda f: f.update(y=f["y"][:3]), ValueError, r"features\['y'\]: expected a batch of 16"),
        (lambda f: f.update(y=f["y"].double()), TypeError, r"features\['y'\]: expected the dtype of the parameters"),
        (lambda f: f.update(y=f["y"].to("meta")), ValueError, r"features\['y'\]: expected the device of the parameters"),
        (lambda f: f.update(y=f["y"].to_sparse()), TypeError, r"features\['y'\]: expected a dense tensor"),
        (lambda f: f.update(y=[1.0]), TypeError, r"features\['y'\]: expected a tensor \(B, 12\), got list"),
    ],
)
def test_feature_errors_leave_the_state(change, error, message):
    fusion, (features, target) = module(), batch()
    change(features)
    with pytest.raises(error, match=message):
        fusion(features, target)
    assert fusion.steps == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.float(), TypeError, "target: expected integer class indices, got torch.float32"),
        (lambda t: t[:3], ValueError, r"target: expected shape \(16,\), got \(3,\)"),
        (lambda t: t.index_fill(0, torch.tensor(2), C), ValueError, r"target: expected labels in \[0, 5\), got 5 in row 2"),
        (lambda t: t.tolist(), TypeError, "target: expected a tensor"),
        (lambda t: t.to_sparse(), TypeError, "target: expected a dense tensor"),
        (lambda t: t.to("meta"), ValueError, "target: expected the device of the features"),
    ],
)
def test_target_errors_leave_the_state(change, error, message, training):
    fusion, (features, target) = module().train(training), batch()
    with pytest.raises(error, match=message):
        fusion(features, change(target))
    assert fusion.steps == 0


def test_a_refused_step_draws_no_pair():
    """The draw depends on the step count alone, which a refused step does not change."""
    fusion, (features, target) = module(D, C, TRIO, pairs="random"), batch(TRIO)
    draws = fusion._draws
    with pytest.raises(ValueError, match=r"features\['text'\]: expected shape"):
        fusion({**features, "text": features["text"][:, 1:]}, target)
    assert fusion._draws == draws
    fusion(features, target)
    assert fusion._draws == draws + 1
