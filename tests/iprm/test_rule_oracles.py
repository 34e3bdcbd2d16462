"""The oracle of OGM, OGM-GE, MSLR and DGL against numbers worked out by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import rule_oracles as oracle
import torch
from rule_oracles import DGL, MSLR, OGM, Batch, Plain

LN3 = math.log(3)
TINY = 1e-14
#: Compare dictionaries of tensors: bit-identical, and to rounding.
same = partial(torch.testing.assert_close, rtol=0, atol=0)
near = partial(torch.testing.assert_close, rtol=TINY, atol=TINY)


# The example worked out by hand: two rows, two classes, encoders z = <w, x>, sum head with W_a = W_v = (1, 0)ᵀ and no bias.
#   audio: w = (ln 3, 0), x = (1, 3) and (-1, -3): z_a = ln 3, -ln 3.    video: w = (0, 0), x = (2, 6) and (-2, -6): z_v = 0, 0.
#   logits of audio (ln 3, 0) and (-ln 3, 0): softmax (3/4, 1/4) and (1/4, 3/4). Labels 0 and 1:  s_a = 3/4 + 3/4 = 3/2
#   logits of video (0, 0):                   softmax (1/2, 1/2)                                  s_v = 1/2 + 1/2 = 1
#   ρ_a = 3/2, ρ_v = 2/3. With alpha = (2/3) ln 2, tanh(alpha ρ_a) = tanh(ln 2) = (4 - 1) / (4 + 1) = 3/5:  k_a = 2/5, k_v = 1.
#   h = (±ln 3, 0); ∂loss/∂h of class 0, by row: (3/4 - 1) / 2 = -1/8 and (1/4 - 0) / 2 = 1/8; class 1 the opposite.
#   ∂loss/∂w_a = -1/8 (1, 3) + 1/8 (-1, -3) = (-1/4, -3/4)        ∂loss/∂w_v = (-1/2, -3/2)
#   ∂loss/∂W_a = (-1/8 ln 3 - 1/8 ln 3, the opposite) = (-ln 3 / 4, ln 3 / 4)ᵀ     ∂loss/∂W_v = 0
ALPHA = 2 / 3 * math.log(2)
X = torch.tensor([[1.0, 3.0], [-1.0, -3.0]], dtype=torch.float64)
BY_HAND = [[[Batch({"audio": X, "video": 2 * X}, torch.tensor([0, 1]))]]]


def dot(p, x):
    return (x @ p["weight"].flatten())[:, None]


def by_hand(rule, shape=(1, 1, 1, 2), batches=BY_HAND, **options):
    parameters = {
        "encoders.audio.weight": torch.tensor([LN3, 0.0], dtype=torch.float64).reshape(shape),
        "encoders.video.weight": torch.zeros(shape, dtype=torch.float64),
        "heads.audio.weight": torch.tensor([[1.0], [0.0]], dtype=torch.float64),
        "heads.video.weight": torch.tensor([[1.0], [0.0]], dtype=torch.float64),
    }
    return oracle.train(
        parameters, {"audio": dot, "video": dot}, batches, rule=rule, fusion="sum", **{"lr": 1.0, "momentum": 0.9} | options
    )


def flat(after, name):
    return after.parameters[name].flatten().tolist()


def close(expected):
    return pytest.approx(expected, rel=0, abs=TINY)


def test_ogm_by_hand():
    (after,) = by_hand(OGM(ALPHA))
    assert after.scores == close({"audio": 1.5, "video": 1.0})
    assert after.ratios == close({"audio": 3 / 2, "video": 2 / 3})
    assert after.coefficients == close({"audio": 0.4, "video": 1.0})
    assert flat(after, "encoders.audio.weight") == close([LN3 + 0.4 / 4, 0.4 * 3 / 4])
    assert flat(after, "encoders.video.weight") == close([1 / 2, 3 / 2])
    assert flat(after, "heads.audio.weight") == close([1 + LN3 / 4, -LN3 / 4])  # not modulated
    assert flat(after, "heads.video.weight") == [1, 0]


def test_ogm_with_weight_decay_by_hand():
    """Weight decay is added after the modulation: v = 2/5 (-1/4, -3/4) + 1/2 (ln 3, 0)."""
    (after,) = by_hand(OGM(ALPHA), weight_decay=0.5)
    assert flat(after, "encoders.audio.weight") == close([LN3 + 0.1 - LN3 / 2, 0.3])


def test_ogm_ge_by_hand():
    """The unbiased std of (-1/4, -3/4) is sqrt(2 (1/4)²) = √2 / 4, of (-1/2, -3/2) √2 / 2. Draws: audio (1, -2), video (3, 4).

    audio: 2/5 (-1/4, -3/4) + (√2 / 4 + 1e-8) (1, -2);    video, although k = 1: (-1/2, -3/2) + (√2 / 2 + 1e-8) (3, 4).
    """
    calls = []

    def noise(*call):
        calls.append(call)
        return torch.tensor({"audio": [1.0, -2.0], "video": [3.0, 4.0]}[call[0]]).reshape(call[2])

    (after,) = by_hand(OGM(ALPHA, noise=noise))
    assert calls == [("audio", 0, (1, 1, 1, 2), 0), ("video", 0, (1, 1, 1, 2), 0)]
    audio, video = math.sqrt(2) / 4 + 1e-8, math.sqrt(2) / 2 + 1e-8
    assert after.gradients["encoders.audio.weight"].flatten().tolist() == close([-0.1 + audio, -0.3 - 2 * audio])
    assert after.gradients["encoders.video.weight"].flatten().tolist() == close([-0.5 + 3 * video, -1.5 + 4 * video])
    assert flat(after, "heads.audio.weight") == close([1 + LN3 / 4, -LN3 / 4])


def test_only_tensors_of_4_dimensions_are_modulated_unless_all_are():
    plain = by_hand(Plain())[0].parameters
    for shape in ((1, 1, 2), (1, 2), (1, 1, 1, 1, 2)):
        same(by_hand(OGM(ALPHA), shape)[0].parameters, {n: p.reshape(shape) if "enc" in n else p for n, p in plain.items()})
        assert flat(by_hand(OGM(ALPHA, modulate="all"), shape)[0], "encoders.audio.weight") == close([LN3 + 0.1, 0.3])


def test_equal_scores_slow_nobody():
    """Two equal modalities: ρ = 1, and alpha ρ would have been felt."""
    equal = [[[Batch({"audio": X, "video": X}, torch.tensor([0, 1]))]]]
    parameters = {f"encoders.{m}.weight": torch.ones(1, 1, 1, 2) for m in ("audio", "video")}
    parameters |= {f"heads.{m}.weight": torch.tensor([[1.0], [0.0]]) for m in ("audio", "video")}
    encoders = {"audio": dot, "video": dot}
    runs = [oracle.train(parameters, encoders, equal, rule=rule, fusion="sum", lr=1.0)[0] for rule in (Plain(), OGM(5.0))]
    assert runs[1].ratios == runs[1].coefficients == {"audio": 1.0, "video": 1.0}
    same(runs[0].parameters, runs[1].parameters)


def test_ratios_of_three_modalities():
    """s = 3/2, 1, 1/2: ρ = (3/2 + 3) / 2, (2/3 + 2) / 2, (1/3 + 1/2) / 2. Two of the three are slowed."""
    rule = OGM(0.3)
    ratios = rule.ratios({"a": 1.5, "t": 1.0, "v": 0.5})
    assert ratios == close({"a": 9 / 4, "t": 4 / 3, "v": 5 / 12})
    assert rule.coefficients(ratios) == close({"a": 1 - math.tanh(0.675), "t": 1 - math.tanh(0.4), "v": 1.0})


def test_the_concat_head_shares_its_bias_among_the_modalities():
    """W = [W_a W_v] as by hand, b = (2 ln 2, 0): each part gets ln 2 on class 0.

    audio: odds of class 0 are 3·2 and 2/3: s_a = 6/7 + 1/(1 + 2/3) = 6/7 + 3/5;   video: 2 and 2: s_v = 2/3 + 1/3 = 1.
    """
    parameters = {
        "encoders.audio.weight": torch.tensor([LN3, 0.0], dtype=torch.float64),
        "encoders.video.weight": torch.zeros(2),
        "head.weight": torch.tensor([[1.0, 1.0], [0.0, 0.0]]),
        "head.bias": torch.tensor([2 * math.log(2), 0.0], dtype=torch.float64),
    }
    (after,) = oracle.train(parameters, {"audio": dot, "video": dot}, BY_HAND, rule=OGM(1.0), lr=1.0)
    assert after.scores == close({"audio": 6 / 7 + 3 / 5, "video": 1.0})


def test_ignored_rows_are_left_out_of_loss_and_scores():
    x = torch.cat([X, torch.full((1, 2), 7.0, dtype=torch.float64)])
    ignored = [[[Batch({"audio": x, "video": 2 * x}, torch.tensor([0, 1, -100]))]]]
    (one,), (other,) = by_hand(OGM(ALPHA)), by_hand(OGM(ALPHA), batches=ignored)
    assert one.scores == other.scores
    same(one.parameters, other.parameters)
    (none,) = by_hand(OGM(ALPHA), batches=[[[Batch({"audio": X, "video": X}, torch.tensor([-100, -100]))]]])
    assert none.coefficients == {"audio": 1.0, "video": 1.0}
    assert all(not g.any() for g in none.gradients.values())


def test_scores_are_sums_over_the_micro_batches():
    """Three rows in one micro-batch or in three: the same step. The last row alone would slow video (1/4 against 1/2), the sum
    slows audio (3/4 + 3/4 + 1/4 against 3/2)."""
    rows = torch.cat([X, X[:1]])
    y = torch.tensor([0, 1, 1])
    split = [[[Batch({"audio": rows[i : i + 1], "video": 2 * rows[i : i + 1]}, y[i : i + 1]) for i in range(3)]]]
    (one,) = by_hand(OGM(ALPHA), batches=[[[Batch({"audio": rows, "video": 2 * rows}, y)]]])
    (other,) = by_hand(OGM(ALPHA), batches=split)
    assert other.scores == close({"audio": 1.75, "video": 1.5})
    assert other.coefficients["audio"] < 1
    near(one.parameters, other.parameters)
    (alone,) = by_hand(OGM(ALPHA), batches=[[split[0][0][-1:]]])
    assert alone.coefficients["audio"] == 1 > alone.coefficients["video"]


def test_shares_weigh_micro_batches_of_unequal_sizes():
    rows, y = torch.cat([X, X[:1]]), torch.tensor([0, 1, 1])
    whole = Batch({"audio": rows, "video": 2 * rows}, y)
    two, one = ({m: x[part] for m, x in whole.inputs.items()} for part in (slice(2), slice(2, 3)))
    split = [Batch(two, y[:2], share=2 / 3), Batch(one, y[2:], share=1 / 3)]
    near(by_hand(Plain(), batches=[[[whole]]])[0].parameters, by_hand(Plain(), batches=[[split]])[0].parameters)


def test_dgl_by_hand():
    """alpha = 3. Own loss of audio: logits (±ln 3, 0), ∂/∂w_a = (-1/4, -3/4) as in the fused loss by hand. Own loss of video:
    softmax 1/2, ∂/∂h_v of class 0 is ∓1/4, so ∂/∂w_v = -1/4 (2, 6) + 1/4 (-2, -6) = (-1, -3). Both times 3.

    The own head of audio gets 3 (-ln 3 / 4, ln 3 / 4)ᵀ; that of video 0. The fused head, W = 0: ∂/∂h of class 0 is ∓1/4, so
    ∂/∂W_a = (-ln 3 / 2, ln 3 / 2)ᵀ without alpha, and 0 for the columns of video.
    """
    parameters = {
        "encoders.audio.weight": torch.tensor([LN3, 0.0], dtype=torch.float64),
        "encoders.video.weight": torch.zeros(2),
        "heads.audio.weight": torch.tensor([[1.0], [0.0]]),
        "heads.video.weight": torch.tensor([[1.0], [0.0]]),
        "head.weight": torch.zeros(2, 2),
    }
    (after,) = oracle.train(parameters, {"audio": dot, "video": dot}, BY_HAND, rule=DGL(3.0), lr=1.0)
    expected = {
        "encoders.audio.weight": [-3 / 4, -9 / 4],
        "encoders.video.weight": [-3, -9],
        "heads.audio.weight": [-3 / 4 * LN3, 3 / 4 * LN3],
        "heads.video.weight": [0, 0],
        "head.weight": [-LN3 / 2, 0, LN3 / 2, 0],
    }
    assert {name: g.flatten().tolist() for name, g in after.gradients.items()} == {n: close(g) for n, g in expected.items()}


ACCURACIES = [{"audio": a, "video": 0.5} for a in (0.2, 0.4, 0.6, 0.4, 0.4, 0.8, 0.52, 0.6, 0.6, 0.6)]


def test_mslr_factors_by_hand():
    """Audio, init 3. Window: epoch 6 follows acc(5) = .8, the five before it average .4: 3·2. Epoch 7 follows acc(6) = .52, and
    the mean of .4 .6 .4 .4 .8 is .52: 3·1. Cumulative: after 5 epochs .4 / .4, after 10 .6 / mean(.8 .52 .6 .6 .6) = .6 / .624.
    """
    init = {"audio": 3.0, "video": 0.5}
    factors = {form: [MSLR(form, init, ACCURACIES).factor("audio", e) for e in range(11)] for form in ("window", "cumulative")}
    assert factors["window"][:8] == close([3, 3, 3, 3, 3, 3, 6, 3])
    assert factors["cumulative"] == close([3] * 10 + [3 * 0.6 / 0.624])
    assert MSLR("cumulative", init, [{"audio": 0.5 + 0.1 * e} for e in range(5)]).factor("audio", 5) == close(3 * 0.9 / 0.7)
    assert MSLR("window", init, ACCURACIES).factor("video", 9) == 0.5
    assert [MSLR("keep", init).factor("audio", e) for e in (0, 50)] == [3, 3]
    with pytest.raises(ValueError, match="accuracies: expected those of 11 epochs, got 10"):
        MSLR("window", init, ACCURACIES).factor("audio", 11)


def test_swapped_data_swap_the_slowed_modality():
    """By hand, with the parts of audio and video exchanged: the same numbers under the other name."""
    rule, names = OGM(ALPHA), {"audio": "video", "video": "audio"}
    (one,) = by_hand(rule)
    parameters = {
        "encoders.audio.weight": torch.zeros(1, 1, 1, 2),
        "encoders.video.weight": torch.tensor([[[[LN3, 0.0]]]], dtype=torch.float64),
        **{f"heads.{m}.weight": torch.tensor([[1.0], [0.0]]) for m in names},
    }
    swapped = [[[Batch({"audio": 2 * X, "video": X}, torch.tensor([0, 1]))]]]
    (other,) = oracle.train(parameters, {"audio": dot, "video": dot}, swapped, rule=rule, fusion="sum", lr=1.0)
    assert other.coefficients == {names[m]: k for m, k in one.coefficients.items()}
    for m in names:
        assert flat(one, f"encoders.{m}.weight") == flat(other, f"encoders.{names[m]}.weight")


def test_a_tensor_of_one_element_gets_noise_of_the_floor():
    """OGM-GE with modulate="all" and a width of 1: the unbiased deviation of one number is taken as 0."""
    one = torch.ones(1, dtype=torch.float64)
    encoders = {m: lambda p, x: (x @ p["weight"] + p["bias"])[:, None] for m in ("audio", "video")}
    parameters = {f"encoders.{m}.{name}": v for m in encoders for name, v in (("weight", torch.ones(2)), ("bias", one))}
    parameters |= {f"heads.{m}.weight": torch.tensor([[1.0], [0.0]]) for m in encoders}
    runs = [
        oracle.train(parameters, encoders, BY_HAND, rule=OGM(0.0, (0, 0), "all", draws), fusion="sum", lr=1.0)[0]
        for draws in (None, lambda m, index, shape, step: torch.full(shape, float(index)))
    ]
    for m in encoders:
        quiet, noisy = (after.gradients[f"encoders.{m}.bias"] for after in runs)
        assert (noisy - quiet).item() == close(1e-8)  # index 1: the second tensor of its encoder
        assert torch.equal(*(after.gradients[f"encoders.{m}.weight"] for after in runs))  # index 0: draws of 0
