"""`linear_probe_rebalance`: results, gradients and edge cases of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import heads
import numpy as np
import parity
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from error_budget import Truth, assert_within_budget
from head_accuracy import assert_step_within_budget
from heads import LEAVES, Step
from places import INTERPRETED, Place
from torch import Tensor, nn


def assert_same_bits(step: Step, other: Step) -> None:
    torch.testing.assert_close(step.outputs, other.outputs, rtol=0, atol=0)
    torch.testing.assert_close(step.gradients, other.gradients, rtol=0, atol=0)


def by_own_head_alone(step: Step, rows: list[int], scale: float = 1.0) -> tuple[Tensor, Truth, Tensor]:
    """∂x of rows that receive no gradient through the mixture, scale/B (softmax - label) W_x, in plain torch and in more digits
    than float64; and the size of its terms."""
    logits, weight = (t.cpu() for t in (step.outputs["logits_x"], step.inputs["weight_x"]))
    label = F.one_hot(step.inputs["target"].cpu(), len(weight))
    plain = scale / len(label) * (logits.softmax(1) - label) @ weight
    exponentials = np.exp(logits.double().numpy().astype(np.longdouble))
    residual = exponentials / exponentials.sum(1, keepdims=True) - label.numpy()
    exact = residual @ weight.double().numpy().astype(np.longdouble) * scale / len(label)
    size = (abs(residual) @ abs(weight.double().numpy())).max(1) * scale / len(label)
    return plain[rows], Truth.of_digits(exact[rows]), torch.from_numpy(size[rows].astype(np.float64))


# options


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [(), (0, 3)], ids=["all rows", "rows ignored"])
def test_losses_are_those_of_cross_entropy(place: Place, label_smoothing: float, ignored: tuple[int, ...]) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    inputs["target"][list(ignored)] = 99
    assert_step_within_budget(heads.run(inputs, label_smoothing=label_smoothing, ignore_index=99))


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
    assert_step_within_budget(heads.run(inputs))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_probing_weight(place: Place, weight: float) -> None:
    """A float or a 0-d tensor: the probed mixture is `geodesic_mixup` followed by the head."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    by_float = heads.run({**inputs, "weight": weight})
    by_tensor = heads.run({**inputs, "weight": torch.tensor(weight, device=place.device)})
    assert_same_bits(by_float, by_tensor)
    assert_step_within_budget(by_float)


# gradients


@pytest.mark.parametrize("name", ["loss", "losses", "logits_mix", "logits_x", "logits_y"])
def test_gradient_through_each_output(place: Place, name: str) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    assert_step_within_budget(heads.run(inputs, through=(name,)))


def test_gradient_through_several_outputs_adds_up(place: Place) -> None:
    through = ("loss", "losses", "logits_mix", "logits_y")
    assert_step_within_budget(heads.run(heads.inputs(9, 31, 6, device=place.device), through=through))


@pytest.mark.parametrize("needed", [("x",), ("y", "weight_mix"), ("weight_x", "bias_mix"), ("bias_y",), LEAVES], ids=str)
def test_only_inputs_that_require_it_get_a_gradient(place: Place, needed: tuple[str, ...]) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    step = heads.run(inputs, needed=needed)
    assert {leaf for leaf in LEAVES if step.gradients[leaf] is not None} == set(needed)
    assert_step_within_budget(step)


def test_strength_and_kl_carry_no_gradient(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    inputs["x"].requires_grad_()
    step = heads.call(inputs)
    assert step.loss.requires_grad
    assert not step.strength.requires_grad
    assert not step.kl.requires_grad


# rows at the edges


def test_identical_features(place: Place) -> None:
    """At c = 1 the mixture is x̂ for every weight, and the gradients are the limit."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    inputs["y"] = inputs["x"].clone()
    assert_step_within_budget(heads.run(inputs))


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["dead beside close", "dead beside opposite"])
def test_dead_rows_learn_from_their_own_head_alone(place: Place, sign: float) -> None:
    """For ‖x‖ <= 1e-12 no gradient comes through the mixture, and only the unimodal gradient dU W_x remains. In float64,
    because near the antipode float32 loses three digits."""
    inputs = heads.inputs(9, 31, 6, torch.float64, device=place.device)
    inputs["y"][5] = sign * inputs["x"][5]
    inputs["x"][2] = 0.0
    inputs["y"][7] = 0.0
    inputs["x"][8] = inputs["y"][8] = 0.0
    step = heads.run(inputs)
    assert_within_budget("dead rows", step.gradients["x"][[2, 8]].cpu(), *by_own_head_alone(step, [2, 8]))
    assert_step_within_budget(step)


@pytest.mark.parametrize("classes", [6, 70])
def test_a_dead_row_receives_nothing_from_values_that_are_not_finite(place: Place, classes: int) -> None:
    """Its partner and the gradients of the mixture's logits are all NaN."""
    inputs = heads.inputs(9, 31, classes, device=place.device)
    inputs["x"][2] = 0.0
    inputs["y"][2] = float("inf")
    step = heads.run(inputs, through=("losses",))
    scale = heads.weights((3,), torch.float64)[1].item()  # upstream weight of the loss of x
    assert_within_budget("dead row", step.gradients["x"][[2]].cpu(), *by_own_head_alone(step, [2], scale))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_never_learned_from_silently(place: Place, bad: float) -> None:
    """Such a row enters ω, which all rows share, so the loss is NaN."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    inputs["x"][3, 30] = bad
    outputs = heads.run(inputs).outputs
    assert outputs["loss"].isnan()
    assert outputs["strength"].isnan().all()
    clean = [row for row in range(9) if row != 3]
    assert outputs["logits_x"][clean].isfinite().all()
    assert outputs["logits_y"].isfinite().all()


def test_heads_that_agree_share_the_weight(place: Place) -> None:
    """All heads are zero: every prediction is uniform, every KL zero, ω uniform, and no 0/0 occurs."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    for name in ("weight_x", "weight_y", "weight_mix", "bias_x", "bias_y", "bias_mix"):
        inputs[name] = torch.zeros_like(inputs[name])
    step = heads.run(inputs)
    assert step.outputs["kl"].tolist() == [0.0, 0.0]
    assert step.outputs["strength"].tolist() == [0.5, 0.5]
    assert all(gradient.isfinite().all() for gradient in step.gradients.values())


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1, 31)], ids=str)
def test_smallest_shapes(place: Place, shape: tuple[int, int, int]) -> None:
    assert_step_within_budget(heads.run(heads.inputs(*shape, device=place.device)))


def test_no_rows(place: Place) -> None:
    """As in torch, sums over no rows are zero and means over no rows NaN."""
    step = heads.run(heads.inputs(0, 7, 3, device=place.device))
    assert step.outputs["kl"].tolist() == [0.0, 0.0]
    assert step.outputs["strength"].tolist() == [0.5, 0.5]
    assert step.outputs["losses"].isnan().all()
    assert all(step.outputs[f"logits_{m}"].shape == (0, 3) for m in ("mix", "x", "y"))
    for name in LEAVES:
        assert step.gradients[name].shape == step.inputs[name].shape
        assert (step.gradients[name] == 0).all(), name


def test_one_class(place: Place) -> None:
    """The prediction is certain: KL, loss and gradients are zero."""
    step = heads.run(heads.inputs(1, 1, 1, device=place.device))
    assert step.outputs["kl"].tolist() == [0.0, 0.0]
    assert step.outputs["strength"].tolist() == [0.5, 0.5]
    assert step.outputs["losses"].tolist() == [0.0, 0.0, 0.0]
    assert all((step.gradients[name] == 0).all() for name in LEAVES)


@pytest.mark.parametrize("layout", ["transposed", "every other column", "expanded"])
def test_any_strides(place: Place, layout: str) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    if layout == "expanded":
        inputs["x"], inputs["weight_mix"] = inputs["x"][:1].expand(9, 31), inputs["weight_mix"][:, :1].expand(6, 31)
    for name in ("x", "y", "weight_x", "weight_y", "weight_mix"):
        if layout == "transposed":
            inputs[name] = inputs[name].T.contiguous().T
        elif layout == "every other column":
            inputs[name] = inputs[name].repeat_interleave(2, dim=1)[:, ::2]
    assert_step_within_budget(heads.run(inputs))


def test_follows_the_algorithm_as_released_for_200_steps(place: Place) -> None:
    course = parity.run(parity.fused, place.device)
    assert parity.furthest(course, parity.run(parity.released, place.device)) < parity.BOUND
    assert abs(course[-1][2] - 0.5) > 0.01  # λ has moved
    assert course[-1][0] < course[0][0]


@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter minutes")
def test_gradients_that_no_cache_holds(fused: Place) -> None:
    """From 32 MiB on the C++ kernels write past the caches."""
    assert_step_within_budget(heads.run(heads.inputs(8200, 1024, 3, device=fused.device)))


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
    assert_same_bits(heads.run(inputs, call=compiled), heads.run(inputs))


def test_fullgraph_compile_over_a_group(place: Place, tmp_path: Path) -> None:
    """With one process, sums over the group equal local sums."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inputs = heads.inputs(9, 31, 6, device=place.device)
        torch.compiler.reset()
        compiled = torch.compile(heads.call, fullgraph=True, backend="aot_eager")
        step = heads.run(inputs, call=compiled, group=torch.distributed.group.WORLD)
        assert_same_bits(step, heads.run(inputs))
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
    torch.testing.assert_close(torch.autograd.grad(saved, layer.weight), plain, rtol=0, atol=0)


def test_float16_features_with_a_dead_row(place: Place) -> None:
    """1/‖x‖ and 1/‖x‖² are never stored in the narrow type, so they do not overflow."""
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


@pytest.mark.skipif(not INTERPRETED, reason="tests the Triton kernels in the interpreter, with TRITON_INTERPRET=1")
def test_programs_that_take_several_blocks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than programs: parts of sums and of head gradients are added in a fixed order."""
    from iprm_kernels.kernels import head_tiling, tiling

    inputs = heads.inputs(129, 20, 6, device=place.device)
    monkeypatch.setattr(tiling, "ROW_TILE", {4: 64})
    monkeypatch.setattr(tiling, "MOST_PARTS", 3)
    monkeypatch.setattr(head_tiling, "GRADIENT_PROGRAMS", 2)
    assert_step_within_budget(heads.run(inputs))


@pytest.mark.skipif(not INTERPRETED, reason="tests the Triton kernels in the interpreter, with TRITON_INTERPRET=1")
@pytest.mark.parametrize("classes", [6, 70])
def test_rows_in_chunks(place: Place, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked as if scratch for all rows were too large: with the products of our kernels, and with those of torch."""
    from iprm_kernels.kernels.head_tiling import RowChunks

    inputs = heads.inputs(11, 31, classes, device=place.device)
    monkeypatch.setattr(RowChunks, "of", staticmethod(lambda *_: RowChunks(rows=4, parts=1 + (classes == 6))))
    assert_step_within_budget(heads.run(inputs, through=("losses", "logits_mix", "logits_x")))


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
