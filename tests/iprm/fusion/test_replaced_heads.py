"""Heads that the user has replaced or changed are called, hooks included, in training as in evaluation, or refused by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from iprm import ProbeRebalance
from iprm.errors import InputError
from iprm.fusion.early import DGL, Concat, Weight
from iprm.fusion.late import Joint, Sum
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import iprm_kernels as ik

B, D, C = 10, 6, 4
PAIR, TRIO = ("x", "y"), ("audio", "text", "video")


# heads


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x.tanh())


class LoRA(nn.Module):
    """As peft wraps a layer: frozen weights, which it shows as its own, and a trained product of low rank."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_B(self.lora_A(x))


class Doubled(Tensor):
    """A weight that quantisation, for example, gives a product of its own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is F.linear:
            x, weight, bias = arguments
            return F.linear(x, 2 * weight.as_subclass(Tensor), bias)
        return super().__torch_function__(function, types, arguments, named or {})


def doubled(head: nn.Linear) -> nn.Module:
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Doubled))
    return head


def scaled(head: nn.Linear) -> nn.Module:
    return Scaled(head.in_features, head.out_features)


def dropped(head: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.4), head)


def normalised(head: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(head.in_features), head)


def pruned(head: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(head, "weight", 0.5)


def without_bias(head: nn.Linear) -> nn.Module:
    return nn.Linear(head.in_features, head.out_features, bias=False)


def lazy(head: nn.Linear) -> nn.Module:
    return nn.LazyLinear(head.out_features)


def perceptron(head: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Linear(head.in_features, 7), nn.ReLU(), nn.Linear(7, head.out_features))


def hooked(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda _, inputs, output: 2 * output + inputs[0][:, :1])
    return head


def pre_hooked(head: nn.Linear) -> nn.Module:
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))
    return head


def backward_hooked(head: nn.Linear) -> nn.Module:
    head.register_full_backward_hook(lambda _, inward, __: tuple(None if g is None else 2 * g for g in inward))
    return head


def backward_pre_hooked(head: nn.Linear) -> nn.Module:
    head.register_full_backward_pre_hook(lambda _, outward: tuple(3 * g for g in outward))
    return head


def patched(head: nn.Linear) -> nn.Module:
    head.forward = lambda x: F.linear(x, head.weight) - head.bias  # type: ignore[method-assign]
    return head


def computed_weight(head: nn.Linear) -> nn.Module:
    """The weight is no parameter of the head: a hypernetwork, for example, sets it."""
    made = nn.Parameter(head.weight.detach() * 2)
    del head.weight
    head.made, head.weight = made, made * 1
    head.register_forward_pre_hook(lambda own, _: setattr(own, "weight", own.made * 2))
    return head


CHANGES: list[Callable[[nn.Linear], nn.Module]] = [
    scaled, LoRA, dropped, normalised, pruned, without_bias, lazy, perceptron, hooked, pre_hooked, backward_hooked,
    backward_pre_hooked, patched, computed_weight, doubled, nn.utils.weight_norm, parametrizations.weight_norm,
    nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
]  # fmt: skip
EACH = pytest.mark.parametrize(
    "change", CHANGES, ids=lambda change: f"{change.__module__.rpartition('.')[2]}.{change.__name__}"
)
SOME = pytest.mark.parametrize("change", [LoRA, dropped, hooked, pruned, scaled], ids=lambda change: change.__name__)


def module(
    change: Callable[[nn.Linear], nn.Module], where: Sequence[str], modalities: Sequence[str] = PAIR, **options: Any
) -> Any:
    """A fusion module in float64 whose heads `where` are changed."""
    torch.manual_seed(0)
    fusion = ProbeRebalance(D, C, modalities, **options).double()
    for heads in (fusion.heads, fusion.mix_heads):
        for name in heads:
            if name in where or "all" in where:
                heads[name] = change(heads[name]).double()
    return fusion


def batch(modalities: Sequence[str] = PAIR, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = {name: torch.randn(B, D, generator=generator, dtype=torch.float64) for name in modalities}
    return features, torch.randint(C, (B,), generator=generator)


# the oracle: the step from its definition, in plain torch


def mixture(x: Tensor, y: Tensor, weight: Tensor, mixup: str) -> Tensor:
    if mixup == "linear":
        return weight * x + (1 - weight) * y
    x, y = F.normalize(x), F.normalize(y)
    theta = (x * y).sum(1, keepdim=True).arccos()
    return ((weight * theta).sin() * x + ((1 - weight) * theta).sin() * y) / theta.sin()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="sum", log_target=True)


def oracle(
    fusion: Any, features: dict[str, Tensor], target: Tensor, weights: list[Tensor], mixup: str = "geodesic", passes: int = 2
) -> tuple[Tensor, list[Tensor]]:
    """Loss and the ω of each pair's first modality. It calls the heads in the order of the module: dropout draws alike."""
    logits = {name: fusion.heads[name](x) for name, x in features.items()}
    pairs = list(itertools.combinations(features, 2))
    heads = [fusion.mix_heads["shared" if "shared" in fusion.mix_heads else f"{a}_{b}"] for a, b in pairs]
    probes, mixed, strengths = [], [], []

    def probe(pair: int) -> Tensor:
        (a, b), weight = pairs[pair], weights[pair]
        with torch.set_grad_enabled(passes == 1):
            return heads[pair](mixture(features[a], features[b], weight, mixup))

    def measured(pair: int) -> Tensor:
        with torch.no_grad():
            of_a, of_b = (divergence(logits[name], probes[pair]) for name in pairs[pair])
            return of_b / (of_a + of_b)

    def rebalanced(pair: int) -> Tensor:
        a, b = pairs[pair]
        return heads[pair](mixture(features[a], features[b], strengths[pair], mixup))

    whole = range(len(pairs))
    if mixup == "geodesic" and passes == 2:  # pair by pair
        for pair in whole:
            probes.append(probe(pair))
            strengths.append(measured(pair))
            mixed.append(rebalanced(pair))
    else:
        probes += [probe(pair) for pair in whole]
        strengths += [measured(pair) for pair in whole]
        mixed += probes if passes == 1 else [rebalanced(pair) for pair in whole]
    loss = torch.stack([F.cross_entropy(own, target) for own in mixed]).mean()
    return loss + sum(F.cross_entropy(own, target) for own in logits.values()), strengths


def assert_trains_as_its_oracle(build: Callable[[], Any], modalities: Sequence[str], **options: Any) -> None:
    """Three steps, with evaluation between them: losses, gradients, ω, λ and predictions."""
    fusion, twin = build(), build()
    for model in (fusion, twin):  # lazy heads
        torch.manual_seed(0)
        model.eval()(batch(modalities)[0])
        model.train()
    optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3) for model in (fusion, twin)]
    weights = [torch.tensor(0.5, dtype=torch.float64) for _ in fusion.pairs]
    for step in range(3):
        (features, target), found = batch(modalities, seed=step), []
        for model, optimizer in zip((fusion, twin), optimizers, strict=True):
            torch.manual_seed(step)
            leaves = {name: x.clone().requires_grad_() for name, x in features.items()}
            if model is fusion:
                out = model(leaves, target)
                loss, strengths = out.loss, list(out.strength.reshape(-1, 2)[:, 0])
            else:
                loss, strengths = oracle(model, leaves, target, weights, **options)
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad] + [x.grad for x in leaves.values()]
            found.append([loss.detach(), *gradients, *strengths])
            optimizer.step()
        torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)
        weights = [own if step == 0 else 0.8 * old + 0.2 * own for old, own in zip(weights, strengths, strict=True)]
        torch.testing.assert_close(list(fusion.weight.reshape(-1).double()), weights, rtol=1e-6, atol=1e-6)
        fusion.eval(), twin.eval()
        out = fusion(features)
        for name, x in features.items():
            torch.testing.assert_close(out.logits_by[name], twin.heads[name](x))
        fusion.train(), twin.train()


@EACH
@pytest.mark.parametrize("where", [("x",), ("x_y",), ("all",)], ids=lambda where: where[0])
def test_a_changed_head_is_called(change, where):
    assert_trains_as_its_oracle(lambda: module(change, where), PAIR)


@SOME
@pytest.mark.parametrize("options", [{"passes": 1}, {"mixup": "linear"}, {"mixup": "linear", "passes": 1}], ids=str)
def test_with_other_options(change, options):
    assert_trains_as_its_oracle(lambda: module(change, ("all",), **options), PAIR, **options)


@SOME
@pytest.mark.parametrize("shared", [False, True])
def test_three_modalities(change, shared):
    where = ("shared",) if shared else ("text", "audio_video")
    assert_trains_as_its_oracle(lambda: module(change, where, TRIO, shared_mix_head=shared), TRIO)


@SOME
def test_a_drawn_pair(change):
    """Of the heads of the pairs, only that of the drawn pair gets a gradient."""
    fusion, drawn = module(change, ("all",), TRIO, pairs="random"), set()
    for step in range(8):
        fusion.zero_grad()
        before = fusion.steps.clone()
        fusion(*batch(TRIO, seed=step)).loss.backward()
        (pair,) = (fusion.steps - before).nonzero().flatten().tolist()
        for place, name in enumerate(fusion.mix_head_names):
            touched = any(p.grad is not None and p.grad.any() for p in fusion.mix_heads[name].parameters())
            assert touched == (place == pair)
        drawn.add(pair)
    assert drawn == {0, 1, 2}


def test_a_plain_head_is_not_called():
    """Its weights enter the fused operator, as do those of a head without bias and of one pruned for good."""
    fusion = module(lambda head: head, ())
    fusion.heads["x"] = nn.Linear(D, C, bias=False).double()
    prune.remove(pruned(fusion.heads["y"]), "weight")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ik, "linear_probe_rebalance", lambda *given, **named: calls.append(1) or operator(*given, **named))
        operator = ik.head.linear_probe_rebalance
        fusion(*batch())
        fusion.heads["x"].register_forward_hook(lambda *_: None)
        fusion(*batch(seed=1))
    assert calls == [1]


def test_a_hook_for_all_modules():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda own, _, __: seen.append(own))
    try:
        fusion = module(lambda head: head, ())
        fusion(*batch())
    finally:
        handle.remove()
    assert [seen.count(head) for head in (*fusion.heads.values(), *fusion.mix_heads.values())] == [1, 1, 2]


def test_heads_without_parameters():
    """As quantised heads are; `ProbeRebalance` then has no parameter at all."""

    class Fixed(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("fixed", head.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.fixed.T

    assert_trains = module(Fixed, ("all",))
    features, target = batch()
    leaves = {name: x.requires_grad_() for name, x in features.items()}
    assert_trains(leaves, target).loss.backward()
    assert all(x.grad.abs().sum() > 0 for x in leaves.values())
    assert assert_trains.eval()(features).logits.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
@SOME
def test_under_checkpointing(change, reentrant):
    gradients = []
    for checkpointed in (True, False):
        fusion, (features, target) = module(change, ("all",)), batch()
        leaves = [x.clone().requires_grad_() for x in features.values()]

        def loss(x: Tensor, y: Tensor, fusion: Any = fusion, target: Tensor = target) -> Tensor:
            return fusion({"x": x, "y": y}, target).loss

        torch.manual_seed(3)
        own = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=reentrant) if checkpointed else loss(*leaves)
        own.backward()
        assert fusion.steps == 1
        gradients.append([x.grad for x in (*leaves, *fusion.parameters()) if x.requires_grad])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


class Padded(nn.Linear):
    """A linear layer of its own width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1)))


@pytest.mark.parametrize("training", [True, False])
def test_a_linear_head_may_change_the_width(training):
    fusion = module(lambda own: own, ())
    fusion.heads["x"] = Padded(D + 1, C).double()
    fusion.mix_heads["x_y"] = nn.Linear(D + 1, C).double()
    fusion.mix_heads["x_y"].register_forward_pre_hook(lambda _, given: F.pad(given[0], (0, 1)))
    assert fusion.train(training)(*batch()).loss.isfinite()


def test_autocast_may_leave_a_head_in_float32():
    torch.manual_seed(0)
    fusion = ProbeRebalance(D, C)
    fusion.heads["x"] = nn.Sequential(nn.Linear(D, C), nn.LayerNorm(C))
    with torch.autocast("cpu", torch.bfloat16):
        out = fusion({name: torch.randn(B, D) for name in PAIR}, torch.randint(C, (B,)))
    out.loss.backward()
    assert out.logits.isfinite().all()


# refused


class Narrowed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Tuple(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


REFUSED = [
    (nn.Linear(D, C + 1), r"expected an output of shape \(10, 4\), got \(10, 5\)"),
    (nn.Linear(D + 1, C), "expected a head for features of width 6, got one for 7"),
    (Tuple(D, C), r"expected an output of shape \(10, 4\), got tuple"),
    (nn.Sequential(nn.Linear(D, C), nn.Flatten(0)), r"expected an output of shape \(10, 4\), got \(40,\)"),
    (Narrowed(D, C), "expected logits of the dtype of the features, torch.float64, got torch.float32"),
    (nn.Sequential(nn.Linear(D, 1), nn.Flatten(0)), r"expected an output of shape \(10, 4\), got \(10,\)"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("head", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("name", ["heads['y']", "mix_heads['x_y']"])
def test_a_head_that_cannot_work_is_refused_by_name(name, head, message, training):
    fusion = module(lambda own: own, ())
    (fusion.heads if name.startswith("heads") else fusion.mix_heads)[name.split("'")[1]] = head.double()
    with pytest.raises(InputError, match=message) as refusal:
        fusion.train(training)(*batch())
    assert str(refusal.value).startswith(f"{name} ({type(head).__name__}): ")
    assert fusion.steps == 0


def test_a_head_that_was_taken_away_is_named():
    fusion = module(lambda own: own, ())
    fusion.heads["x"] = None
    with pytest.raises(InputError, match=r"heads\['x'\]: expected a module \(B, 6\) -> \(B, 4\), got None"):
        fusion(*batch())


@pytest.mark.filterwarnings("ignore")  # of torch.ao, which moves to torchao
@pytest.mark.parametrize("name", ["heads['x']", "mix_heads['x_y']"])
def test_a_quantised_head_is_for_evaluation(name):
    fusion, features = ProbeRebalance(D, C), {name: torch.randn(B, D) for name in "xy"}
    heads, key = fusion.heads if name.startswith("heads") else fusion.mix_heads, name.split("'")[1]
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(heads[key]), {nn.Linear}, dtype=torch.qint8)[0]
    expected = fusion.eval()(features).logits
    heads[key] = quantised
    assert fusion(features).logits.isfinite().all()
    assert (fusion(features).logits - expected).abs().max() < 0.1
    fusion.train()
    with pytest.raises(InputError, match="expected a head with a gradient, got a quantised one") as refusal:
        fusion({name: x.requires_grad_() for name, x in features.items()}, torch.zeros(B, dtype=torch.int64))
    assert str(refusal.value).startswith(name)


# baselines


@EACH
@pytest.mark.parametrize("fusion", [Concat, DGL, Weight, Sum, Joint])
def test_heads_of_baselines(fusion, change):
    """The prediction is the output of the heads that the module has, and the loss its cross entropy."""

    def build() -> Any:
        torch.manual_seed(0)
        own = fusion(D, C).double()
        if hasattr(own, "head"):
            own.head = change(own.head).double()
        else:
            own.heads["x"] = change(own.heads["x"]).double()
        return own

    model, twin = build(), build()
    features, target = batch()
    joined = torch.cat(list(features.values()), dim=1)
    if fusion is Weight:
        x = torch.stack(list(features.values()))
        joined = (x.softmax(2) / x.softmax(2).sum(0) * x).sum(0)
    for training in (False, True):  # lazy heads are made in the first call
        torch.manual_seed(1)
        out = model.train(training)(features, target)
        torch.manual_seed(1)
        twin.train(training)
        if hasattr(twin, "head"):
            expected = twin.head(joined)
        else:
            expected = sum(twin.heads[name](x) for name, x in features.items())
        torch.testing.assert_close(out.logits, expected)
    if fusion in (Concat, Weight, Sum):
        out.loss.backward()
        F.cross_entropy(expected, target).backward()
        gradients = [[p.grad for p in own.parameters() if p.requires_grad] for own in (model, twin)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("change", [LoRA, pruned, pre_hooked, parametrizations.weight_norm], ids=lambda change: change.__name__)
def test_contributions_of_an_affine_head_sum_to_the_logits(change):
    torch.manual_seed(0)
    model = Concat(D, C).double()
    model.head = change(model.head).double()
    out = model(*batch())
    torch.testing.assert_close(sum(out.logits_by.values()), out.logits)
    assert model.head.training
