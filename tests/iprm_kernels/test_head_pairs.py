"""`linear_probe_rebalance_pairs`: the step of several modalities, against its definition in plain torch."""

from __future__ import annotations

import itertools
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from heads import weights
from places import INTERPRETED, Place
from torch import Tensor
from watching import Watching

import iprm_kernels as ik

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}
Head = tuple[Tensor, Tensor | None]


def inputs(
    place: Place, modalities: int, pairs: int, dtype: torch.dtype = torch.float32, shape: tuple[int, int, int] = (9, 31, 6)
) -> dict[str, Any]:
    batch, width, classes = shape
    made = {"device": place.device, "dtype": dtype}

    def heads(count: int, scale: float, seed: int) -> list[Head]:
        return [
            ((scale * cases.randn(classes, width, seed=seed + k)).to(**made), cases.randn(classes, seed=seed + 50 + k, **made))
            for k in range(count)
        ]

    return {
        "features": [cases.randn(batch, width, seed=k, **made) for k in range(modalities)],
        "heads": heads(modalities, 2 / width**0.5, 10),
        "mix_heads": heads(pairs, 2.0, 30),
        "target": torch.arange(batch, device=place.device) % classes,
        "weight": torch.linspace(0.2, 0.9, pairs, **made),
    }


def plain(
    features: list[Tensor],
    heads: list[Head],
    mix_heads: list[Head],
    target: Tensor,
    weight: Tensor,
    *,
    pairs: list[tuple[int, int]] | None = None,
) -> ik.PairsResult:
    """The definition in plain torch with autograd: each pair is probed and rebalanced through its head."""
    pairs = pairs or list(itertools.combinations(range(len(features)), 2))
    own = [F.linear(x, *head) for x, head in zip(features, heads, strict=True)]
    with ik.use_backend("reference"):
        mixed = [
            ik.probe_rebalance(features[i], features[j], own[i], own[j], lambda z, head=head: F.linear(z, *head), probing)
            for (i, j), head, probing in zip(pairs, mix_heads, weight, strict=True)
        ]
    losses = torch.stack([F.cross_entropy(logits, target) for logits in own])
    mix_losses = torch.stack([F.cross_entropy(result.logits, target) for result in mixed])
    logits, mix_logits = tuple(own), tuple(result.logits for result in mixed)
    strength, kl = torch.stack([result.strength for result in mixed]), torch.stack([result.kl for result in mixed])
    return ik.PairsResult(mix_losses.mean() + losses.sum(), losses, mix_losses, logits, mix_logits, strength, kl)


def leaves_of(arguments: dict[str, Any]) -> list[Tensor]:
    heads = itertools.chain(*arguments["heads"], *arguments["mix_heads"])
    return [*arguments["features"], *(t for t in heads if t is not None)]


def run(call: Any, arguments: dict[str, Any], through: tuple[str, ...] = ("loss",), **options: Any) -> tuple[Any, list[Any]]:
    """Outputs, and the gradients of all leaves from the named outputs, whose elements all have different weights."""
    leaves = [leaf.requires_grad_() for leaf in leaves_of(arguments)]
    with torch.enable_grad():
        result = call(**arguments, **options)
        outputs = [torch.stack(t) if isinstance(t, tuple) else t for t in (getattr(result, name) for name in through)]
        total = sum((t * weights(t.shape, t.dtype, t.device)).sum() for t in outputs)
        # for the plain step both passes, with any backend
        if call is plain:
            with ik.use_backend("reference"):
                gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        else:
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.stack(t).detach() if isinstance(t, tuple) else t.detach() for t in result], [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients, strict=True)
    ]


def assert_as_defined(arguments: dict[str, Any], through: tuple[str, ...] = ("loss",), **options: Any) -> None:
    dtype = arguments["features"][0].dtype
    found, wanted = (
        run(ik.linear_probe_rebalance_pairs, arguments, through, **options),
        run(plain, arguments, through, **options),
    )
    torch.testing.assert_close(found, wanted, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_all_pairs(place: Place, modalities: int, dtype: torch.dtype) -> None:
    assert_as_defined(inputs(place, modalities, modalities * (modalities - 1) // 2, dtype))


@pytest.mark.parametrize("classes", [2, 40])
def test_few_and_many_classes(place: Place, classes: int) -> None:
    assert_as_defined(inputs(place, 3, 3, shape=(17, 20, classes)))


@pytest.mark.parametrize("through", ["losses", "mix_losses", "logits", "mix_logits"])
def test_gradient_through_each_output(place: Place, through: str) -> None:
    assert_as_defined(inputs(place, 3, 3), (through,))


@pytest.mark.parametrize("pairs", [[(0, 2)], [(2, 0), (1, 2)], [(0, 1), (1, 0)]], ids=str)
def test_some_pairs_in_any_order(place: Place, pairs: list[tuple[int, int]]) -> None:
    """A modality in no pair learns only from its own head."""
    assert_as_defined(inputs(place, 3, len(pairs)), pairs=pairs)


def test_two_modalities_are_a_step_of_one_pair(place: Place) -> None:
    arguments = inputs(place, 2, 1)
    several = ik.linear_probe_rebalance_pairs(**arguments)
    (x, y), (head_x, head_y), (head_mix,) = arguments["features"], arguments["heads"], arguments["mix_heads"]
    one = ik.linear_probe_rebalance(x, y, head_x, head_y, head_mix, arguments["target"], arguments["weight"][0])
    assert torch.equal(several.loss, one.loss)
    assert torch.equal(several.strength[0], one.strength)
    assert torch.equal(several.mix_logits[0], one.logits_mix)


def test_one_head_for_all_mixtures(place: Place) -> None:
    arguments = inputs(place, 3, 3)
    arguments["mix_heads"] = [arguments["mix_heads"][0]] * 3
    assert_as_defined(arguments)


def test_bfloat16_and_float16_learn(place: Place) -> None:
    exact, gradients = run(ik.linear_probe_rebalance_pairs, inputs(place, 3, 3, shape=(16, 32, 6)))
    for dtype, close in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        outputs, narrow = run(ik.linear_probe_rebalance_pairs, inputs(place, 3, 3, dtype, shape=(16, 32, 6)))
        torch.testing.assert_close(outputs[0], exact[0], rtol=close, atol=0)
        for found, wanted in zip(narrow, gradients, strict=True):
            assert found.dtype == dtype
            assert (found.float() - wanted).norm() <= 2 * close * wanted.norm()


def test_only_inputs_that_require_it_get_a_gradient(place: Place) -> None:
    arguments = inputs(place, 3, 3)
    (_, whole) = run(ik.linear_probe_rebalance_pairs, arguments)
    leaves = leaves_of(arguments)
    wanted = [0, 2, 4, 9, 14]
    for k, leaf in enumerate(leaves):
        leaf.requires_grad_(k in wanted)
    found = torch.autograd.grad(ik.linear_probe_rebalance_pairs(**arguments).loss, [leaves[k] for k in wanted])
    torch.testing.assert_close(list(found), [whole[k] for k in wanted], **CLOSE[torch.float32])


def test_a_dead_row_learns_from_its_own_head_alone(place: Place) -> None:
    arguments = inputs(place, 3, 3)
    arguments["features"][1][4] = 0
    _, gradients = run(ik.linear_probe_rebalance_pairs, arguments)
    logits = F.linear(arguments["features"][1], *arguments["heads"][1])
    (of_logits,) = torch.autograd.grad(F.cross_entropy(logits, arguments["target"]), logits)
    torch.testing.assert_close(gradients[1][4], of_logits[4] @ arguments["heads"][1][0], **CLOSE[torch.float32])


def test_repeats_bitwise(place: Place) -> None:
    first, second = (run(ik.linear_probe_rebalance_pairs, inputs(place, 3, 3, shape=(65, 40, 6))) for _ in range(2))
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


def test_opcheck(place: Place) -> None:
    arguments = inputs(place, 3, 3)
    heads = [*arguments["mix_heads"], *arguments["heads"]]
    for leaf in leaves_of(arguments):
        leaf.requires_grad_()
    lists = (arguments["features"], [head[0] for head in heads], [head[1] for head in heads], [0, 1, 0, 2, 1, 2])
    call = (*lists, arguments["target"], arguments["weight"], 0.1, -100, "")
    torch.library.opcheck(torch.ops.iprm.linear_probe_rebalance.default, call)
    saved = [[tensor.detach() for tensor in tensors] for tensors in lists[:3]]
    loss, _, *logits, strength, _, state = torch.ops.iprm.linear_probe_rebalance(*saved, *call[3:])
    grads = (torch.ones_like(loss), None, [torch.ones_like(own) for own in logits])
    for needed in ([True] * 15, [False, True, True] * 5):
        torch.library.opcheck(
            torch.ops.iprm.linear_probe_rebalance_backward.default,
            (*grads, *saved[:2], saved[2][:3], lists[3], arguments["target"], state, logits[3:], strength, 0.1, -100, needed),
        )


def test_bit_identical_with_and_without_the_dispatcher(place: Place) -> None:
    past = run(ik.linear_probe_rebalance_pairs, inputs(place, 3, 3))
    with Watching() as watching:
        through = run(ik.linear_probe_rebalance_pairs, inputs(place, 3, 3))
    assert {f"iprm.linear_probe_rebalance{way}.default" for way in ("", "_backward")} <= watching.seen.keys()
    torch.testing.assert_close(past, through, rtol=0, atol=0)


def test_fullgraph_compile_equals_eager(place: Place) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        ik.linear_probe_rebalance_pairs, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor"
    )
    found, wanted = run(compiled, inputs(place, 3, 3)), run(ik.linear_probe_rebalance_pairs, inputs(place, 3, 3))
    torch.testing.assert_close(found, wanted, **CLOSE[torch.float32])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(3, 9, 31)}, TypeError, "features: expected a list or tuple"),
        ({"features": [torch.zeros(9, 31)]}, ValueError, "features: expected 2 or more"),
        ({"heads": []}, ValueError, "heads: expected 3 heads"),
        ({"mix_heads": [(torch.zeros(6, 31), None)]}, ValueError, "mix_heads: expected 3 heads"),
        ({"pairs": [(0, 1), (0, 2), (1, 3)]}, ValueError, r"pairs\[2\]: expected two different modalities, 0 to 2"),
        ({"pairs": [(0, 1), (0, 2), (1, 1)]}, ValueError, r"pairs\[2\]: expected two different modalities"),
        ({"pairs": []}, ValueError, "pairs: expected at least one"),
        ({"pairs": 3}, TypeError, "pairs: expected a list or tuple"),
        ({"weight": torch.zeros(2)}, ValueError, "weight: expected a float, shape"),
        ({"target": torch.full((9,), 6)}, ValueError, "target: expected labels"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = inputs(Place("reference", torch.device("cpu")), 3, 3)
    with pytest.raises(error, match=message):
        ik.linear_probe_rebalance_pairs(**{**arguments, **change})
