"""Addresses in the launches of the head step's Triton kernels: each combination of aligned and unaligned ones is compiled anew.

An unaligned matrix also needs one address per element, so that a tile takes more registers.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from head_launches import backward, forward
from triton_launches import TARGETS, Launch, aligned, empty, recording, spills

from iprm_kernels.convention import HeadState
from iprm_kernels.kernels.head_tiling import unaligned

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return recording(monkeypatch)


def shifted(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor that begins one element into its memory."""
    memory = empty(1 + torch.Size(shape).numel(), dtype=dtype)
    return memory[1:].view(shape)


@pytest.mark.parametrize(("dtype", "narrow"), [(F32, BF16), (F32, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize(("modalities", "pairs"), [(2, 1), (3, 3), (4, 2)])
def test_fields_of_the_state_are_aligned(modalities: int, pairs: int, dtype: torch.dtype, narrow: torch.dtype) -> None:
    for batch, classes in itertools.product(range(10), (1, 2, 5, 6, 31)):
        state = empty(HeadState.size(batch, classes, modalities, pairs, dtype != narrow), dtype=dtype)
        views = HeadState.views(state, [empty(batch, classes, dtype=narrow)] * modalities, pairs)
        assert all(map(aligned, (views.stats, views.projected, *views.unimodal, views.counted))), (batch, classes)


@pytest.mark.parametrize(
    "case", [(BF16, 512, 31), (F32, 512, 31), (F16, 511, 6), (F32, 512, 130), (BF16, 512, 5, 3), (BF16, 512, 31, 3)], ids=str
)
def test_every_batch_size_runs_the_same_compiled_kernels(case: tuple, launches: list[Launch]) -> None:
    """The same for the same kernels: from the second program on, one more adds up the losses."""
    dtype, *sizes = case
    variants: dict[tuple[str, ...], set[str]] = {}
    for batch in range(1, 10):
        launches.clear()
        backward(forward(dtype, batch, *sizes))
        found = {launch.variant for launch in launches}
        assert found == variants.setdefault(tuple(launch.name for launch in launches), found), batch
    assert len(variants) <= 2


def test_an_address_makes_features_unaligned() -> None:
    memory = torch.empty(65 * 512 + 8, dtype=BF16)
    rows = memory[: 64 * 512].view(64, 512)
    assert not unaligned([rows])
    assert unaligned([memory[1 : 1 + 64 * 512].view(64, 512)])
    assert not unaligned([memory[8 : 8 + 64 * 512].view(64, 512)])
    assert unaligned([rows, rows[:, 1:]])
    assert unaligned([rows[:, :511]])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [(BF16, 64, 512, 31), (F32, 64, 512, 31)], ids=str)
def test_unaligned_inputs_spill_no_register(
    case: tuple, target: str, launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7" if target == "gfx942" else None)
    of: dict[str, Any] = forward(*case, new=shifted)
    backward(of)
    assert not any(map(aligned, of["inputs"].features))
    for launch in launches:
        found = spills(launch.compile(TARGETS[target]), tmp_path)
        found.pop("sgpr_spill_count", None)
        assert not any(found.values()), (launch.name, found)
