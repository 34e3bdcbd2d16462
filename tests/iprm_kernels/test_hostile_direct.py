"""Direct calls of the registered operators, past the checks of the public functions: refused with an error or served, and never
the end of the process."""

from __future__ import annotations

import collections
import itertools
import json
import random
from pathlib import Path

import direct_calls
import direct_faults
import hostile_results
import pytest
import torch
import torch.utils._pytree as pytree
from places import INTERPRETED, Place

import iprm_kernels as ik

#: Calls of one process.
BATCH = 500

pytestmark = pytest.mark.skipif(INTERPRETED, reason="for the C++ kernels")


def run_calls(folder: Path, first: int, count: int) -> collections.Counter[str]:
    """The outcomes of `count` calls; fails with the name of a call that ends its process, or writes beside its outputs."""
    outcomes: collections.Counter[str] = collections.Counter()
    report = folder / "call.txt"
    for seed in range(first, first + count, BATCH):
        code = direct_faults.run_alone(report, seed, min(BATCH, first + count - seed))
        log = report.with_suffix(".log").read_text()
        assert code == 0, f"exit code {code} in {report.read_text()}\n{log[-4000:]}"
        outcomes.update(json.loads(report.read_text()))
    return outcomes


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_call_ends_the_process(tmp_path: Path, count: int) -> None:
    outcomes = run_calls(tmp_path, count, count)
    hostile_results.EXAMPLES["test_no_call_ends_the_process"] += count
    assert outcomes["served"] > count / 20
    assert outcomes["RuntimeError"] > count / 3


@pytest.mark.parametrize("name", direct_calls.registered())
def test_calls_without_a_fault_are_served(place: Place, name: str) -> None:
    """Every registered operator is in the fuzz, with valid arguments of its own."""
    if name.startswith("iprm_cpp::") and place.device.type != "cpu":
        pytest.skip("its kernels serve CPU tensors alone")
    for seed in range(20):
        draw = random.Random(seed)
        memory = direct_calls.Memory(draw, place.device)
        arguments = direct_calls.valid_arguments(name, memory, direct_calls.Sizes.drawn(draw))
        direct_calls.overload(name)(*arguments)
        memory.assert_guards()


EMPTY = [sizes for sizes in itertools.product((3, 0), repeat=3) if 0 in sizes]


@pytest.mark.parametrize(("rows", "columns", "classes"), EMPTY)
@pytest.mark.parametrize("name", [name for name in direct_calls.registered() if name.startswith("iprm::")])
def test_sizes_of_zero_return_what_the_reference_returns(
    fused: Place, name: str, rows: int, columns: int, classes: int
) -> None:
    for dtype, seed in itertools.product((torch.float32, torch.bfloat16), range(3)):
        of = direct_calls.Sizes(rows, columns, classes, 3, [0, 1, 2, 1], dtype)
        found = []
        for backend, device in (("reference", "cpu"), (fused.backend, fused.device)):
            arguments = direct_calls.valid_arguments(name, direct_calls.Memory(random.Random(seed), device), of)
            with ik.use_backend(backend):
                found.append((direct_calls.overload(name)(*arguments), arguments))
        wanted, value = (pytree.tree_leaves(results) for results in found)
        for tensor, like in zip(value, wanted, strict=True):
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(tensor.cpu(), like, equal_nan=True, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("pairs", [0, 2])
@pytest.mark.parametrize("classes", [40, 1])
def test_a_state_of_another_size_is_refused(pairs: int, classes: int) -> None:
    """Three modalities in bfloat16, where the state also holds logits: one element more or less, and storages cut short."""
    of = direct_calls.Sizes(20, 17, classes, 3, [0, 1, 1, 2, 0, 2][: 6 - pairs], torch.bfloat16)
    for cut in (-1, 1, of.state // 2):
        memory = direct_calls.Memory(random.Random(cut))
        arguments = direct_calls.valid_arguments("iprm_cpp::head_backward", memory, of)
        names = [argument.name for argument in torch.ops.iprm_cpp.head_backward.default._schema.arguments]
        place = names.index("state")
        with pytest.raises(RuntimeError, match="state: expected shape"):
            torch.ops.iprm_cpp.head_backward(*arguments[:place], torch.zeros(of.state - cut), *arguments[place + 1 :])
        short = torch.zeros(of.state)
        short.untyped_storage().resize_(4 * (of.state - abs(cut)))
        with pytest.raises(RuntimeError, match="state: expected a storage of at least"):
            torch.ops.iprm_cpp.head_backward(*arguments[:place], short, *arguments[place + 1 :])
        torch.ops.iprm_cpp.head_backward(*arguments)
