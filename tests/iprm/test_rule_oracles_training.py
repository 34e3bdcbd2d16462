"""The oracle of OGM, OGM-GE, MSLR and DGL on small networks: against torch.optim.SGD, neutral settings, invariances."""

from __future__ import annotations

from functools import partial

import pytest
import rule_oracles as oracle
import torch
import torch.nn.functional as F
from rule_oracles import DGL, MSLR, OGM, Batch, Plain

TINY = 1e-14
#: Compare dictionaries of tensors: bit-identical, and to rounding.
same = partial(torch.testing.assert_close, rtol=0, atol=0)
near = partial(torch.testing.assert_close, rtol=TINY, atol=TINY)
ACCURACIES = [{"audio": a, "video": 0.5} for a in (0.2, 0.4, 0.6, 0.4, 0.4, 0.8, 0.52, 0.6, 0.6, 0.6)]


# Encoders of images (weights of 4 dimensions) and of sequences (3 dimensions); random data.
WIDTHS = {"audio": 3, "text": 2, "video": 4}
CLASSES = 3


def convolution(p, x):
    y = F.conv2d(x, p["conv.weight"], p["conv.bias"], stride=2)
    return (y * p["norm.weight"][:, None, None] + p["norm.bias"][:, None, None]).tanh().mean((2, 3))


def sequence(p, x):
    return F.conv1d(x, p["conv.weight"], p["conv.bias"]).tanh().mean(2)


ENCODERS = {"audio": convolution, "text": sequence, "video": convolution}


def model(modalities=("audio", "video"), seed=0):
    """Parameters with both kinds of head; a run uses one or, in DGL, both."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for m in ENCODERS:
        kernel = (WIDTHS[m], 2, 3) if m == "text" else (WIDTHS[m], 2, 3, 3)
        shapes = {"conv.weight": kernel, "conv.bias": kernel[:1]}
        shapes |= {} if m == "text" else {"norm.weight": kernel[:1], "norm.bias": kernel[:1]}
        tensors |= {f"encoders.{m}.{name}": shape for name, shape in shapes.items()}
        tensors |= {f"heads.{m}.weight": (CLASSES, WIDTHS[m]), f"heads.{m}.bias": (CLASSES,)}
    tensors |= {"head.weight": (CLASSES, sum(WIDTHS[m] for m in modalities)), "head.bias": (CLASSES,)}
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in tensors.items()}
    return {name: v for name, v in values.items() if name.startswith("head.") or name.split(".")[1] in modalities}


def data(epochs=2, steps=2, micro_batches=1, rows=5, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def batch():
        inputs = {m: torch.randn((rows, 2, 8) if m == "text" else (rows, 2, 7, 7), generator=generator) for m in ENCODERS}
        return Batch(inputs, torch.randint(CLASSES, (rows,), generator=generator))

    return [[[batch() for _ in range(micro_batches)] for _ in range(steps)] for _ in range(epochs)]


def run(rule, modalities=("audio", "video"), epochs=None, parameters=None, **options):
    options = {"fusion": "concat", "lr": 0.3, "momentum": 0.9, "weight_decay": 0.01} | options
    parameters = model(modalities) if parameters is None else parameters
    encoders = {m: ENCODERS[m] for m in modalities}
    return oracle.train(parameters, encoders, data() if epochs is None else epochs, rule=rule, **options)


def noise(m, index, shape, step):
    seed = 10_000 * sorted(ENCODERS).index(m) + 100 * index + step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differ(one, other):
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("rule", "fusion"), [(r, f) for r in (Plain(), DGL(0.7)) for f in ("sum", "concat")], ids=str)
def test_torch_sgd_takes_the_same_steps(rule, fusion, momentum):
    """torch's cross entropy, Linear and SGD, two micro-batches per step; heads that take no part do not move."""
    epochs = data(micro_batches=2)
    after = run(rule, epochs=epochs, fusion=fusion, momentum=momentum)
    p = {name: torch.nn.Parameter(value) for name, value in model().items()}
    optimizer = torch.optim.SGD(p.values(), lr=0.3, momentum=momentum, weight_decay=0.01)
    for micro_batches, expected in zip((step for epoch in epochs for step in epoch), after, strict=True):
        optimizer.zero_grad(set_to_none=True)
        for inputs, y, _ in micro_batches:
            z = {}
            for m in ("audio", "video"):
                own = {name.split(".", 2)[2]: value for name, value in p.items() if name.startswith(f"encoders.{m}.")}
                z[m] = convolution(own, inputs[m].double())
            own = {m: F.linear(z[m], p[f"heads.{m}.weight"], p[f"heads.{m}.bias"]) for m in z}
            seen = {m: features.detach() for m, features in z.items()} if isinstance(rule, DGL) else z
            if fusion == "concat":
                fused = F.linear(torch.cat(list(seen.values()), 1), p["head.weight"], p["head.bias"])
            else:
                fused = sum(F.linear(seen[m], p[f"heads.{m}.weight"], p[f"heads.{m}.bias"]) for m in z)
            loss = F.cross_entropy(fused, y)
            if isinstance(rule, DGL):
                loss = loss + 0.7 * (F.cross_entropy(own["audio"], y) + F.cross_entropy(own["video"], y))
            (loss / 2).backward()
        optimizer.step()
        near({name: value.detach() for name, value in p.items()}, expected.parameters)
    idle = "head." if fusion == "sum" else "heads." if isinstance(rule, Plain) else "nothing"
    assert differ(model(), after[-1].parameters) == {name for name in p if not name.startswith(idle)}


@pytest.mark.parametrize("form", ["window", "cumulative"])
def test_mslr_is_torch_sgd_with_parameter_groups(form):
    """Gradients from the run itself, steps by torch.optim.SGD whose groups get their rate before each epoch."""
    rule = MSLR(form, {"audio": 0.5, "video": 2.0}, ACCURACIES)
    after = run(rule, epochs=data(epochs=11, steps=2, rows=2), fusion="sum", lr=lambda epoch: 0.1 * 0.9**epoch)
    p = {name: torch.nn.Parameter(value) for name, value in model().items()}
    kinds = ("encoders", "heads") if form == "window" else ("encoders",)
    groups = {m: [v for name, v in p.items() if name.split(".")[0] in kinds and name.split(".")[1] == m] for m in rule.init}
    rest = [v for name, v in p.items() if not any(v is other for group in groups.values() for other in group)]
    optimizer = torch.optim.SGD([{"params": g} for g in (*groups.values(), rest)], lr=1.0, momentum=0.9, weight_decay=0.01)
    for step, expected in enumerate(after):
        epoch = step // 2
        for group, factor in zip(optimizer.param_groups, [*(rule.factor(m, epoch) for m in groups), 1.0], strict=True):
            group["lr"] = 0.1 * 0.9**epoch * factor
        for name, value in p.items():
            value.grad = expected.gradients[name]
        optimizer.step()
        near({name: value.detach() for name, value in p.items()}, expected.parameters)


@pytest.mark.parametrize("fusion", ["sum", "concat"])
@pytest.mark.parametrize(
    "rule",
    [OGM(0.0), OGM(0.0, modulate="all"), OGM(2.0, window=(2, 9)), MSLR("keep", {"audio": 1.0, "video": 1.0})],
    ids=["ogm", "ogm-all", "before-its-window", "mslr"],
)
def test_neutral_settings_are_the_plain_run(rule, fusion):
    for one, other in zip(run(Plain(), fusion=fusion), run(rule, fusion=fusion), strict=True):
        same(one.parameters, other.parameters)


@pytest.mark.parametrize("ge", [False, True], ids=["ogm", "ogm-ge"])
def test_the_window_includes_both_of_its_epochs(ge):
    """One step per epoch, window 1..2 of 0..3: which gradients differ from those of plain SGD at the same parameters."""
    epochs = data(epochs=4, steps=1)
    after = run(OGM(0.5, (1, 2), noise=noise if ge else None), epochs=epochs)
    plain = run(Plain(), epochs=epochs, parameters=model())
    same(after[0].parameters, plain[0].parameters)
    for e in (1, 2, 3):
        restart = run(Plain(), epochs=epochs[e : e + 1], parameters=after[e - 1].parameters)  # raw gradients at the same place
        changed = {n for n, g in restart[0].gradients.items() if g is not None and not torch.equal(g, after[e].gradients[n])}
        slowed = {m for m, k in after[e].coefficients.items() if k < 1}
        expected = {f"encoders.{m}.conv.weight" for m in (WIDTHS if ge else slowed) if m != "text"} if e < 3 else set()
        assert changed == expected
        assert len(slowed) == (1 if e < 3 else 0)


@pytest.mark.parametrize("fusion", ["sum", "concat"])
@pytest.mark.parametrize(
    "rule",
    [Plain(), OGM(0.8, modulate="all"), OGM(0.8, noise=noise), DGL(0.5), MSLR("keep", {"audio": 0.5, "video": 2.0})],
    ids=["plain", "ogm", "ogm-ge", "dgl", "mslr"],
)
def test_the_order_of_the_modalities_does_not_matter(rule, fusion):
    swapped = model()
    swapped["head.weight"] = swapped["head.weight"].roll(WIDTHS["video"], 1)  # the columns of video come first
    one, other = run(rule, fusion=fusion)[-1], run(rule, ("video", "audio"), parameters=swapped, fusion=fusion)[-1]
    back = other.parameters | {"head.weight": other.parameters["head.weight"].roll(-WIDTHS["video"], 1)}
    near(one.parameters, back)
    assert other.scores == pytest.approx(one.scores, rel=TINY)


def test_three_modalities_modulate_convolutions_of_images_only():
    """Text and an image modality are slowed; the convolution over the sequence has 3 dimensions."""
    trio = ("audio", "text", "video")
    after, raw = (run(rule, trio, parameters=model(trio))[0] for rule in (OGM(0.8), Plain()))
    slowed = {m for m, k in after.coefficients.items() if k < 1}
    assert "text" in slowed
    assert len(slowed) == 2
    for name, g in after.gradients.items():
        if g is not None:
            k = after.coefficients[name.split(".")[1]] if name.endswith("conv.weight") and "text" not in name else 1.0
            assert torch.equal(g, k * raw.gradients[name]), name


def test_noise_is_drawn_once_per_modulated_tensor_and_step_of_the_window():
    """Steps count through the epochs, those before the window included; accumulation draws once per step."""
    calls = []

    def counted(m, index, shape, step):
        calls.append((m, index, shape, step))
        return noise(m, index, shape, step)

    run(OGM(0.5, (1, 1), noise=counted), ("audio", "text", "video"), epochs=data(epochs=3, steps=2, micro_batches=2))
    assert calls == [(m, 0, (WIDTHS[m], 2, 3, 3), step) for step in (2, 3) for m in ("audio", "video")]


def test_two_halves_are_one_batch():
    epochs = data(micro_batches=2)
    whole = [
        [
            [Batch({m: torch.cat([b.inputs[m] for b in step]) for m in ENCODERS}, torch.cat([b.target for b in step]))]
            for step in steps
        ]
        for steps in epochs
    ]
    for rule in (OGM(0.8), OGM(0.8, modulate="all", noise=noise), DGL()):
        near(run(rule, epochs=epochs)[-1].parameters, run(rule, epochs=whole)[-1].parameters, rtol=1e-13, atol=1e-13)


def test_the_arguments_are_left_as_they_are():
    parameters = model()
    run(OGM(0.8, noise=noise), parameters=parameters)
    same(parameters, model())
