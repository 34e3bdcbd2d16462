"""The Triton kernels of the head step: launches, bytes and registers of the compiled code, for GPUs that this machine lacks."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from head_launches import backward, by_name, forward
from tiers import default_parameters
from triton_launches import ALL_TARGETS, FURTHER_TARGETS, TARGETS, Launch, recording, spills

from iprm_kernels import kernels
from iprm_kernels.convention import PROBE, REBALANCE
from iprm_kernels.kernels.tiling import scratch

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: dtype, batch, width, classes: one kernel regime each
PRODUCTS = (  # products by our kernels: small and large batches, widths with and without vector loads
    (F32, 64, 512, 6), (F32, 65536, 1024, 31), (F32, 65536, 1023, 31), (F32, 64, 511, 6),
    (BF16, 64, 512, 31), (BF16, 65536, 1024, 6), (BF16, 65536, 1024, 31), (BF16, 65536, 1023, 64), (BF16, 8192, 1024, 64),
    (F16, 64, 512, 6), (F16, 65536, 1024, 31), (F16, 65536, 1023, 31), (F16, 65536, 1024, 64),
)  # fmt: skip
LIBRARY = ((F32, 8192, 4096, 130), (F32, 8192, 4096, 4000), (BF16, 8192, 4096, 1000), (F16, 512, 512, 1000),
           (F64, 8192, 512, 31), (F64, 512, 512, 1000))  # fmt: skip


#: The same for three modalities in all pairs.
THREE = ((BF16, 64, 512, 6, 3), (BF16, 64, 512, 31, 3), (BF16, 65536, 1024, 31, 3))
#: Projections by our kernels and gradients by torch; then both by torch, and four modalities.
THREE_LIBRARY = ((F32, 65536, 1024, 16, 3), (BF16, 65536, 1023, 31, 3), (F16, 65536, 1024, 31, 3), (F32, 8192, 4096, 130, 3),
                 (BF16, 8192, 4096, 1000, 3), (F64, 512, 512, 31, 3), (F32, 512, 512, 6, 4))  # fmt: skip


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return recording(monkeypatch)


CASES = (*PRODUCTS, *LIBRARY, *THREE, *THREE_LIBRARY)
#: In the default tier: for each type the products by our kernels, with the largest tiles, and the products by torch.
EVERYDAY = ((F32, 65536, 1024, 31), (BF16, 65536, 1024, 31), (F16, 65536, 1024, 31),
            (F32, 8192, 4096, 130), (BF16, 8192, 4096, 1000), (F16, 512, 512, 1000), (F64, 8192, 512, 31))  # fmt: skip


#: And for a further target.
FEW = ((BF16, 65536, 1024, 31), (F32, 64, 512, 6))


def in_tiers(case: tuple, target: str) -> object:
    everyday = case in (FEW if target in FURTHER_TARGETS else EVERYDAY)
    return pytest.param(case, target, id=f"{case}-{target}", marks=[] if everyday else [pytest.mark.grid])


@pytest.mark.parametrize(("case", "target"), [in_tiers(*both) for both in itertools.product(CASES, ALL_TARGETS)])
def test_compiles_without_spills(
    case: tuple, target: str, launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No spills to memory. AMD's compiler may spill scalar registers, of which these kernels need too many, to vector
    registers."""
    monkeypatch.setattr(torch.version, "hip", "7" if target.startswith("gfx") else None)
    backward(forward(*case))
    assert launches
    seen = set()
    for launch in launches:
        compiled = launch.compile(ALL_TARGETS[target])
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        found = spills(compiled, tmp_path)
        assert found
        found.pop("sgpr_spill_count", None)
        assert not any(found.values()), (launch.name, found)


def test_the_default_tier_compiles_every_kernel_in_every_type_for_every_target(launches: list[Launch]) -> None:
    chosen = default_parameters(__file__, "test_compiles_without_spills")
    whole, default = set(), set()
    for case in CASES:
        launches.clear()
        backward(forward(*case))
        compiled = {(launch.name, case[0], target) for launch in launches for target in TARGETS}
        whole |= compiled
        default |= {entry for entry in compiled if f"{case}-{entry[2]}" in chosen}
    assert len({name for name, _, _ in whole}) == 8
    assert default == whole


@pytest.mark.parametrize("case", [*PRODUCTS, *THREE], ids=str)
def test_a_step_is_at_most_seven_launches(case: tuple, launches: list[Launch]) -> None:
    of = forward(*case)
    assert 3 <= len(launches) <= 4
    backward(of)
    chunks = sum(launch.name == "head_coefficients_kernel" for launch in launches)
    assert len(launches) <= 7 + 2 * (chunks - 1)
    assert chunks == 1 or (case[0] != BF16 and case[1] > 8192)
    assert all(len(launch.grid) == 1 and launch.grid[0] > 0 for launch in launches)


#: Cases of every regime, from scratch that fits beside the saved state to scratch that needs many chunks.
SIZES = [
    (dtype, batch, width, classes)
    for dtype in (F32, BF16, F16)
    for batch, width in ((64, 512), (8192, 16384), (40_000, 512), (65536, 1024), (200_000, 256), (3_000_000, 64))
    for classes in (2, 6, 31)
]


SIZES += [
    (F64, 65536, 1024, 31),
    (F64, 319_000, 64, 31),
    (F64, 3_000_000, 64, 6),
    (F32, 65536, 1024, 1000),
    (F32, 3_000_000, 64, 40),
    (BF16, 3_000_000, 64, 130),
    (F16, 65536, 1024, 1000),
]


@pytest.mark.parametrize("case", [*SIZES, *((BF16, batch, 512, 6, 3) for batch in (64, 65536, 3_000_000))], ids=str)
def test_memory_is_eight_matrices_of_logits_and_4_MB_whatever_the_size(
    case: tuple, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8BC numbers for three heads, in the type they are computed with; inputs, gradients and heads do not count, all other
    memory that a pass holds at once does."""
    taken = []

    def counted(like: torch.Tensor, *shape: int) -> torch.Tensor:
        taken.append(like.element_size() * math.prod(shape))
        return scratch(like, *shape)

    for module in (kernels.head, kernels.head_torch_mm):
        monkeypatch.setattr(module, "scratch", counted)
    of = forward(*case)
    kept = sum(t.numel() * t.element_size() for t in (of["state"], *of["logits"]))
    forward_bytes = kept + sum(taken)
    taken.clear()
    backward(of)
    heads = len(of["logits"])
    assert max(forward_bytes, kept + sum(taken)) <= 8 * of["state"].element_size() * heads / 3 * case[1] * case[3] + 4_000_000


@pytest.mark.parametrize("case", [(BF16, 899_000, 64, 2, 3), (BF16, 1_919_000, 64, 1), (F64, 319_000, 64, 31)], ids=str)
def test_chunks_of_rows_are_few_where_memory_is_nearly_out(case: tuple, launches: list[Launch]) -> None:
    """At these sizes the saved state fills the available memory nearly to the byte."""
    backward(forward(*case))
    assert sum(launch.name == "head_coefficients_kernel" for launch in launches) <= case[1] // 8192 + 1


def test_processes_add_up_between_two_halves(launches: list[Launch]) -> None:
    forward(F32, 64, 512, 6, parts=PROBE)
    assert set(by_name(launches)) == {"project", "probe", "kl_sums"}
    launches.clear()
    forward(F32, 64, 512, 6, parts=REBALANCE)
    assert set(by_name(launches)) == {"rebalance"}


def without_conditionals(ir: str) -> tuple[str, list[str]]:
    """The lines outside of every `scf.if`, and the text of each outermost one."""
    outside, inside, end = [], [], ""
    for line in ir.splitlines():
        if end:
            inside[-1] += line + "\n"
            end = "" if line.startswith(end) else end
        elif "scf.if" in line:
            inside.append(line + "\n")
            end = line[: len(line) - len(line.lstrip())] + "} loc"
        else:
            outside.append(line)
    return "\n".join(outside), inside


@pytest.mark.parametrize("case", [(BF16, 65536, 1024, 31), (F16, 65536, 1024, 6), (BF16, 65536, 1024, 6, 3)], ids=str)
def test_features_are_read_once_in_either_direction(case: tuple, launches: list[Launch]) -> None:
    """MBD read forward; MBD read and MBD written backward: tiles of the features, recognised by their shape. Only a block with
    a row near the antipode reads the features of its pair once more, in a conditional of the probe."""
    backward(forward(*case))
    found = by_name(launches)
    modalities = (*case, 2)[4]
    for name, writes in (("project", 0), ("gradients", modalities)):
        launch = found[name]
        rows, classes, columns = (launch.arguments[f"BLOCK_{what}"] for what in "BCD")
        alike = 3 * (modalities - 1) if classes == rows else 0  # tiles of six heads then have the same shape
        ir = launch.compile(TARGETS["sm_90"]).asm["ttir"]
        tile = rf"tensor<{rows}x{columns}x!tt\.ptr"
        assert len(re.findall(rf"tt\.load .*{tile}", ir)) == modalities + alike
        assert len(re.findall(rf"tt\.store .*{tile}", ir)) == writes + (alike if writes else 0)
        assert len(re.findall("scf.for", ir)) == 1
    rows, classes, columns = (found["probe"].arguments[f"BLOCK_{what}"] for what in "BCD")
    columns *= 2 if modalities > 2 else 1  # see near_antipode
    assert classes != columns, "tiles of features and of logits are recognised by their shape"
    tile = f"tensor<{rows}x{columns}x!tt.ptr"
    ir, conditionals = without_conditionals(found["probe"].compile(TARGETS["sm_90"]).asm["ttir"])
    assert tile not in ir
    loads = [branch.count("tt.load") for branch in conditionals if tile in branch]
    assert loads == [2] * math.comb(modalities, 2)
    for name in ("rebalance", "losses", "coefficients"):
        tensors = [t for value in found[name].arguments.values() for t in (value if isinstance(value, tuple) else (value,))]
        assert not any(t.shape == (case[1], case[2]) for t in tensors if isinstance(t, torch.Tensor))


def test_gradients_that_are_not_required_are_not_computed(launches: list[Launch]) -> None:
    of = forward(BF16, 65536, 1024, 31)
    launches.clear()
    backward(of, lambda what, place: what == "features")
    found = by_name(launches)
    assert "reduce" not in found
    assert "x64xf32" in (whole := found["gradients"].compile(TARGETS["sm_90"]).asm["ttir"])
    assert whole.count("tt.dot ") == 3  # dZ W_m, which both sides share, and dU W of either
    launches.clear()
    backward(of, lambda what, place: what == "weights" and place == 1)
    assert by_name(launches)["gradients"].compile(TARGETS["sm_90"]).asm["ttir"].count("tt.dot ") == 1


def test_deterministic_without_atomics(launches: list[Launch]) -> None:
    for case in (PRODUCTS[1], LIBRARY[0]):
        backward(forward(*case))
    for launch in launches:
        assert "atomic" not in launch.compile(TARGETS["sm_90"]).asm["ttir"], launch.name


@pytest.mark.parametrize(("setting", "wanted"), [("highest", "tf32x3"), ("high", "tf32")])
def test_tf32_only_where_torch_allows_it(setting: str, wanted: str, launches: list[Launch]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        backward(forward(F32, 64, 512, 6))
    finally:
        torch.set_float32_matmul_precision(before)
    found = by_name(launches)
    assert {found[name].arguments["PRECISION"] for name in ("project", "gradients")} == {wanted}
