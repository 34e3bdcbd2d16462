"""Every Triton kernel compiles for GPUs that this machine lacks, with the launcher's own arguments, and spills no register.

Each case is a call: see `triton_launches`. test_triton_head_compile.py covers the head step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from tiers import default_parameters
from triton_launches import ALL_TARGETS, FURTHER_TARGETS, TARGETS, Launch, empty, recording, spills

from iprm_kernels import kernels
from iprm_kernels.dtypes import arithmetic_dtype

ROWS = 4096

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: (dtype, width), one kernel regime each: several rows per program; one; the longest whole row, with a width that allows no
#: vector loads and so needs the most registers; a loop over blocks
SHAPES = (
    (F32, 31), (F32, 1024), (F32, 4095), (F32, 8191), (F32, 16385),
    (BF16, 1024), (BF16, 4095), (BF16, 8191), (F16, 1024),
    (F64, 31), (F64, 1023), (F64, 2047), (F64, 4097),
)  # fmt: skip


def plain(dtype: torch.dtype, width: int) -> torch.Tensor:
    return empty(ROWS, width, dtype=dtype)


def transposed(dtype: torch.dtype, width: int) -> torch.Tensor:
    """A view whose column stride does not fit in 32 bits."""
    return torch.empty_strided((ROWS, width), (1, 2**31 + 16), dtype=dtype, device="meta")


def normalize(x: torch.Tensor) -> None:
    kernels.normalize(x, 1e-12, plain(x.dtype, x.shape[1]), empty(ROWS, dtype=arithmetic_dtype(x.dtype)))


def normalize_backward(x: torch.Tensor) -> None:
    kernels.normalize_backward(x, x, empty(ROWS, dtype=arithmetic_dtype(x.dtype)), 1e-12, plain(x.dtype, x.shape[1]))


def geodesic_mixup(x: torch.Tensor) -> None:
    dtype = arithmetic_dtype(x.dtype)
    kernels.geodesic_mixup(x, x, empty(ROWS, dtype=dtype), 1e-12, plain(x.dtype, x.shape[1]), empty(3, ROWS, dtype=dtype))


def geodesic_remix(x: torch.Tensor) -> None:
    dtype = arithmetic_dtype(x.dtype)
    kernels.geodesic_remix(x, x, empty(ROWS, dtype=dtype), empty(3, ROWS, dtype=dtype), 1e-12, plain(x.dtype, x.shape[1]))


def geodesic_mixup_backward(x: torch.Tensor, needed: tuple[bool, ...] = (True, True, True)) -> None:
    dtype = arithmetic_dtype(x.dtype)
    row, grad = empty(ROWS, dtype=dtype), plain(x.dtype, x.shape[1])
    outputs = [out if need else None for out, need in zip((grad, grad, row), needed, strict=True)]
    kernels.geodesic_mixup_backward(x, x, x, row, empty(3, ROWS, dtype=dtype), 1e-12, *outputs)


def batch_kl(x: torch.Tensor) -> None:
    dtype = arithmetic_dtype(x.dtype)
    kernels.batch_kl(x, x, "none", empty(len(x), dtype=dtype), empty(5, len(x), dtype=dtype))


def batch_kl_backward(x: torch.Tensor, needed: tuple[bool, ...] = (True, True)) -> None:
    dtype = arithmetic_dtype(x.dtype)
    outputs = [plain(x.dtype, x.shape[1]) if need else None for need in needed]
    kernels.batch_kl_backward(empty(len(x), dtype=dtype), x, x, empty(5, len(x), dtype=dtype), "none", *outputs)


def strength_weights(x: torch.Tensor) -> None:
    kernels.strength_weights(x[0], empty(x.shape[1], dtype=x.dtype))


def strength_weights_backward(x: torch.Tensor) -> None:
    kernels.strength_weights_backward(x[0], x[0], empty(x.shape[1], dtype=x.dtype))


def average_strength(x: torch.Tensor) -> None:
    pairs = x.shape[1]
    weight, last = empty(pairs, dtype=x.dtype), empty(pairs, 2, dtype=x.dtype)
    kernels.average_strength(last, 0.8, False, weight, weight, last, empty(pairs, dtype=torch.int64))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return recording(monkeypatch)


ROW_OPS = (
    normalize, normalize_backward, geodesic_mixup, geodesic_mixup_backward, geodesic_remix, batch_kl, batch_kl_backward
)  # fmt: skip
STRENGTH_OPS = (strength_weights, strength_weights_backward, average_strength)
OPS = (*ROW_OPS, *STRENGTH_OPS)

#: The longest whole rows of the kernels that need the most registers
LONGEST = {geodesic_mixup_backward: ((F32, 8191), (F64, 2047)), batch_kl: ((F32, 4095), (F64, 1023))}
#: op, its input, and for a backward pass the required gradients
Case = tuple[Callable[..., None], torch.Tensor, tuple[bool, ...] | None]
CASES: list[Case] = [
    *((op, plain(*shape), None) for op, shape in product(ROW_OPS, SHAPES)),
    *((op, transposed(*shape), None) for op, shapes in LONGEST.items() for shape in shapes),
    *((op, plain(dtype, 2), None) for op, dtype in product(STRENGTH_OPS, (F32, F64))),
    *(
        (geodesic_mixup_backward, plain(F32, 1024), needed)
        for needed in product((True, False), repeat=3)
        if 0 < sum(needed) < 3
    ),
    *((batch_kl_backward, plain(F32, 1024), needed) for needed in ((True, False), (False, True))),
]


#: One shape per type in the default tier: in float32 the longest whole rows of batch_kl, which need many registers, and common
#: widths in the others. All other shapes are in the tier `grid`.
EVERYDAY = ((F32, 4095), (BF16, 1024), (F16, 1024), (F64, 1023))


def is_everyday(case: Case) -> bool:
    op, x, needed = case
    return op in STRENGTH_OPS or ((x.dtype, x.shape[1]) in EVERYDAY and x.is_contiguous() and not needed)


def named(case: Case) -> str:
    op, x, needed = case
    words = [op.__name__, str(x.dtype).removeprefix("torch."), str(x.shape[1])]
    words += ["transposed"] if not x.is_contiguous() else []
    words += ["needs", *(str(int(need)) for need in needed)] if needed else []
    return "-".join(words)


#: For a further target, the default tier compiles the two operators that need the most registers.
FEW = ((geodesic_mixup_backward, BF16), (batch_kl, F32))


def in_tiers(case: Case, target: str) -> object:
    everyday = is_everyday(case) and (target in TARGETS or (case[0], case[1].dtype) in FEW)
    return pytest.param(case, target, id=f"{named(case)}-{target}", marks=[] if everyday else [pytest.mark.grid])


@pytest.mark.parametrize(("case", "target"), [in_tiers(*both) for both in product(CASES, ALL_TARGETS)])
def test_compiles_without_spills(case: Case, target: str, launches: list[Launch], tmp_path: Path) -> None:
    op, x, needed = case
    op(x, needed) if needed else op(x)
    (launch,) = launches
    found = spills(launch.compile(ALL_TARGETS[target]), tmp_path)
    assert found
    assert not any(found.values()), found


def test_the_default_tier_compiles_every_kernel_in_every_type_for_every_target() -> None:
    chosen = default_parameters(__file__, "test_compiles_without_spills")
    whole = {(op, x.dtype, target) for (op, x, _), target in product(CASES, TARGETS)}
    default = {
        (case[0], case[1].dtype, target) for case, target in product(CASES, TARGETS) if f"{named(case)}-{target}" in chosen
    }
    assert {op for op, _, _ in whole} == set(OPS)
    assert default == whole


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [1, 31, 1024, 16385])
def test_one_launch_with_its_programs_in_the_first_dimension(
    op: Callable[..., None], width: int, launches: list[Launch]
) -> None:
    op(plain(F32, width))
    (launch,) = launches
    assert len(launch.grid) == 1
    assert launch.grid[0] > 0


@pytest.mark.parametrize("op", ROW_OPS)
def test_no_rows_no_launch(op: Callable[..., None], launches: list[Launch]) -> None:
    op(plain(F32, 64)[:0])
    assert not launches


#: op, matrices read, matrices written
TRAFFIC = (
    (normalize, 1, 1), (normalize_backward, 2, 1),
    (geodesic_mixup, 2, 1), (geodesic_mixup_backward, 3, 2), (geodesic_remix, 2, 1),
    (batch_kl, 2, 0), (batch_kl_backward, 2, 2),
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(F32, 31), (BF16, 1024), *(pytest.param(*shape, marks=pytest.mark.grid) for shape in ((F32, 8192), (F64, 2048)))],
)
@pytest.mark.parametrize(("op", "reads", "writes"), TRAFFIC)
def test_reads_each_matrix_once_and_writes_only_the_outputs(
    op: Callable[..., None], reads: int, writes: int, dtype: torch.dtype, width: int, launches: list[Launch]
) -> None:
    op(plain(dtype, width // 2 if op is batch_kl else width))
    (launch,) = launches
    ir = launch.compile(TARGETS["sm_90"]).asm["ttir"]
    assert len(re.findall(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr", ir)) == reads
    assert len(re.findall(r"tt\.store .*tensor<\d+x\d+x!tt\.ptr", ir)) == writes
    assert "scf.for" not in ir


@pytest.mark.parametrize("op", OPS)
def test_deterministic_without_atomics(op: Callable[..., None], launches: list[Launch]) -> None:
    op(plain(F32, 16385))
    (launch,) = launches
    assert "atomic" not in launch.compile(TARGETS["sm_90"]).asm["ttir"]


PAIR_SHAPES = ((F32, 1000), (BF16, 31), (F64, 1023))
PAIR_GRID = ((F32, 31), (F32, 4095), (F64, 31))


@pytest.mark.parametrize("target", [*TARGETS, *(pytest.param(name, marks=pytest.mark.grid) for name in FURTHER_TARGETS)])
@pytest.mark.parametrize(
    ("dtype", "width"), [*PAIR_SHAPES, *(pytest.param(*shape, marks=pytest.mark.grid) for shape in PAIR_GRID)], ids=str
)
def test_two_divergences_read_three_matrices_once(
    dtype: torch.dtype, width: int, target: str, launches: list[Launch], tmp_path: Path
) -> None:
    x = plain(dtype, width)
    kernels.batch_kl_pair(x, x, x, empty(2, dtype=arithmetic_dtype(dtype)))
    pair, sums = launches
    compiled = pair.compile(ALL_TARGETS[target])
    found = spills(compiled, tmp_path)
    found.pop("sgpr_spill_count", None)  # to lanes of vector registers, not to memory
    assert not any(found.values()), found
    assert not any(spills(sums.compile(ALL_TARGETS[target]), tmp_path).values())
    assert len(re.findall(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr", compiled.asm["ttir"])) == 3
    assert "atomic" not in compiled.asm["ttir"]


def test_the_default_tier_compiles_two_divergences_in_every_type_for_every_target() -> None:
    chosen = default_parameters(__file__, "test_two_divergences_read_three_matrices_once")
    for dtype, target in product({dtype for dtype, _ in (*PAIR_SHAPES, *PAIR_GRID)}, TARGETS):
        assert any(name.startswith(f"{dtype}-") and name.endswith(f"-{target}") for name in chosen), (dtype, target)
