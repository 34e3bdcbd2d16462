"""`linear_probe_rebalance` and `probe_rebalance`: what a step returns, whom its gradients reach, and its edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import heads
import parity
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from heads import LEAVES, Step
from places import INTERPRETED, Place
from torch import Tensor, nn

import iprm_kernels as ik
from iprm_kernels.backends import kernels

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def plain(step: Step) -> Step:
    """The same step in two passes and by autograd."""
    return heads.run(step.inputs, call=heads.two_pass, **step.options)


def assert_equal_steps(step: Step, other: Step) -> None:
    torch.testing.assert_close(step.outputs, other.outputs, **CLOSE)
    torch.testing.assert_close(step.gradients, other.gradients, **CLOSE)


# options


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [(), (0, 3)], ids=["all rows", "rows ignored"])
def test_losses_are_those_of_torch(place: Place, label_smoothing: float, ignored: tuple[int, ...]) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    inputs["target"][list(ignored)] = 99
    step = heads.run(inputs, label_smoothing=label_smoothing, ignore_index=99)
    for loss, name in zip(step.outputs["losses"], ("logits_mix", "logits_x", "logits_y"), strict=True):
        wanted = F.cross_entropy(step.outputs[name], inputs["target"], label_smoothing=label_smoothing, ignore_index=99)
        torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(step.outputs["loss"], step.outputs["losses"].sum())
    assert_equal_steps(step, plain(step))


def test_ignored_rows_are_measured_and_learn_nothing(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    whole = heads.run(inputs)
    inputs["target"][4] = -100
    step = heads.run(inputs)
    assert torch.equal(step.outputs["kl"], whole.outputs["kl"])
    assert (step.gradients["x"][4] == 0).all()
    assert (step.gradients["y"][4] == 0).all()


def test_without_any_label_the_losses_are_nan_as_those_of_torch(place: Place) -> None:
    inputs = heads.inputs(3, 7, 2, device=place.device)
    inputs["target"].fill_(-100)
    outputs = heads.run(inputs).outputs
    assert outputs["losses"].isnan().all()
    assert outputs["strength"].isfinite().all()


@pytest.mark.parametrize("missing", list(itertools.product([True, False], repeat=3)), ids=str)
def test_heads_without_bias(place: Place, missing: tuple[bool, ...]) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    for name, without in zip(("bias_x", "bias_y", "bias_mix"), missing, strict=True):
        inputs[name] = None if without else inputs[name]
    step = heads.run(inputs)
    assert_equal_steps(step, plain(step))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_probing_weight(place: Place, weight: float) -> None:
    """A float or a 0-d tensor: the mixture it probes is `geodesic_mixup`'s, through the head."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    by_float = heads.run({**inputs, "weight": weight})
    by_tensor = heads.run({**inputs, "weight": torch.tensor(weight, device=place.device)})
    assert torch.equal(by_float.outputs["kl"], by_tensor.outputs["kl"])
    probe = F.linear(ik.geodesic_mixup(inputs["x"], inputs["y"], weight), inputs["weight_mix"], inputs["bias_mix"])
    own = [F.linear(inputs[m], inputs[f"weight_{m}"], inputs[f"bias_{m}"]) for m in "xy"]
    kl = torch.stack([ik.batch_kl(logits, probe) for logits in own])
    torch.testing.assert_close(by_float.outputs["kl"], kl, **CLOSE)
    torch.testing.assert_close(by_float.outputs["strength"], ik.strength_weights(kl), **CLOSE)


# gradients


@pytest.mark.parametrize("name", ["loss", "losses", "logits_mix", "logits_x", "logits_y"])
def test_gradient_through_each_output(place: Place, name: str) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    step = heads.run(inputs, through=(name,))
    assert_equal_steps(step, plain(step))


def test_gradient_through_several_outputs_adds_up(place: Place) -> None:
    step = heads.run(heads.inputs(9, 31, 6, device=place.device), through=("loss", "losses", "logits_mix", "logits_y"))
    assert_equal_steps(step, plain(step))


@pytest.mark.parametrize("needed", [("x",), ("y", "weight_mix"), ("weight_x", "bias_mix"), ("bias_y",), LEAVES], ids=str)
def test_only_what_asks_gets_a_gradient(place: Place, needed: tuple[str, ...]) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    whole, step = heads.run(inputs), heads.run(inputs, needed=needed)
    for leaf in LEAVES:
        if leaf in needed:
            torch.testing.assert_close(step.gradients[leaf], whole.gradients[leaf], **CLOSE)
        else:
            assert step.gradients[leaf] is None


def test_strength_and_kl_carry_no_gradient(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    inputs["x"].requires_grad_()
    step = heads.call(inputs)
    assert step.loss.requires_grad
    assert not step.strength.requires_grad
    assert not step.kl.requires_grad


# rows at the edges


def test_identical_features(place: Place) -> None:
    """c = 1: the mixture is x̂ whatever the weight, and the gradients are the limit's."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    inputs["y"] = inputs["x"].clone()
    step = heads.run(inputs)
    mixed = F.linear(F.normalize(inputs["x"]), inputs["weight_mix"], inputs["bias_mix"])
    torch.testing.assert_close(step.outputs["logits_mix"], mixed, **CLOSE)
    assert_equal_steps(step, plain(step))


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["dead beside close", "dead beside opposite"])
def test_dead_rows_learn_from_their_own_head_alone(place: Place, sign: float) -> None:
    """‖x‖ <= 1e-12: nothing comes through the mixture, and the unimodal gradient dU W_x is left. In float64, since beside
    the antipode float32 has lost three digits."""
    inputs = heads.inputs(9, 31, 6, torch.float64, device=place.device)
    inputs["y"][5] = sign * inputs["x"][5]
    inputs["x"][2] = 0.0
    inputs["y"][7] = 0.0
    inputs["x"][8] = inputs["y"][8] = 0.0
    step = heads.run(inputs)
    residual = step.outputs["logits_x"].softmax(1) - F.one_hot(inputs["target"], 6)
    own = residual @ inputs["weight_x"] / 9
    torch.testing.assert_close(step.gradients["x"][[2, 8]], own[[2, 8]], **CLOSE)
    assert_equal_steps(step, plain(step))


@pytest.mark.parametrize("classes", [6, 70])
def test_nothing_comes_to_a_dead_row_from_what_is_not_finite(place: Place, classes: int) -> None:
    """Neither from its partner nor from the gradient of the mixture's logits, all of which are NaN."""
    inputs = heads.inputs(9, 31, classes, device=place.device)
    inputs["x"][2] = 0.0
    inputs["y"][2] = float("inf")
    step = heads.run(inputs, through=("losses",))
    residual = step.outputs["logits_x"].softmax(1) - F.one_hot(inputs["target"], classes)
    weight = heads.weights((3,), torch.float32)[1]
    own = weight * residual @ inputs["weight_x"] / 9
    torch.testing.assert_close(step.gradients["x"][2], own[2], **CLOSE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_never_learned_from_silently(place: Place, bad: float) -> None:
    """Such a row is in ω, which all rows share: the loss is NaN and says so."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    inputs["x"][3, 30] = bad
    outputs = heads.run(inputs).outputs
    assert outputs["loss"].isnan()
    assert outputs["strength"].isnan().all()
    clean = [row for row in range(9) if row != 3]
    assert outputs["logits_x"][clean].isfinite().all()
    assert outputs["logits_y"].isfinite().all()


def test_heads_that_agree_share_the_weight(place: Place) -> None:
    """All heads zero: every prediction uniform, every KL zero, ω uniform, no 0/0."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    for name in ("weight_x", "weight_y", "weight_mix", "bias_x", "bias_y", "bias_mix"):
        inputs[name] = torch.zeros_like(inputs[name])
    step = heads.run(inputs)
    assert step.outputs["kl"].tolist() == [0.0, 0.0]
    assert step.outputs["strength"].tolist() == [0.5, 0.5]
    assert all(gradient.isfinite().all() for gradient in step.gradients.values())


@pytest.mark.parametrize("shape", [(0, 7, 3), (1, 1, 1), (1, 1, 2), (2, 1, 31)], ids=str)
def test_smallest_shapes(place: Place, shape: tuple[int, int, int]) -> None:
    step = heads.run(heads.inputs(*shape, device=place.device))
    other = plain(step)
    torch.testing.assert_close(step.outputs, other.outputs, equal_nan=True, **CLOSE)
    torch.testing.assert_close(step.gradients, other.gradients, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("layout", ["transposed", "every other column", "expanded"])
def test_any_strides(place: Place, layout: str) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    if layout == "expanded":
        inputs["x"], inputs["weight_mix"] = inputs["x"][:1].expand(9, 31), inputs["weight_mix"][:, :1].expand(6, 31)
    contiguous = heads.run({name: t.contiguous() if isinstance(t, Tensor) else t for name, t in inputs.items()})
    for name in ("x", "y", "weight_x", "weight_y", "weight_mix"):
        if layout == "transposed":
            inputs[name] = inputs[name].T.contiguous().T
        elif layout == "every other column":
            inputs[name] = inputs[name].repeat_interleave(2, dim=1)[:, ::2]
    assert_equal_steps(heads.run(inputs), contiguous)


def test_follows_the_algorithm_as_released_for_200_steps(place: Place) -> None:
    course = parity.run(parity.fused, place.device)
    assert parity.furthest(course, parity.run(parity.released, place.device)) < parity.BOUND
    assert abs(course[-1][2] - 0.5) > 0.01  # λ has moved
    assert course[-1][0] < course[0][0]


@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter minutes")
def test_gradients_that_no_cache_holds(place: Place) -> None:
    """From 32 MiB on the C++ kernels write past the caches."""
    step = heads.run(heads.inputs(8200, 1024, 3, device=place.device))
    assert_equal_steps(step, plain(step))


# as PyTorch sees it


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(place: Place, dtype: torch.dtype, biased: bool) -> None:
    inputs = heads.inputs(5, 7, 3, dtype, device=place.device)
    features = [inputs[name].detach().requires_grad_() for name in ("x", "y")]
    weights = [inputs[f"weight_{m}"].detach().requires_grad_() for m in ("mix", "x", "y")]
    biases = [inputs[f"bias_{m}"].detach().requires_grad_() if biased else None for m in ("mix", "x", "y")]
    weight = torch.tensor(0.3, dtype=inputs["x"].double().dtype if dtype == torch.float64 else torch.float32)
    rest = ([0, 1], inputs["target"], weight.to(place.device), 0.1, -100, "")
    torch.library.opcheck(torch.ops.iprm.linear_probe_rebalance.default, (features, weights, biases, *rest))
    features, weights, biases = ([t if t is None else t.detach() for t in tensors] for tensors in (features, weights, biases))
    loss, _, *logits, strength, _, state = torch.ops.iprm.linear_probe_rebalance(features, weights, biases, *rest)
    grads = (torch.ones_like(loss), None, [torch.ones_like(logits[0]), None, torch.ones_like(logits[0])])
    for needed in ([True] * 8, [False, True, True, False, True, True, False, False]):
        torch.library.opcheck(
            torch.ops.iprm.linear_probe_rebalance_backward.default,
            (*grads, features, weights, biases[:1], *rest[:2], state, logits[1:], strength, 0.1, -100, needed),
        )


def test_fullgraph_compile_equals_eager(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    torch.compiler.reset()
    compiled = torch.compile(heads.call, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    assert_equal_steps(heads.run(inputs, call=compiled), heads.run(inputs))


def test_fullgraph_compile_over_a_group(place: Place, tmp_path: Path) -> None:
    """One process: sums over the group are the batch's own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inputs = heads.inputs(9, 31, 6, device=place.device)
        torch.compiler.reset()
        compiled = torch.compile(heads.call, fullgraph=True, backend="aot_eager")
        step = heads.run(inputs, call=compiled, group=torch.distributed.group.WORLD)
        assert_equal_steps(step, heads.run(inputs))
    finally:
        torch.distributed.destroy_process_group()


def test_outputs_of_one_row_share_no_memory(place: Place) -> None:
    inputs = {name: t if name[:4] != "bias" else None for name, t in heads.inputs(1, 7, 3, device=place.device).items()}
    outputs = heads.call(inputs)
    addresses = [getattr(outputs, name).data_ptr() for name in ("logits_mix", "logits_x", "logits_y")]
    assert len(set(addresses)) == 3
    outputs.logits_x.clamp_(0)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_grad_under_autocast(place: Place, mode: Callable[[], Any]) -> None:
    inputs = heads.inputs(64, 16, 5, device=place.device)
    with torch.autocast(place.device.type, dtype=torch.bfloat16):
        with mode():
            without = heads.call(inputs)
        assert torch.equal(without.logits_mix, heads.call(inputs).logits_mix)


def test_activation_checkpointing(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    layer = nn.Linear(31, 31, device=place.device)

    def loss(x: Tensor) -> Tensor:
        return heads.call({**inputs, "x": layer(x)}).loss

    plain = torch.autograd.grad(loss(inputs["x"]), layer.weight)
    saved = torch.utils.checkpoint.checkpoint(loss, inputs["x"], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(saved, layer.weight), plain)


def test_float16_features_with_a_dead_row(place: Place) -> None:
    """1/‖x‖ and 1/‖x‖² never pass through the narrow type: nothing overflows there."""
    inputs = heads.inputs(9, 31, 6, torch.float16, device=place.device)
    inputs["x"][3] = 0.0
    step = heads.run(inputs)
    assert all(gradient.isfinite().all() for gradient in step.gradients.values())


def test_autocast_casts_features_and_heads(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    with torch.autocast(place.device.type, dtype=torch.bfloat16):
        step = heads.run(inputs)
    narrow = {name: t.bfloat16() if name in LEAVES else t for name, t in inputs.items()}
    outputs = heads.run(narrow).outputs
    torch.testing.assert_close(step.outputs, outputs, rtol=0, atol=0)
    assert step.outputs["logits_mix"].dtype == torch.bfloat16
    assert step.outputs["loss"].dtype == torch.float32
    assert all(step.gradients[name].dtype == torch.float32 for name in LEAVES)


def test_second_derivatives_are_refused(fused: Place) -> None:
    inputs = heads.inputs(5, 7, 3, device=fused.device)
    x = inputs["x"].requires_grad_()
    (grad,) = torch.autograd.grad(heads.call(inputs).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not provided"):
        grad.square().sum().backward()


def test_repeats_bitwise(place: Place) -> None:
    inputs = heads.inputs(129, 100, 31, device=place.device)
    first, second = heads.run(inputs), heads.run(inputs)
    for results in zip((*first.outputs.values(), *first.gradients.values()),
                       (*second.outputs.values(), *second.gradients.values()), strict=True):  # fmt: skip
        assert torch.equal(*results)


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton kernels, for the interpreter: TRITON_INTERPRET=1 tests it")
def test_programs_that_take_several_blocks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than programs: the parts of sums and of head gradients are added up in their order."""
    from iprm_kernels.kernels import _head_tiles, _tiles

    inputs = heads.inputs(129, 20, 6, device=place.device)
    whole = heads.run(inputs)
    monkeypatch.setattr(_tiles, "ROW_TILE", {4: 64})
    monkeypatch.setattr(_tiles, "MOST_PARTS", 3)
    monkeypatch.setattr(_head_tiles, "GRADIENT_PROGRAMS", 2)
    step = heads.run(inputs)
    assert_equal_steps(step, whole)
    assert_equal_steps(step, plain(step))


@pytest.mark.skipif(not INTERPRETED, reason="of the Triton kernels, for the interpreter: TRITON_INTERPRET=1 tests it")
@pytest.mark.parametrize("classes", [6, 70])
def test_rows_in_chunks(place: Place, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where scratch for all of them would be too much: by the kernels' own products, and by a library's."""
    from iprm_kernels.kernels._head_tiles import RowChunks

    inputs = heads.inputs(11, 31, classes, device=place.device)
    whole = heads.run(inputs, through=("losses", "logits_mix", "logits_x"))
    monkeypatch.setattr(RowChunks, "of", staticmethod(lambda *_: RowChunks(rows=4, parts=1 + (classes == 6))))
    assert_equal_steps(heads.run(inputs, through=("losses", "logits_mix", "logits_x")), whole)


def test_no_host_synchronisation_and_captured_in_a_cuda_graph(gpu: Place) -> None:
    inputs = heads.inputs(64, 512, 31, device="cuda")
    inputs["weight"] = torch.tensor(0.3, device="cuda")
    wanted = heads.run(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        heads.run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = heads.run(inputs)
    graph.replay()
    assert torch.equal(captured.outputs["loss"], wanted.outputs["loss"])
    assert all(torch.equal(captured.gradients[name], wanted.gradients[name]) for name in LEAVES)


def test_a_label_out_of_range_on_a_gpu_is_nan_and_never_read(gpu: Place) -> None:
    inputs = heads.inputs(64, 512, 31, device="cuda")
    inputs["target"][5] = 10**9
    step = heads.run(inputs)
    assert step.outputs["losses"].isnan().all()
    assert step.gradients["x"][5].isnan().all()
    assert step.outputs["strength"].isfinite().all()


# any head


def mlp(inputs: dict[str, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(31, 16), nn.Tanh(), nn.Linear(16, 6)).to(inputs["x"].device)


def test_any_head_is_called_twice_the_first_time_without_gradient(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    x, y = (inputs[name].requires_grad_() for name in "xy")
    own = [F.linear(inputs[m], inputs[f"weight_{m}"]) for m in "xy"]
    head, seen = mlp(inputs), []

    def counted(z: Tensor) -> Tensor:
        seen.append((z.detach(), torch.is_grad_enabled()))
        return head(z)

    result = ik.probe_rebalance(x, y, *own, counted, 0.3)
    assert [enabled for _, enabled in seen] == [False, True]
    kl = torch.stack([ik.batch_kl(logits, head(ik.geodesic_mixup(x, y, 0.3))) for logits in own]).detach()
    torch.testing.assert_close(result.kl, kl)
    torch.testing.assert_close(result.strength, ik.strength_weights(kl))
    torch.testing.assert_close(seen[1][0], ik.geodesic_mixup(x, y, result.strength[0]).detach())
    assert not result.strength.requires_grad
    assert not result.kl.requires_grad


def test_any_head_measures_the_features_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second mixture takes norms and inner products from the first, and both divergences are one call."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    own = [F.linear(inputs[m], inputs[f"weight_{m}"]) for m in "xy"]
    namespace, calls = kernels(place.device), []
    counted = {name: _counted(name, function, calls) for name, function in vars(namespace).items()}
    monkeypatch.setattr(ik.geodesic, "kernels", lambda device: SimpleNamespace(**counted))
    monkeypatch.setattr(ik.divergence, "kernels", lambda device: SimpleNamespace(**counted))
    ik.probe_rebalance(inputs["x"], inputs["y"], *own, mlp(inputs), 0.3)
    assert calls == ["geodesic_mixup", "batch_kl_pair", "strength_weights", "geodesic_remix"]


def _counted(name: str, function: Callable[..., None], calls: list[str]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        calls.append(name)
        function(*arguments)

    return call


def test_features_of_two_types_both_learn_under_autocast(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    x, y = inputs["x"].requires_grad_(), inputs["y"].bfloat16().requires_grad_()
    own = [F.linear(inputs[m], inputs[f"weight_{m}"]) for m in "xy"]
    with torch.autocast(place.device.type, dtype=torch.bfloat16):
        result = ik.probe_rebalance(x, y, *own, mlp(inputs), 0.3)
    result.logits.float().sum().backward()
    assert x.grad.abs().sum() > 0
    assert y.grad.abs().sum() > 0
    assert y.grad.dtype == torch.bfloat16


def test_any_head_learns_from_the_rebalanced_mixture_alone(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    own = [F.linear(inputs[m], inputs[f"weight_{m}"]).requires_grad_() for m in "xy"]
    x, y = (inputs[name].requires_grad_() for name in "xy")
    head = mlp(inputs)
    leaves = [x, y, *head.parameters()]
    result = ik.probe_rebalance(x, y, *own, head, 0.3)
    gradients = torch.autograd.grad(result.logits.square().sum(), leaves, retain_graph=True)
    mixed = head(ik.geodesic_mixup(x, y, result.strength[0]))
    torch.testing.assert_close(gradients, torch.autograd.grad(mixed.square().sum(), leaves))
    assert torch.autograd.grad(result.logits.sum(), own, allow_unused=True) == (None, None)
