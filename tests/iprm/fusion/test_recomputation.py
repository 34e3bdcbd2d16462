"""A pass of `ProbeRebalance` that runs again, by activation checkpointing or otherwise, has the gradients of the first, and λ
moves once."""

from __future__ import annotations

import copy
import itertools
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from iprm import ProbeRebalance
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.func import functional_call
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import iprm_kernels as ik

B, D, C = 8, 6, 3
PAIR, TRIO = ("x", "y"), ("audio", "text", "video")
OPTIONS = [
    (PAIR, {}),
    (PAIR, {"ema_start": "released"}),
    (PAIR, {"passes": 1}),
    (PAIR, {"mixup": "linear"}),
    (TRIO, {}),
    (TRIO, {"pairs": "random", "shared_mix_head": True}),
    (TRIO, {"pairs": "random", "passes": 1}),
]
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])

Way = Callable[..., Any]  # how a function is called: plainly, or checkpointed


def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def checkpointed(reentrant: bool) -> Way:
    return lambda function, *arguments: checkpoint(function, *arguments, use_reentrant=reentrant)


class Model(nn.Module):
    """Encoders with dropout, and the fusion module; returns the loss of one batch."""

    def __init__(self, modalities: Sequence[str] = PAIR, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.modalities = tuple(modalities)
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Dropout(0.3)) for _ in modalities)
        self.fusion = ProbeRebalance(D, C, modalities, **options)

    def encode(self, *inputs: Tensor) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]

    def fuse(self, *given: Tensor) -> Tensor:
        *features, target = given
        return self.fusion(dict(zip(self.modalities, features, strict=True)), target).loss

    def forward(self, *given: Tensor) -> Tensor:
        *inputs, target = given
        return self.fuse(*self.encode(*inputs), target)


def batches(count: int, modalities: Sequence[str] = PAIR) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [[torch.randn(B, 5, generator=generator).requires_grad_() for _ in modalities] for _ in range(count)]
    return [[*own, torch.randint(C, (B,), generator=generator)] for own in inputs]


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Gradients, λ, ω and step counts."""
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


def steps(model: Model, loss_of: Callable[[Model, list[Tensor]], Tensor], given: list[list[Tensor]]) -> list[dict[str, Tensor]]:
    """What each of some training steps with one batch computes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    torch.manual_seed(2)  # of the dropout
    for own in given:
        optimizer.zero_grad()
        loss_of(model, own).backward()
        found.append(everything(model) | {"draws": torch.tensor(model.fusion._draws)})
        optimizer.step()
    return found


def assert_identical(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> None:
    for step, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(own[name], value), f"{name} of step {step}"


# activation checkpointing


@REENTRANT
@pytest.mark.parametrize(("modalities", "options"), OPTIONS, ids=str)
def test_checkpointing_the_fusion_alone(modalities, options, reentrant):
    def by(way: Way) -> Callable[[Model, list[Tensor]], Tensor]:
        return lambda model, own: way(model.fuse, *model.encode(*own[:-1]), own[-1])

    given = batches(3, modalities)
    expected = steps(Model(modalities, **options), by(plainly), given)
    assert_identical(steps(Model(modalities, **options), by(checkpointed(reentrant)), given), expected)


def test_checkpointing_a_mapping_of_features():
    def loss_of(model: Model, own: list[Tensor]) -> Tensor:
        features = dict(zip("xy", model.encode(*own[:-1]), strict=True))
        return checkpoint(model.fusion, features, own[-1], use_reentrant=False).loss

    given = batches(3)
    assert_identical(steps(Model(), loss_of, given), steps(Model(), lambda model, own: model(*own), given))


@REENTRANT
@pytest.mark.parametrize(("modalities", "options"), OPTIONS, ids=str)
def test_checkpointing_encoders_and_fusion(modalities, options, reentrant):
    given, way = batches(3, modalities), checkpointed(reentrant)
    expected = steps(Model(modalities, **options), lambda model, own: model(*own), given)
    assert_identical(steps(Model(modalities, **options), lambda model, own: way(model, *own), given), expected)


@REENTRANT
def test_a_pass_without_labels(reentrant):
    def loss_of(way: Way) -> Callable[[Model, list[Tensor]], Tensor]:
        def logits(model: Model, *inputs: Tensor) -> Tensor:
            return model.fusion(dict(zip("xy", model.encode(*inputs), strict=True))).logits

        return lambda model, own: F.cross_entropy(way(lambda *inputs: logits(model, *inputs), *own[:-1]), own[-1])

    given = batches(3)
    assert_identical(steps(Model(), loss_of(checkpointed(reentrant)), given), steps(Model(), loss_of(plainly), given))


@REENTRANT
def test_nested_checkpoints(reentrant):
    inner, given = checkpointed(reentrant), batches(3)

    def loss_of(way: Way) -> Callable[[Model, list[Tensor]], Tensor]:
        def outer(model: Model, *own: Tensor) -> Tensor:
            return way(model.fuse, *way(lambda *x: tuple(model.encode(*x)), *own[:-1]), own[-1])

        return lambda model, own: way(lambda *x: outer(model, *x), *own)

    assert_identical(steps(Model(), loss_of(inner), given), steps(Model(), loss_of(plainly), given))


@REENTRANT
def test_a_checkpointed_sequence(reentrant):
    class Fuse(nn.Module):
        def __init__(self, model: Model, target: Tensor) -> None:
            super().__init__()
            self.model, self.target = model, target

        def forward(self, features: tuple[Tensor, ...]) -> Tensor:
            return self.model.fuse(*features, self.target)

    class Encode(nn.Module):
        def __init__(self, model: Model) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.model.encode(x, x))

    def loss_of(segments: int) -> Callable[[Model, list[Tensor]], Tensor]:
        def of(model: Model, own: list[Tensor]) -> Tensor:
            stages = nn.Sequential(Encode(model), Fuse(model, own[-1]), nn.Identity(), nn.Identity())
            return checkpoint_sequential(stages, segments, own[0], use_reentrant=reentrant) if segments else stages(own[0])

        return of

    given = batches(3)
    for segments in (2,):
        assert_identical(steps(Model(), loss_of(segments), given), steps(Model(), loss_of(0), given))


@pytest.mark.parametrize("kind", CheckpointImpl, ids=str)
def test_the_wrapper_that_fsdp_uses(kind):
    given, wrapped = batches(3), Model()
    wrapper = checkpoint_wrapper(wrapped, checkpoint_impl=kind)
    found = steps(wrapped, lambda _, own: wrapper(*own), given)
    assert_identical(found, steps(Model(), lambda model, own: model(*own), given))


@REENTRANT
@pytest.mark.parametrize("whole", [False, True], ids=["fusion", "encoders-and-fusion"])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3)), "sum"], ids=str)
def test_several_passes_before_any_backward_pass(order, whole, reentrant):
    """Of three pending passes, each is recomputed with its own λ, in whatever order."""

    def losses(model: Model, way: Way) -> list[Tensor]:
        torch.manual_seed(2)
        if whole:
            return [way(model, *own) for own in given]
        return [way(model.fuse, *model.encode(*own[:-1]), own[-1]) for own in given]

    given, found = batches(3), []
    for way in (checkpointed(reentrant), plainly):
        model = Model(alpha=0.3)
        parts = losses(model, way)
        for loss in [torch.stack(parts).sum()] if order == "sum" else [parts[place] for place in order]:
            loss.backward()
        found.append([everything(model)])
    assert found[0][0]["fusion.steps"] == 3
    assert_identical(*found)


@REENTRANT
def test_several_views_of_the_same_labels(reentrant):
    """The labels do not identify a pass, and its features are made anew."""
    given, found = batches(3), []
    for way in (checkpointed(reentrant), plainly):
        model = Model(alpha=0.3)
        torch.manual_seed(2)
        parts = [way(model, *own[:-1], given[0][-1]) for own in given]
        (parts[1] + 2 * parts[0] + 3 * parts[2]).backward()
        found.append([everything(model)])
    assert_identical(*found)


@REENTRANT
def test_equal_passes_are_told_apart_by_their_order(reentrant):
    found = []
    for way in (checkpointed(reentrant), plainly):
        model, own = Model(alpha=0.3).eval(), batches(1)[0]
        model.fusion.train()
        parts = [way(model, *own) for _ in range(3)]
        torch.stack(parts).sum().backward()
        found.append([everything(model)])
    assert found[0][0]["fusion.steps"] == 3
    assert_identical(*found)


def test_a_second_backward_pass_over_one_graph():
    found = []
    for way in (checkpointed(False), plainly):
        model, own = Model(), batches(1)[0]
        torch.manual_seed(2)
        loss = way(model, *own)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([everything(model)])
    assert_identical(*found)


def test_an_autograd_function_that_recomputes():
    class Recomputing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
            ctx.function = function
            ctx.save_for_backward(*given)
            return function(*given)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
                ctx.function(*leaves).backward(grad)
            return None, *(leaf.grad for leaf in leaves)

    def loss_of(way: Way) -> Callable[[Model, list[Tensor]], Tensor]:
        return lambda model, own: way(model.fuse, *model.encode(*own[:-1]), own[-1])

    given = batches(3)
    assert_identical(steps(Model(), loss_of(Recomputing.apply), given), steps(Model(), loss_of(plainly), given))


@REENTRANT
def test_fixed_features_in_every_step(reentrant):
    """The pass that is recomputed is the newest on these tensors."""
    way, features = checkpointed(reentrant), [torch.randn(B, D).requires_grad_() for _ in range(2)]
    target, found = torch.randint(C, (B,)), []
    for own in (way, plainly):
        model = Model(alpha=0.3)
        found.append(steps(model, lambda model, _, own=own: own(model.fuse, *features, target), [[]] * 4))
        assert model.fusion.steps == 4
    assert_identical(*found)


@pytest.mark.parametrize("options", [{}, pytest.param({"passes": 1}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("outside", [False, True], ids=["checkpoint-compiled", "compiled-module-checkpointed"])
def test_compiled(outside, backend, options):
    def compiled(model: Model) -> Callable[..., Tensor]:
        if outside:
            own = torch.compile(model, fullgraph=True, backend=backend)
            return lambda *given: checkpoint(own, *given, use_reentrant=False)
        return torch.compile(lambda *x: checkpoint(model, *x, use_reentrant=False), fullgraph=True, backend=backend)

    models = [Model(alpha=0.3, **options).eval() for _ in range(2)]
    for model in models:
        model.fusion.train()
    ways = (compiled(models[0]), models[1])
    for own in batches(3):
        for model, way in zip(models, ways, strict=True):
            model.zero_grad()
            way(*own).backward()
        for (name, value), other in zip(everything(models[0]).items(), everything(models[1]).values(), strict=True):
            if name != "fusion._probed":
                torch.testing.assert_close(value, other, msg=lambda why, name=name: f"{name}: {why}")


# the same pass, outside of a backward pass


@pytest.mark.parametrize(("modalities", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("with_target", [True, False])
def test_functional_calls_on_the_same_tensors(modalities, options, with_target):
    torch.manual_seed(0)
    fusion = ProbeRebalance(D, C, modalities, **options)
    for _ in range(2):
        fusion({name: torch.randn(B, D) for name in modalities})
    features = {name: torch.randn(B, D, requires_grad=True) for name in modalities}
    parameters = dict(fusion.named_parameters())
    leaves, target = [*parameters.values(), *features.values()], torch.randint(C, (B,))
    found = []
    for _ in range(3):
        out = functional_call(fusion, parameters, (features, target if with_target else None))
        gradients = torch.autograd.grad(out.loss if with_target else out.logits.square().sum(), leaves, allow_unused=True)
        state = {name: buffer.clone() for name, buffer in fusion.named_buffers()} | {"used": out.weight}
        named = {str(place): x for place, x in enumerate(gradients) if x is not None}
        found.append(named | state | {"draws": torch.tensor(fusion._draws)})
    assert found[0]["steps"].sum() == (3 if len(modalities) == 2 or "pairs" in options else 9)
    assert_identical(found[1:], found[:1] * 2)


def test_a_functional_call_with_buffers_of_its_own_moves_these():
    torch.manual_seed(0)
    fusion, features = ProbeRebalance(D, C, alpha=0.0), {name: torch.randn(B, D) for name in "xy"}
    for _ in range(2):
        state = {name: value.clone() for name, value in fusion.state_dict().items()}
        functional_call(fusion, state, (features, torch.zeros(B, dtype=torch.int64)))
        assert state["steps"] == 1
        assert state["weight"] != 0.5
    assert fusion.steps == 0


def _step_of_an_optimizer(fusion: ProbeRebalance) -> None:
    torch.optim.SGD(fusion.parameters(), lr=0.5).step()


def _update_of_the_data(fusion: ProbeRebalance) -> None:
    for parameter in fusion.parameters():
        parameter.data.sub_(0.5 * parameter.grad)


def _step_of_a_fused_optimizer(fusion: ProbeRebalance) -> None:
    torch.optim.SGD(fusion.parameters(), lr=0.5, fused=True).step()  # does not increase the version counters of the parameters


@pytest.mark.parametrize("update", [_step_of_an_optimizer, _update_of_the_data, _step_of_a_fused_optimizer])
@pytest.mark.parametrize("options", [{}, {"passes": 1}])
@pytest.mark.parametrize("way", [plainly, checkpointed(False), checkpointed(True)], ids=["plain", "hooks", "reentrant"])
def test_full_batch_training_moves_lambda_in_every_step(update, options, way):
    """On fixed features, as on copies of them, which no pass can take for those of the last one."""
    torch.manual_seed(0)
    features, target = {name: torch.randn(B, D) for name in "xy"}, torch.randint(C, (B,))
    found = []
    for copied in (False, True):
        torch.manual_seed(1)
        fusion, own = ProbeRebalance(D, C, alpha=0.3, **options), []
        for _ in range(4):
            fusion.zero_grad()
            given = {name: x.clone() for name, x in features.items()} if copied else features
            depends = torch.zeros((), requires_grad=True)  # reentrant checkpointing differentiates by its arguments alone
            way(lambda given, _, fusion=fusion: fusion(given, target).loss, given, depends).backward()
            own.append(everything(fusion))
            update(fusion)
        assert fusion.steps == 4
        found.append(own)
    assert_identical(*found)


def test_no_pass_is_run_twice_after_the_first_optimizer_step_that_versions_do_not_show(monkeypatch):
    calls = []
    operator = ik.linear_probe_rebalance
    monkeypatch.setattr(ik, "linear_probe_rebalance", lambda *args, **options: calls.append(1) or operator(*args, **options))
    fusion, features = ProbeRebalance(D, C), {name: torch.randn(B, D) for name in "xy"}
    for _ in range(10):
        fusion(features, torch.zeros(B, dtype=torch.int64)).loss.backward()
        _step_of_a_fused_optimizer(fusion)
    assert fusion.steps == 10
    assert len(calls) == 11


@pytest.mark.parametrize("saved", ["nothing", "matrix products", "sums"])
@pytest.mark.parametrize("options", [{}, {"passes": 1}, {"mixup": "linear"}], ids=str)
def test_selective_checkpointing(saved, options):
    """The operators of a pass and of its recomputation are matched by their order."""
    operators = {"nothing": (), "matrix products": (torch.ops.aten.mm, torch.ops.aten.addmm), "sums": (torch.ops.aten.sum,)}

    def policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
        kept = operator.overloadpacket in operators[saved]
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def loss_of(model: Model, own: list[Tensor]) -> Tensor:
        return checkpoint(model, *own, use_reentrant=False, context_fn=contexts)

    def made() -> Model:
        model = Model(**options)
        model.fusion.heads["x"] = nn.Sequential(nn.Linear(D, C), SumTo1())  # a head that sums
        return model

    given = batches(3)
    assert_identical(steps(made(), loss_of, given), steps(made(), lambda model, own: model(*own), given))


class SumTo1(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs().sum(1, keepdim=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_that_is_not_exact_finds_its_pass(reentrant):
    """Three pending passes, recomputed in the order they were made, of features that differ by rounding."""
    torch.manual_seed(0)
    model, found = Model(), []
    inputs = [[torch.randn(B, D, requires_grad=True) for _ in PAIR] for _ in range(3)]
    target = torch.randint(C, (B,))

    def noisy(x: Tensor, y: Tensor) -> Tensor:
        passes.append(model.fusion({"x": x * (1 + 1e-6 * len(passes)), "y": y.clone()}, target.clone()))
        return passes[-1].loss

    passes: list[Any] = []
    with set_checkpoint_early_stop(False):  # of recomputations, so that each has an output
        losses = [checkpoint(noisy, *own, use_reentrant=reentrant) for own in inputs]
    for loss in losses:
        loss.backward()
    found = [out.weight.item() for out in passes]
    assert found[3:] == found[:3]
    assert len({*found}) == 3


def test_what_cannot_be_compared_is_a_new_pass():
    fusion, meta = ProbeRebalance(D, C), ProbeRebalance(D, C).to("meta")
    target = torch.zeros(B, dtype=torch.int64)
    with torch.inference_mode():
        fusion.double()
        for _ in range(2):
            fusion({name: torch.zeros(B, D, dtype=torch.float64) for name in "xy"}, target)
    features = {name: torch.zeros(B, D, device="meta") for name in "xy"}
    for _ in range(2):
        meta(features, target.to("meta"))


def test_the_lambda_of_the_output_is_of_the_caller():
    torch.manual_seed(0)
    gradients = []
    for modified in (False, True):
        torch.manual_seed(1)
        fusion, x = ProbeRebalance(D, C), torch.randn(B, D, requires_grad=True)

        def loss(x: Tensor, fusion: ProbeRebalance = fusion, modified: bool = modified) -> Tensor:
            out = fusion({"x": x, "y": x.flip(0)}, torch.zeros(B, dtype=torch.int64))
            if modified and torch._C._current_graph_task_id() == -1:
                out.weight.fill_(0.99)
            return out.loss

        checkpoint(loss, x, use_reentrant=False).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("change", ["features", "lambda", "loaded state", "parameter"])
def test_a_pass_on_modified_tensors_is_a_new_one(change):
    torch.manual_seed(0)
    fusion, features = ProbeRebalance(D, C), {name: torch.randn(B, D) for name in "xy"}
    target = torch.randint(C, (B,))
    fusion(features, target)
    if change == "features":
        features["y"].mul_(2)
    elif change == "lambda":
        fusion.weight.fill_(0.25)
    elif change == "loaded state":
        fusion.load_state_dict(fusion.state_dict())
    else:
        fusion.heads["x"].weight.data = fusion.heads["x"].weight.data * 2
    fusion(features, target)
    assert fusion.steps == 2


def test_copies_and_pickles_leave_the_passes_behind():
    torch.manual_seed(0)
    fusion, features = ProbeRebalance(D, C), {name: torch.randn(B, D) for name in "xy"}
    keys = set(fusion.state_dict())
    loss = checkpoint(fusion, features, torch.zeros(B, dtype=torch.int64), use_reentrant=False).loss
    assert set(fusion.state_dict()) == keys
    for twin in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert twin._history.last is None
        twin(features, torch.zeros(B, dtype=torch.int64))
        assert twin.steps == 2, "for the copy it is the first pass on these features"
    loss.backward()
    assert fusion.steps == 1


def test_features_are_not_kept():
    fusion = ProbeRebalance(D, C)
    kept = [torch.randn(B, D, requires_grad=True) * 1 for _ in range(2)]
    references = [weakref.ref(x) for x in kept]
    checkpoint(lambda x, y: fusion({"x": x, "y": y}).logits, *kept, use_reentrant=False)
    fusion(dict(zip("xy", kept, strict=True)))
    del kept
    assert [reference() for reference in references] == [None, None]
