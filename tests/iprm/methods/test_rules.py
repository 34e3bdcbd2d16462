"""Training rules against formulas written from the papers alone, and against themselves: neutral settings, accumulation, scaled
gradients, several processes, resumption, and batches at the edge."""

from __future__ import annotations

import functools

import balanced
import pytest
import rule_oracles as oracle
import torch
from balanced import balancer, batches, run_processes, state, train
from iprm.errors import InputError
from torch.func import functional_call

EXACT = {"rtol": 1e-12, "atol": 1e-12}
TWO, THREE = ("audio", "image"), ("audio", "image", "touch")
#: What each rule is trained with here; the window leaves some epochs out.
RULES = {
    "ogm": ("ogm", {"alpha": 0.7, "window": (0, 1)}),
    "ogm-ge": ("ogm-ge", {"alpha": 0.7, "window": (0, 1)}),
    "ogm-ge of all parameters, by sum fusion": ("ogm-ge", {"alpha": 0.7, "fusion": "sum", "modulate": "all"}),
    "mslr by a window": ("mslr", {"initial": {"audio": 0.9, "image": 1.1}}),
    "mslr cumulative": ("mslr", {"schedule": "cumulative"}),
    "mslr kept": ("mslr", {"schedule": "keep", "initial": {"audio": 0.5}}),
    "dgl": ("dgl", {"alpha": 0.6}),
    "ensemble": ("ensemble", {}),
    "iprm": ("iprm", {}),
}
ALL = pytest.mark.parametrize("rule", RULES)


def accuracies(epoch: int) -> dict[str, float]:
    return {"audio": 0.5 + 0.03 * (epoch % 4), "image": 0.3 + 0.02 * epoch, "touch": 0.4}


def course(b, all_batches, epochs, steps, accumulate=1):
    """States of the model after every optimiser step."""
    found = []
    for epoch in range(epochs):
        b.start_epoch(epoch)
        own = all_batches[epoch * steps * accumulate : (epoch + 1) * steps * accumulate]
        for number, (inputs, target) in enumerate(own):
            b.step(inputs, target)
            if (number + 1) % accumulate == 0:
                found.append(state(b))
        b.end_epoch(accuracies(epoch))
    return found


# formulas


def expected_course(b, all_batches, rule, fusion, epochs, steps, accumulate=1):
    parameters = {name.removeprefix("fusion."): p.detach().clone() for name, p in b.model.named_parameters()}
    of = {m: functools.partial(functional_call, encoder) for m, encoder in b.model.encoders.items()}
    micro = [oracle.Batch(inputs, target) for inputs, target in all_batches]
    grouped = [micro[i : i + accumulate] for i in range(0, len(micro), accumulate)]
    by_epoch = [grouped[epoch * steps : (epoch + 1) * steps] for epoch in range(epochs)]
    sgd = balanced.SGD.keywords
    return oracle.train(
        parameters,
        of,
        by_epoch,
        rule=rule,
        fusion=fusion,
        lr=sgd["lr"],
        momentum=sgd["momentum"],
        weight_decay=sgd["weight_decay"],
    )


def compare(found, expected):
    assert len(found) == len(expected)
    moved = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.parameters.items():
            here = ours[name if name.startswith("encoders.") else f"fusion.{name}"]
            torch.testing.assert_close(here, value, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
            moved = max(moved, (value - expected[0].parameters[name]).abs().max().item())
    assert moved > 1e-3


def noise_of(b):
    """The draws that the rule itself will make, for the oracle: seed, count of modulated updates and modality decide them."""

    def draw(modality: str, index: int, shape: tuple[int, ...], step: int) -> torch.Tensor:
        rule = b.rule
        before, rule._host = rule._host, (rule._host[0], step)
        chosen = [torch.empty(p.shape, dtype=p.dtype) for p in noisy(b, modality)]
        drawn = rule.draws(rule.modalities.index(modality), chosen)[index]
        rule._host = before
        assert drawn.shape == shape
        return drawn

    return draw


def noisy(b, modality):
    every = list(b.model.encoders[modality].parameters())
    return every if b.rule.scope == "all" else [p for p in every if p.dim() == 4]


@pytest.mark.parametrize("modalities", [TWO, THREE], ids=len)
@pytest.mark.parametrize("fusion", ["concat", "sum"])
@pytest.mark.parametrize("modulate", ["conv", "all"])
@pytest.mark.parametrize("noise", [False, True], ids=["plain", "GE"])
def test_ogm_is_the_formula(modalities, fusion, modulate, noise):
    options = {"alpha": 0.7, "window": (1, 2), "modulate": modulate, "fusion": fusion}
    b = balancer("ogm-ge" if noise else "ogm", modalities, **options)
    data = batches(12, modalities=modalities)
    drawn = noise_of(b) if noise else None
    # the noise counts modulated updates, the formula all steps: three were before the window
    shifted = (lambda m, i, shape, step: drawn(m, i, shape, step - 3)) if drawn else None
    rule = oracle.OGM(alpha=0.7, window=(1, 2), modulate=modulate, noise=shifted)
    expected = expected_course(b, data, rule, fusion, epochs=4, steps=3)
    assert any(min(step.coefficients.values()) < 1 for step in expected if step.coefficients), "somebody is slowed"
    compare(course(b, data, epochs=4, steps=3), expected)


def test_ogm_sums_its_scores_over_an_accumulation_window():
    b = balancer("ogm", alpha=0.7, accumulate=3)
    data = batches(12, ignored=0.0)
    expected = expected_course(b, data, oracle.OGM(alpha=0.7, window=(0, 50)), "concat", epochs=2, steps=2, accumulate=3)
    compare(course(b, data, epochs=2, steps=2, accumulate=3), expected)


@pytest.mark.parametrize("schedule", ["window", "cumulative", "keep"])
def test_mslr_is_the_formula(schedule):
    initial = {"audio": 0.9, "image": 1.1}
    b = balancer("mslr", schedule=schedule, initial=initial)
    epochs, data = 12, batches(24)
    rule = oracle.MSLR(form=schedule, init=initial, accuracies=[accuracies(epoch) for epoch in range(epochs)])
    expected = expected_course(b, data, rule, "sum", epochs, steps=2)
    compare(course(b, data, epochs, steps=2), expected)


def test_dgl_is_the_formula():
    b, data = balancer("dgl", alpha=0.6), batches(6)
    expected = expected_course(b, data, oracle.DGL(alpha=0.6), "concat", epochs=2, steps=3)
    compare(course(b, data, epochs=2, steps=3), expected)


# equivalences


def test_ogm_without_strength_is_plain_training_bit_for_bit():
    data = batches(6)
    found, plain = course(balancer("ogm", alpha=0.0), data, 2, 3), course(balancer("concat"), data, 2, 3)
    for ours, theirs in zip(found, plain, strict=True):
        assert all(ours[name].equal(value) for name, value in theirs.items())


def test_mslr_with_rates_of_one_is_sum_fusion_bit_for_bit():
    data = batches(6)
    found, plain = course(balancer("mslr", schedule="keep"), data, 2, 3), course(balancer("sum"), data, 2, 3)
    for ours, theirs in zip(found, plain, strict=True):
        assert all(ours[name].equal(value) for name, value in theirs.items())


def test_an_ensemble_is_unimodal_models_trained_apart_bit_for_bit():
    data, b = batches(6), balancer("ensemble")
    alone = {modality: balancer(f"unimodal-{modality}") for modality in TWO}
    for modality, one in alone.items():
        weights = {name: value for name, value in b.model.state_dict().items() if name.split(".")[1] == modality}
        heads = {name: value for name, value in b.model.state_dict().items() if name.startswith(f"fusion.heads.{modality}.")}
        one.model.load_state_dict(weights | heads)
    found = course(b, data, 2, 3)[-1]
    for modality, one in alone.items():
        for name, value in course(one, [({modality: x[modality]}, y) for x, y in data], 2, 3)[-1].items():
            assert found[name].equal(value), (modality, name)
    inputs, _ = data[0]
    b.model.eval()
    torch.testing.assert_close(b.model(inputs).logits, sum(one.model.eval()({m: inputs[m]}).logits for m, one in alone.items()))


@ALL
def test_two_halves_accumulated_are_one_batch(rule):
    if rule == "iprm":
        pytest.skip("IPRM measures ω on each batch by definition")
    method, options = RULES[rule]
    whole = batches(4, ignored=0.0)
    halves = [({m: x[rows] for m, x in inputs.items()}, y[rows]) for inputs, y in whole for rows in (slice(6), slice(6, 12))]
    found = course(balancer(method, accumulate=2, **options), halves, 2, 2, accumulate=2)
    for ours, theirs in zip(found, course(balancer(method, **options), whole, 2, 2), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@ALL
def test_scaled_gradients_give_the_bits_of_unscaled_ones(rule):
    """A power of two changes no digit; what a rule sees is unscaled."""
    method, options = RULES[rule]
    data = batches(4, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found = course(balancer(method, dtype=torch.float32, scaler=scaler, **options), data, 2, 2)
    plain = course(balancer(method, dtype=torch.float32, **options), data, 2, 2)
    for ours, theirs in zip(found, plain, strict=True):
        assert all(ours[name].equal(value) for name, value in theirs.items())


def test_a_scaled_step_that_overflows_is_skipped_and_training_continues():
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    b, (one, other) = balancer("ogm-ge", dtype=torch.float32, scaler=scaler), batches(2, dtype=torch.float32)
    before = state(b)
    b.start_epoch(0)
    b.step(*one)
    assert all(before[name].equal(value) for name, value in b.model.state_dict().items())
    scaler.update(1024.0)
    b.step(*other)
    assert not any(before[name].equal(value) for name, value in b.model.state_dict().items())
    assert all(value.isfinite().all() for value in state(b).values())


@pytest.fixture(scope="module", params=[2, 4])
def of_processes(request, tmp_path_factory):
    """What each of several real processes found, by rule."""
    return run_processes(tmp_path_factory.mktemp("processes"), request.param, rules=RULES)


@ALL
def test_processes_train_as_one_does_on_the_joined_batch(of_processes, rule):
    method, options = RULES[rule]
    alone = train(method, **options)
    for found in of_processes:
        for ours, theirs in zip(found[rule], alone, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


@ALL
def test_a_restored_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path, rule):
    method, options = RULES[rule]
    data, whole, first = batches(14 * 2), balancer(method, **options), balancer(method, **options)
    second = balancer(method, **options)
    course(whole, data, 14, 2)
    for epoch in range(13):
        first.start_epoch(epoch)
        for number in range(2):
            if (epoch, number) == (9, 1):  # in the middle of an epoch
                torch.save(first.state_dict(), tmp_path / "state.pt")
            first.step(*data[2 * epoch + number])
        first.end_epoch(accuracies(epoch))
    torch.manual_seed(99)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for epoch in range(9, 14):
        if epoch > 9:
            second.start_epoch(epoch)
        for number in range(2 if epoch > 9 else 1):
            second.step(*data[2 * epoch + (number if epoch > 9 else 1)])
        second.end_epoch(accuracies(epoch))
    found = state(second)
    assert all(found[name].equal(value) for name, value in state(whole).items())


# edges


@ALL
@pytest.mark.parametrize("edge", ["one row", "one class"])
def test_batches_at_the_edge_leave_finite_parameters(rule, edge):
    method, options = RULES[rule]
    b = balancer(method, **options)
    inputs, target = batches(1, ignored=0.0)[0]
    if edge == "one row":
        inputs, target = {m: x[:1] for m, x in inputs.items()}, target[:1]
    b.start_epoch(0)
    b.step(inputs, target if edge == "one row" else torch.zeros_like(target))
    assert all(value.isfinite().all() for value in state(b).values())


def test_a_batch_without_labels_slows_nobody():
    inputs, target = batches(1)[0]
    b = balancer("ogm", alpha=0.7)
    b.start_epoch(0)
    (update,) = b.driver.updates(inputs, torch.full_like(target, -100), 0, 0, None)
    assert [value.item() for value in update.output.measures.values()] == [1.0, 1.0]


def test_equal_scores_slow_nobody_or_the_first_as_the_released_code_does():
    for form, slowed in (("paper", [False, False]), ("released", [True, False])):
        k = balancer("ogm", alpha=0.5, form=form).rule.factors(torch.tensor([3.0, 3.0]))
        assert (k < 1).tolist() == slowed


def test_the_noise_is_the_same_for_the_same_seed_and_count_and_another_for_others():
    b = balancer("ogm-ge")
    like = [torch.empty(3, 2)]
    rule = b.rule
    one = rule.draws(0, like)[0]
    assert one.equal(rule.draws(0, like)[0])
    assert not one.equal(rule.draws(1, like)[0])
    rule._host = (rule._host[0], 1)
    assert not one.equal(rule.draws(0, like)[0])


def test_measures_tell_what_a_rule_did():
    b = balancer("ogm", alpha=0.5)
    b.start_epoch(0)
    out = b.step(*batches(1)[0])
    assert set(out.measures) == {"k_audio", "k_image"}
    assert sorted(value.item() for value in out.measures.values())[0] < 1
    out = balancer("mslr", initial={"audio": 0.5}).step(*batches(1)[0])
    assert {name: value.item() for name, value in out.measures.items()} == {"rate_audio": 0.5, "rate_image": 1.0}


# refusals


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ogm", {"alpha": -1}, "alpha: expected a number from 0 up, got -1"),
        ("ogm", {"modulate": "linear"}, "modulate: expected one of 'auto', 'conv', 'all', got 'linear'"),
        ("ogm", {"window": 3}, "window: expected the first and the last epoch, got 3"),
        ("ogm", {"form": "mine"}, "form: expected one of 'paper', 'released', got 'mine'"),
        ("ogm", {"fusion": "weight"}, r"unknown fusion 'weight' \(known: concat, sum\)"),
        ("mslr", {"schedule": "smooth"}, "schedule: expected one of 'window', 'keep', 'cumulative', got 'smooth'"),
        ("mslr", {"initial": {"video": 1.0}}, "initial: expected a modality of audio, image, got 'video'"),
        ("mslr", {"initial": {"audio": 0.0}}, "initial of 'audio': expected a number above 0, got 0.0"),
        ("dgl", {"alpha": 0.0}, r"alpha: expected a number above 0, got 0\.0"),
        ("sum", {"freeze": {"video": True}}, "freeze: expected a modality of audio, image, got 'video'"),
        ("sum", {"accumulate": 0}, "accumulate: expected a whole number from 1 up, got 0"),
    ],
)
def test_options_out_of_range_are_named(method, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        balancer(method, **options)


def test_mslr_asks_for_the_accuracy_of_every_modality():
    b = balancer("mslr")
    with pytest.raises(InputError, match="accuracies: this method needs the validation accuracy of image"):
        b.end_epoch({"audio": 0.5})
    with pytest.raises(InputError, match="of audio, image"):
        b.end_epoch()


def test_a_state_within_an_accumulation_window_is_refused():
    b = balancer("sum", accumulate=2)
    b.step(*batches(1)[0])
    with pytest.raises(RuntimeError, match="gradients are being accumulated"):
        b.state_dict()
