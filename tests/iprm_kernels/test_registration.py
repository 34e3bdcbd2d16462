"""The operators as PyTorch sees them: opcheck, compile, autocast, second derivatives, CUDA graphs, no synchronisation."""

from __future__ import annotations

from typing import Any, ClassVar

import cases
import heads
import pytest
import torch
import torch.utils.checkpoint
from places import INTERPRETED, Place
from torch import Tensor
from watching import FunctionWatching, Watching

import iprm_kernels as ik

OPS = torch.ops.iprm


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


class TestOpcheck:
    """Schema, fake kernel, autograd registration and AOT dispatch of every operator with hand-written kernels."""

    @pytest.mark.parametrize("strided", [False, True])
    def test_normalize(self, place: Place, dtype: torch.dtype, strided: bool) -> None:
        x = cases.randn(5, 7, dtype=dtype, device=place.device)
        x = x.T.contiguous().T if strided else x
        torch.library.opcheck(OPS.normalize.default, (*leaves(x), 1e-12))
        norm = OPS.normalize(x, 1e-12)[1]
        torch.library.opcheck(OPS.normalize_backward.default, (torch.ones_like(x), x, norm, 1e-12))

    @pytest.mark.parametrize("weight_shape", [(), (5,)], ids=str)
    @pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
    def test_geodesic_mixup(
        self, place: Place, dtype: torch.dtype, weight_shape: tuple[int, ...], needed: tuple[bool, ...]
    ) -> None:
        x, y = cases.feature_pairs(5, 7, dtype, place.device)
        weight = torch.full(weight_shape, 0.3, dtype=dtype, device=place.device)
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip((x, y, weight), needed, strict=True)]
        torch.library.opcheck(OPS.geodesic_mixup.default, (*inputs, 1e-12))
        stats = OPS.geodesic_mixup(x, y, weight, 1e-12)[1]
        torch.library.opcheck(
            OPS.geodesic_mixup_backward.default, (torch.ones_like(x), x, y, weight, stats, 1e-12, list(needed))
        )

        known = OPS.geodesic_mixup(x, y, weight, 1e-12)[1]
        torch.library.opcheck(OPS.geodesic_remix.default, (*inputs, known, 1e-12))

    def test_batch_kl_pair(self, place: Place, dtype: torch.dtype) -> None:
        p, q = cases.logit_pairs(5, 7, dtype, place.device)
        torch.library.opcheck(OPS.batch_kl_pair.default, (p, q, p.flip(0)))

    @pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
    @pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
    def test_batch_kl(self, place: Place, dtype: torch.dtype, reduction: str, needed: tuple[bool, bool]) -> None:
        logits = cases.logit_pairs(5, 7, dtype, place.device)
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(logits, needed, strict=True)]
        torch.library.opcheck(OPS.batch_kl.default, (*inputs, reduction))
        value, stats = OPS.batch_kl(*logits, reduction)
        torch.library.opcheck(OPS.batch_kl_backward.default, (torch.ones_like(value), *logits, stats, reduction, list(needed)))

    def test_strength_weights(self, place: Place) -> None:
        kl = torch.tensor([1.0, 2.0, 3.0], device=place.device)
        torch.library.opcheck(OPS.strength_weights.default, leaves(kl))
        torch.library.opcheck(OPS.strength_weights_backward.default, (torch.ones_like(kl), kl))


def every_op(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    z = ik.normalize(ik.geodesic_mixup(x, y, weight))
    strength = ik.strength_weights(torch.stack([ik.batch_kl(x, z), ik.batch_kl(y, z, reduction="mean")]))
    return z.square().sum(0).dot(x.detach()[0]) + strength[0] + ik.batch_kl(x, y, reduction="none").mean()


def gradients(function: object, *inputs: Tensor) -> list[Tensor]:
    fresh = leaves(*inputs)
    value = function(*fresh)
    return [value.detach(), *torch.autograd.grad(value, fresh)]


def test_fullgraph_compile_equals_eager(place: Place) -> None:
    x, y = cases.feature_pairs(9, 31, torch.float32, place.device)
    weight = torch.tensor(0.3, device=place.device)
    torch.compiler.reset()
    compiled = torch.compile(every_op, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    torch.testing.assert_close(gradients(compiled, x, y, weight), gradients(every_op, x, y, weight))


def test_bit_identical_with_and_without_the_dispatcher(place: Place) -> None:
    x, y = cases.feature_pairs(9, 31, torch.float32, place.device)
    weight, step = torch.tensor(0.3, device=place.device), heads.inputs(9, 31, 6, device=place.device)
    past, past_step = gradients(every_op, x, y, weight), heads.run(step)
    with Watching() as watching:
        through, through_step = gradients(every_op, x, y, weight), heads.run(step)
    names = ("normalize", "geodesic_mixup", "batch_kl", "strength_weights", "linear_probe_rebalance")
    assert {f"iprm.{name}{way}.default" for name in names for way in ("", "_backward")} <= watching.seen.keys()
    assert all(torch.equal(a, b) for a, b in zip(past, through, strict=True))
    for results in ("outputs", "gradients"):
        torch.testing.assert_close(getattr(past_step, results), getattr(through_step, results), rtol=0, atol=0)


def test_a_function_mode_sees_every_operator(place: Place) -> None:
    x, y = cases.feature_pairs(9, 31, torch.float32, place.device)
    step = heads.inputs(9, 31, 6, device=place.device)
    layer = torch.nn.Linear(31, 6, device=place.device)
    state = [torch.full((), 0.5, device=place.device) for _ in range(2)]
    state += [torch.full((2,), 0.5, device=place.device), torch.zeros((), dtype=torch.int64, device=place.device)]
    with FunctionWatching() as watching:
        every_op(x, y, torch.tensor(0.3, device=place.device))
        logits = step["x"] @ step["weight_x"].T
        strength = ik.probe_rebalance(x, y, logits, logits.flip(0), layer, 0.3).strength
        ik.average_strength(strength, 0.8, False, *state)
        heads.call(step)
        ik.linear_probe_rebalance_pairs(
            [x, y], [(step["weight_x"], None)] * 2, [(step["weight_mix"], None)], step["target"], 0.3
        )
    names = {"normalize", "geodesic_mixup", "geodesic_remix", "batch_kl", "batch_kl_pair", "strength_weights"}
    names |= {"average_strength", "linear_probe_rebalance"}
    assert {f"iprm.{name}.default" for name in names} <= watching.seen.keys()
    assert watching.seen["iprm.linear_probe_rebalance.default"] == 2


class Subclass(torch.Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_subclass_sees_the_operator(place: Place) -> None:
    x = cases.randn(5, 7, device=place.device).as_subclass(Subclass)
    Subclass.seen.clear()
    ik.normalize(x)
    assert "iprm.normalize.default" in Subclass.seen


def test_second_derivatives_are_refused(place: Place) -> None:
    x, y = leaves(*cases.feature_pairs(5, 7, torch.float32, place.device))
    for value in (ik.normalize(x), ik.geodesic_mixup(x, y, 0.3), ik.batch_kl(x, y), ik.strength_weights(x[0].abs())):
        (grad,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not provided"):
            grad.square().sum().backward()


def test_autocast_takes_the_widest(place: Place) -> None:
    x, y = cases.feature_pairs(5, 7, torch.float32, place.device)
    x.requires_grad_()
    for function in (lambda x, y: ik.geodesic_mixup(x, y, 0.3), ik.batch_kl):
        with torch.autocast(place.device.type, dtype=torch.bfloat16):
            value = function(x, y.bfloat16())
        assert value.dtype == torch.float32
        assert torch.equal(value, function(x, y.bfloat16().float()))
        value.sum().backward()
        assert x.grad.dtype == torch.float32


def test_without_autocast_mixed_dtypes_are_refused(place: Place) -> None:
    x, y = cases.feature_pairs(5, 7, torch.float32, place.device)
    for function in (lambda x, y: ik.geodesic_mixup(x, y, 0.3), ik.batch_kl):
        with pytest.raises(TypeError, match=r"expected the dtype of .*torch\.float32, got torch\.bfloat16"):
            function(x, y.bfloat16())


def test_forward_mode_and_functional_transforms_are_refused(place: Place) -> None:
    x, y = cases.feature_pairs(5, 7, torch.float32, place.device)
    for function in (ik.normalize, lambda x: ik.geodesic_mixup(x, y, 0.3), lambda x: ik.batch_kl(x, y)):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        with pytest.raises(RuntimeError, match=r"nor derivatives under torch\.func"):
            torch.func.grad(lambda x, f=function: f(x).sum())(x)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def test_vmap_is_a_loop_over_the_batch(place: Place) -> None:
    x, y = (cases.randn(3, 5, 7, seed=seed, device=place.device) for seed in range(2))
    together = torch.vmap(lambda x, y: ik.geodesic_mixup(x, y, 0.3))(x, y)
    torch.testing.assert_close(together, ik.geodesic_mixup(x, y, 0.3))


def test_activation_checkpointing(place: Place) -> None:
    x, y = cases.feature_pairs(5, 7, torch.float32, place.device)
    layer = torch.nn.Linear(7, 7, device=place.device)
    for function in (
        lambda x: ik.geodesic_mixup(layer(x), y, 0.3),
        lambda x: ik.normalize(layer(x)),
        lambda x: ik.batch_kl(layer(x), y),
    ):
        plain = torch.autograd.grad(function(x).square().sum(), layer.weight)
        saved = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(saved.square().sum(), layer.weight), plain)


def test_inference_mode_under_autocast(place: Place) -> None:
    x, y = cases.feature_pairs(5, 7, torch.float32, place.device)
    with torch.inference_mode(), torch.autocast(place.device.type, dtype=torch.bfloat16):
        z = ik.geodesic_mixup(x, y, 0.3)
    assert torch.equal(z, ik.geodesic_mixup(x, y, 0.3))


def test_compiled_for_any_float_weight(place: Place) -> None:
    x, y = cases.feature_pairs(5, 7, torch.float32, place.device)
    torch.compiler.reset()
    compiled = torch.compile(ik.geodesic_mixup, fullgraph=True, backend="aot_eager")
    for weight in (0.1, 0.2, 0.7):
        torch.testing.assert_close(compiled(x, y, weight), ik.geodesic_mixup(x, y, weight))


def test_shapes_on_the_meta_device() -> None:
    x = torch.ones(2, 3, 7, device="meta")
    assert ik.geodesic_mixup(x, x, 0.3).shape == ik.normalize(x).shape == (2, 3, 7)
    assert ik.batch_kl(x[0], x[0], reduction="none").shape == (3,)


def test_no_host_synchronisation(gpu: Place) -> None:
    x, y = cases.feature_pairs(64, 512, torch.float32, "cuda")
    weight = torch.tensor(0.3, device="cuda")
    gradients(every_op, x, y, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(every_op, x, y, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_cuda_graph(gpu: Place) -> None:
    x, y = cases.feature_pairs(64, 512, torch.float32, "cuda")
    weight = torch.tensor(0.3, device="cuda")
    wanted = gradients(every_op, x, y, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(every_op, x, y, weight)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
