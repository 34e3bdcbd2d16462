"""`average_strength`: updates λ with the measured ω in place, by the paper's rule and by that of the released code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from places import Place
from torch import Tensor

import iprm_kernels as ik
from iprm_kernels import average_strength

NAN, INF = math.nan, math.inf


class State:
    """λ, λ of evaluation, the last ω and the steps of some pairs; a single pair has no pair dimension."""

    def __init__(self, place: Place, pairs: int, dtype: torch.dtype, *, steps: int = 0) -> None:
        shape, options = (pairs,) if pairs > 1 else (), {"dtype": dtype, "device": place.device}
        self.weight, self.eval_weight = torch.full(shape, 0.5, **options), torch.full(shape, 0.25, **options)
        self.last = torch.full((*shape, 2), 0.125, **options)
        self.steps = torch.full(shape, steps, device=place.device)

    def take(self, strength: Tensor, alpha: float = 0.8, *, released: bool = False) -> None:
        average_strength(strength, alpha, released, self.weight, self.eval_weight, self.last, self.steps)

    def values(self) -> dict[str, list | float]:
        return {name: value.tolist() for name, value in vars(self).items()}


def omega(place: Place, *values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=place.device)


def test_the_paper_takes_the_first_strength_and_then_averages(place: Place) -> None:
    state = State(place, 1, torch.float64)
    state.take(omega(place, 0.75, 0.25))
    assert state.values() == {"weight": 0.75, "eval_weight": 0.75, "last": [0.75, 0.25], "steps": 1}
    state.take(omega(place, 0.25, 0.75))
    assert state.weight.item() == pytest.approx(0.8 * 0.75 + 0.2 * 0.25, abs=1e-15)
    assert torch.equal(state.eval_weight, state.weight)
    assert state.steps.item() == 2


def test_the_released_code_averages_from_the_start_and_evaluates_with_the_old(place: Place) -> None:
    state = State(place, 1, torch.float64)
    for step, (probed, first) in enumerate([(0.5, 0.75), (0.8 * 0.5 + 0.2 * 0.75, 0.25)]):
        state.take(omega(place, first, 1 - first), released=True)
        assert state.eval_weight.item() == pytest.approx(probed, abs=1e-15)
        assert state.weight.item() == pytest.approx(0.8 * probed + 0.2 * first, abs=1e-15)
        assert state.steps.item() == step + 1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_at_its_ends_alpha_takes_one_side_exactly(place: Place, alpha: float) -> None:
    state = State(place, 1, torch.float32, steps=1)
    state.weight.fill_(0.3)
    measured = omega(place, 0.7, 0.3, dtype=torch.float32)
    wanted = state.weight.clone() if alpha else measured[0]
    state.take(measured, alpha)
    assert torch.equal(state.weight, wanted)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("released", [False, True])
def test_values_that_are_not_finite_are_skipped(place: Place, bad: float, released: bool) -> None:
    state = State(place, 2, torch.float64, steps=3)
    state.take(omega(place, bad, 0.5, 0.5, bad), released=released)
    assert state.weight.tolist() == [0.5, 0.5]
    assert state.eval_weight.tolist() == [0.5, 0.5]
    assert state.last.tolist() == [[0.125, 0.5], [0.5, 0.125]]
    assert state.steps.tolist() == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pairs", [1, 3, 45])
def test_every_backend_as_the_reference(fused: Place, dtype: torch.dtype, pairs: int) -> None:
    """To two units in the last place: torch.lerp may or may not fuse its product and sum."""
    generator = torch.Generator().manual_seed(pairs)
    for alpha, released, step in itertools.product((0.0, 0.3, 0.5, 0.9, 1.0), (False, True), range(3)):
        if step == 0:
            state, wanted = State(fused, pairs, dtype), State(Place("reference", torch.device("cpu")), pairs, dtype)
        measured = torch.rand(pairs, 2, generator=generator, dtype=dtype)
        state.take(measured.to(fused.device), alpha, released=released)
        with ik.use_backend("reference"):
            wanted.take(measured, alpha, released=released)
        for name, value in vars(wanted).items():
            torch.testing.assert_close(vars(state)[name].cpu(), value, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_one_of_several_pairs_leaves_the_others(place: Place) -> None:
    state = State(place, 3, torch.float32)
    before = {name: value.clone() for name, value in vars(state).items()}
    measured = omega(place, 0.75, 0.25, dtype=torch.float32)
    average_strength(measured, 0.8, False, *(value[1] for value in vars(state).values()))
    assert [state.weight[1].item(), *state.last[1].tolist(), state.steps[1].item()] == [0.75, 0.75, 0.25, 1]
    for name, value in vars(state).items():
        assert torch.equal(value[::2], before[name][::2])


@pytest.mark.parametrize("released", [False, True])
def test_opcheck(place: Place, released: bool) -> None:
    state = State(place, 3, torch.float32)
    strength = torch.rand(3, 2, device=place.device)
    torch.library.opcheck(torch.ops.iprm.average_strength.default, (strength, 0.8, released, *vars(state).values()))


def test_a_backward_pass_that_needs_what_was_written_over_is_refused(place: Place) -> None:
    state = State(place, 1, torch.float32)
    x = torch.ones((), device=place.device, requires_grad=True)
    product = x * state.weight
    state.take(omega(place, 0.75, 0.25, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_in_inference_mode(place: Place) -> None:
    with torch.inference_mode():
        state = State(place, 1, torch.float64)
        state.take(omega(place, 0.75, 0.25))
    assert state.weight.item() == 0.75


def test_no_host_synchronisation(gpu: Place) -> None:
    state, measured = State(gpu, 3, torch.float32), torch.rand(3, 2, device=gpu.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.take(measured)
    finally:
        torch.cuda.set_sync_debug_mode("default")


#: (count, type) of weight, eval_weight, last and steps
FITTING = ((1, torch.float32), (1, torch.float32), (2, torch.float32), (1, torch.int64))


@pytest.mark.parametrize(("at", "misfit"), [(0, (1, torch.float16)), (2, (1, torch.float32)), (3, (1, torch.int32))], ids=str)
def test_cpp_reads_nothing_of_another_size_or_type(at: int, misfit: tuple[int, torch.dtype]) -> None:
    if not ik.backends()["cpp"].available:
        pytest.skip(str(ik.backends()["cpp"]))
    of = (*FITTING[:at], misfit, *FITTING[at + 1 :])
    state = [torch.zeros(count, dtype=dtype) for count, dtype in of]
    with (
        ik.use_backend("cpp"),
        pytest.raises(RuntimeError, match=r"expected (2 elements, got 1|type Long, got Int|float32 or float64, got type Half)"),
    ):
        average_strength(torch.zeros(2), 0.8, False, *state)
