"""The CUDA kernels of the head step without a GPU: run by an emulator, and compiled for every supported GPU."""

from __future__ import annotations

import ast
import itertools
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import antipode
import cases
import cuda_on_host
import direct_calls
import head_accuracy
import heads
import parity
import pytest
import torch
from heads import LEAVES, Step
from places import INTERPRETED
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

import iprm_kernels as ik
import iprm_kernels.head_step
from iprm_kernels.backends import kernels
from iprm_kernels.convention import PROBE, REBALANCE, HeadInputs, HeadOutputs, HeadState
from iprm_kernels.dtypes import arithmetic_dtype

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: only Triton's kernels are tested", allow_module_level=True)

needs_emulator = pytest.mark.skipif(bool(cuda_on_host.obstacle()), reason=cuda_on_host.obstacle() or "emulated")
ROOT = Path(__file__).parents[2]
SHAPES = [
    (1, 1, 2),  # the smallest step
    (5, 7, 6),  # less than a warp of columns, less than a tile in the last block
    (17, 64, 31),  # more tiles than blocks
    (9, 40, 65),  # more classes than lanes
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> cuda_on_host.Emulated:
    return cuda_on_host.Emulated(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def on_host(emulated: cuda_on_host.Emulated, monkeypatch: pytest.MonkeyPatch) -> cuda_on_host.Emulated:
    """Runs the head step of the test with the emulated kernels."""
    monkeypatch.setattr(iprm_kernels.head_step, "kernels", lambda device: emulated)
    return emulated


def assert_as_two_passes(step: Step) -> None:
    other = heads.run(step.inputs, call=heads.two_pass, **step.options)
    for mine, theirs in ((step.outputs, other.outputs), (step.gradients, other.gradients)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@needs_emulator
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width", "classes"), SHAPES)
def test_within_the_error_budget(
    on_host: cuda_on_host.Emulated, batch: int, width: int, classes: int, dtype: torch.dtype
) -> None:
    head_accuracy.assert_within_budget(batch, width, classes, dtype, torch.device("cpu"))


@needs_emulator
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("angle", antipode.ANGLES[:3])
def test_nearly_opposite_features(on_host: cuda_on_host.Emulated, angle: float, dtype: torch.dtype) -> None:
    antipode.assert_head_step(angle, 40, dtype, torch.device("cpu"))


@needs_emulator
def test_options_and_upstream_gradients(on_host: cuda_on_host.Emulated) -> None:
    inputs = heads.inputs(9, 31, 6)
    inputs["target"][[0, 3]] = 99
    for smoothing in (0.0, 0.1):
        through = ("loss", "losses", "logits_mix", "logits_x", "logits_y")
        assert_as_two_passes(heads.run(inputs, through=through, label_smoothing=smoothing, ignore_index=99))
    assert_as_two_passes(heads.run({**inputs, "bias_x": None, "bias_mix": None}, ignore_index=99))


@needs_emulator
@pytest.mark.parametrize("needed", [("x",), ("y", "weight_mix"), ("weight_x", "bias_mix"), ("bias_y",)], ids=str)
def test_only_inputs_that_require_it_get_a_gradient(on_host: cuda_on_host.Emulated, needed: tuple[str, ...]) -> None:
    inputs = heads.inputs(9, 31, 6)
    whole, step = heads.run(inputs), heads.run(inputs, needed=needed)
    for leaf in LEAVES:
        if leaf in needed:
            torch.testing.assert_close(step.gradients[leaf], whole.gradients[leaf])
        else:
            assert step.gradients[leaf] is None


@needs_emulator
def test_edges(on_host: cuda_on_host.Emulated) -> None:
    """Dead rows, identical rows, strided rows, no rows; a label out of range makes its losses NaN and is never used as an
    index."""
    inputs = heads.inputs(9, 31, 6, torch.float64)
    inputs["x"][2] = inputs["y"][7] = 0.0
    inputs["y"][3] = inputs["x"][3]
    assert_as_two_passes(heads.run(inputs))
    transposed = {name: t.T.contiguous().T if name in ("x", "y", "weight_mix") else t for name, t in inputs.items()}
    assert_as_two_passes(heads.run(transposed))
    assert_as_two_passes(heads.run(heads.inputs(0, 7, 3)))
    inputs["target"][5] = 10**9
    step = heads.run(inputs)
    assert step.outputs["losses"].isnan().all()
    assert step.gradients["x"][5].isnan().all()
    assert step.gradients["x"][4].isfinite().all()
    assert step.outputs["strength"].isfinite().all()


@needs_emulator
@pytest.mark.parametrize(("rows", "columns", "classes"), [sizes for sizes in itertools.product((3, 0), repeat=3) if 0 in sizes])
@pytest.mark.parametrize("name", ["iprm::linear_probe_rebalance", "iprm::linear_probe_rebalance_backward"])
def test_sizes_of_zero_return_what_the_reference_returns(
    on_host: cuda_on_host.Emulated, monkeypatch: pytest.MonkeyPatch, name: str, rows: int, columns: int, classes: int
) -> None:
    of = direct_calls.Sizes(rows, columns, classes, 2, [0, 1], torch.float32)
    arguments = direct_calls.valid_arguments(name, direct_calls.Memory(random.Random(0)), of)
    found = direct_calls.overload(name)(*arguments)
    monkeypatch.setattr(iprm_kernels.head_step, "kernels", kernels)
    with iprm_kernels.use_backend("reference"):
        wanted = direct_calls.overload(name)(*arguments)
    for value, like in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, like, equal_nan=True)


@needs_emulator
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "classes"), [(65536, 31), (4096, 1000)])
def test_a_step_keeps_to_its_memory(emulated: cuda_on_host.Emulated, batch: int, classes: int, dtype: torch.dtype) -> None:
    """At most 8BC numbers and 4 MB beside inputs, gradients and heads: saved state, logits and scratch of the backward pass."""
    wide = arithmetic_dtype(dtype)
    numbers = HeadState.size(batch, classes, 2, 1, dtype != wide) + emulated.scratch(dtype, batch, classes)
    needed = numbers * wide.itemsize + 3 * batch * classes * dtype.itemsize
    assert needed <= 8 * batch * classes * wide.itemsize + 4_000_000


@needs_emulator
def test_heads_learn_from_gradients_of_logits_below_the_least_float16(on_host: cuda_on_host.Emulated) -> None:
    """As in a mean over a large batch: gradients of logits near 1e-8, large features, and so gradients of heads near 4e-5."""
    inputs = heads.inputs(5, 7, 6, torch.float16)
    inputs["x"], inputs["weight_x"] = inputs["x"] * 2**12, inputs["weight_x"] / 2**12

    def scaled(arguments: dict, **options: Any) -> ik.StepResult:
        result = heads.call(arguments, **options)
        return result._replace(loss=result.loss * 2**-24)

    whole, small = heads.run(inputs), heads.run(inputs, call=scaled)
    wanted = whole.gradients["weight_x"].float() * 2**-24
    torch.testing.assert_close(small.gradients["weight_x"].float(), wanted, rtol=1e-2, atol=1e-7)
    assert wanted.abs().max() > 3e-5


@needs_emulator
def test_the_gaps_of_the_state_are_zeros(on_host: cuda_on_host.Emulated) -> None:
    name = "iprm::linear_probe_rebalance"
    of = direct_calls.Sizes(5, 7, 3, 2, [0, 1], torch.bfloat16)
    *_, state = direct_calls.overload(name)(*direct_calls.valid_arguments(name, direct_calls.Memory(random.Random(0)), of))
    gaps = HeadState.gaps(state, [torch.empty(5, 3, dtype=torch.bfloat16)] * 2, 1)
    assert [len(gap) for gap in gaps] == [1, 2, 1, 1]
    assert not torch.cat(gaps).any()


@needs_emulator
def test_processes_add_up_between_two_halves(on_host: cuda_on_host.Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = heads.inputs(17, 31, 6)
    whole = heads.run(inputs)
    run = on_host.head_forward

    def halves(inputs: HeadInputs, parts: int, outputs: HeadOutputs) -> None:
        for part in (PROBE, REBALANCE):
            run(inputs, part, outputs)

    monkeypatch.setattr(on_host, "head_forward", halves)
    step = heads.run(inputs)
    for name, value in whole.outputs.items():
        assert torch.equal(step.outputs[name], value)


@needs_emulator
def test_any_order_of_threads_and_number_of_blocks_agree(
    on_host: cuda_on_host.Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread order between two barriers changes no bit; the number of blocks only changes the order in which parts are
    added."""
    inputs = heads.inputs(17, 40, 9)
    steps = []
    for blocks, seed in ((2, 0), (2, 1), (2, 2), (5, 3)):
        monkeypatch.setattr(on_host, "blocks", blocks)
        monkeypatch.setattr(on_host, "seed", seed)
        steps.append(heads.run(inputs))
    for step in steps[1:3]:
        assert all(torch.equal(step.outputs[name], value) for name, value in steps[0].outputs.items())
        assert all(torch.equal(step.gradients[name], value) for name, value in steps[0].gradients.items())
    torch.testing.assert_close(steps[3].outputs, steps[0].outputs)


@pytest.mark.slow
@needs_emulator
def test_follows_the_algorithm_as_released_for_200_steps(on_host: cuda_on_host.Emulated) -> None:
    cpu = torch.device("cpu")
    assert parity.furthest(parity.run(parity.fused, cpu), parity.run(parity.released, cpu)) < parity.BOUND


@pytest.fixture
def with_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Runs the head step of the test with kernels in which one text is replaced."""

    def change(text: str, by: str) -> None:
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        kernels = tmp_path / "csrc" / "cuda" / "head_kernels.cuh"
        source = kernels.read_text()
        assert source.count(text) == 1
        kernels.write_text(source.replace(text, by))
        broken = tmp_path / "tests" / "support" / "cuda_on_host"
        shutil.copytree(cuda_on_host.SOURCE.parent, broken)
        monkeypatch.setattr(cuda_on_host, "SOURCE", broken / "head.cpp")
        emulated = cuda_on_host.Emulated(tmp_path)
        monkeypatch.setattr(iprm_kernels.head_step, "kernels", lambda device: emulated)

    return change


@needs_emulator
def test_a_missing_barrier_is_seen(with_a_change: Callable[[str, str], None]) -> None:
    """Tests the emulator: without the barrier between projections and rows, some thread order reads unwritten memory."""
    projections = "project_tile<T, S>(args, first, count);"
    with_a_change(f"{projections}\n      __syncthreads();", projections)
    step = heads.run(heads.inputs(9, 31, 6))
    other = heads.run(step.inputs, call=heads.two_pass)
    assert not torch.allclose(step.outputs["kl"], other.outputs["kl"], rtol=1e-3)


@needs_emulator
@pytest.mark.parametrize(
    ("line", "leaf"),
    [("args.z_from[1][row] = to.y_from_g;", "weight_mix"), ("differences[row * classes + k] = T(difference);", "bias_x")],
)
def test_unwritten_scratch_is_seen(with_a_change: Callable[[str, str], None], line: str, leaf: str) -> None:
    """Tests the tests: scratch is filled with NaN, so an element that no kernel writes shows."""
    with_a_change(line, "")
    assert heads.run(heads.inputs(9, 31, 6)).gradients[leaf].isnan().any()


def test_all_scratch_of_the_host_code_can_be_filled_with_nan() -> None:
    """IPRM_KERNELS_POISON, which the tests set, reaches the allocations of `scratch_like` alone."""
    source = (ROOT / "csrc" / "cuda" / "head.cu").read_text()
    assert source.count("new_empty(") == 1
    assert source.count("scratch_like(") == 3  # the function and two uses
    assert os.environ["IPRM_KERNELS_POISON"]


# compiled for every supported GPU

ARCHITECTURES = ("80", "90", "100")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def nvcc_flags() -> list[str]:
    """The nvcc flags of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (value,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "NVCC_FLAGS")
    return ast.literal_eval(value)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("nvcc")
    include = Path(torch.__file__).parent / "include"
    source = ROOT / "csrc" / "cuda" / "head.cu"

    def report(architecture: str) -> str:
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        flags = (*COMMON_NVCC_FLAGS, *nvcc_flags(), "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas", "-v", target)
        command = ["nvcc", *flags, "-I", str(include), "-c", str(source), "-o", str(folder / f"sm_{architecture}.o")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    return report


@needs_nvcc
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.grid] if name != "90" else []) for name in ARCHITECTURES]
)
def test_compiles_without_spills(compiled: Callable[[str], str], architecture: str) -> None:
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled(architecture))
    assert len(found) == 4 * len(cases.DTYPES)  # three kernels, and a function that is not inlined
    assert set(itertools.chain(*found)) == {"0"}
