"""The Triton kernels of the head step: launches, bytes and registers of the compiled code, for GPUs that are not here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from triton_launches import TARGETS, Launch, empty, recording, spills

from iprm_kernels import kernels
from iprm_kernels.backends import PROBE, REBALANCE
from iprm_kernels.dtypes import arithmetic_dtype
from iprm_kernels.head import _state_size

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: dtype, batch, width, classes: a kernel regime each
PRODUCTS = (  # multiplied by the kernels themselves: small and large batches, widths that allow vector loads and that do not
    (F32, 64, 512, 6), (F32, 65536, 1024, 31), (F32, 65536, 1023, 31), (F32, 64, 511, 6),
    (BF16, 64, 512, 31), (BF16, 65536, 1024, 6), (BF16, 65536, 1024, 31), (BF16, 65536, 1023, 64), (BF16, 8192, 1024, 64),
    (F16, 64, 512, 6), (F16, 65536, 1024, 31), (F16, 65536, 1023, 31), (F16, 65536, 1024, 64),
)  # fmt: skip
LIBRARY = ((F32, 8192, 4096, 130), (F32, 8192, 4096, 4000), (BF16, 8192, 4096, 1000), (F16, 512, 512, 1000),
           (F64, 8192, 512, 31), (F64, 512, 512, 1000))  # fmt: skip


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return recording(monkeypatch)


def forward(
    dtype: torch.dtype, batch: int, width: int, classes: int, parts: int = PROBE | REBALANCE
) -> dict[str, torch.Tensor]:
    """The launches of a forward pass; its tensors, by name."""
    arithmetic = arithmetic_dtype(dtype)
    x = empty(batch, width, dtype=dtype)
    heads = [empty(*shape, dtype=dtype) for _ in range(3) for shape in ((classes, width), (classes,))]
    target, state = empty(batch, dtype=torch.int64), empty(_state_size(x, classes), dtype=arithmetic)
    logits = [empty(batch, classes, dtype=dtype) for _ in range(3)]
    kl, strength, losses = (empty(size, dtype=arithmetic) for size in (2, 2, 3))
    loss = empty(dtype=arithmetic)
    kernels.head_forward(x, x, *heads, target, loss, 0.1, -100, parts, state, *logits, kl, strength, loss, losses)
    return {"x": x, "weight": heads[0], "bias": heads[1], "target": target, "state": state, "logits": logits[0],
            "strength": strength, "loss": loss, "losses": losses}  # fmt: skip


def backward(of: dict[str, torch.Tensor], needed: tuple[bool, ...] = (True,) * 8) -> None:
    x, weight, bias, logits = of["x"], of["weight"], of["bias"], of["logits"]
    upstream = (of["loss"], of["losses"], logits, logits, logits)
    saved = (x, x, weight, weight, weight, bias, of["target"], of["state"], logits, logits, of["strength"], 0.1, -100)
    outputs = [t if need else None for t, need in zip((x, x, *(weight, bias) * 3), needed, strict=True)]
    kernels.head_backward(*upstream, *saved, *outputs)


def by_name(launches: list[Launch]) -> dict[str, Launch]:
    return {launch.name.removeprefix("head_").removesuffix("_kernel"): launch for launch in launches}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [*PRODUCTS, *LIBRARY], ids=str)
def test_compiles_without_spills(
    case: tuple, target: str, launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None to memory. AMD's scalar registers, of which these kernels hold more than there are, go to lanes of vector ones."""
    monkeypatch.setattr(torch.version, "hip", "7" if target == "gfx942" else None)
    backward(forward(*case))
    assert launches
    for launch in launches:
        found = spills(launch.compile(TARGETS[target]), tmp_path)
        assert found
        found.pop("sgpr_spill_count", None)
        assert not any(found.values()), (launch.name, found)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_a_step_is_at_most_seven_launches(case: tuple, launches: list[Launch]) -> None:
    of = forward(*case)
    assert 3 <= len(launches) <= 4
    backward(of)
    assert len(launches) <= 7
    assert all(len(launch.grid) == 1 and launch.grid[0] > 0 for launch in launches)


def test_processes_add_up_between_two_halves(launches: list[Launch]) -> None:
    forward(F32, 64, 512, 6, PROBE)
    assert set(by_name(launches)) == {"project", "probe", "kl_sums"}
    launches.clear()
    forward(F32, 64, 512, 6, REBALANCE)
    assert set(by_name(launches)) == {"rebalance"}


@pytest.mark.parametrize("case", [(BF16, 65536, 1024, 31), (F16, 65536, 1024, 6)], ids=str)
def test_features_are_read_once_in_either_direction(case: tuple, launches: list[Launch]) -> None:
    """2BD read forward; 2BD read and 2BD written backward: tiles of X and Y, told from others by their shape."""
    backward(forward(*case))
    found = by_name(launches)
    for name, writes in (("project", 0), ("gradients", 2)):
        launch = found[name]
        tile = f"{launch.arguments['BLOCK_B']}x{launch.arguments['BLOCK_D']}"
        ir = launch.compile(TARGETS["sm_90"]).asm["ttir"]
        assert len(re.findall(rf"tt\.load .*tensor<{tile}x!tt\.ptr", ir)) == 2
        assert len(re.findall(rf"tt\.store .*tensor<{tile}x!tt\.ptr", ir)) == writes
        assert len(re.findall("scf.for", ir)) == 1
    for name in ("probe", "rebalance", "losses", "coefficients"):
        assert not any(t.shape == (case[1], case[2]) for t in found[name].arguments.values() if isinstance(t, torch.Tensor))


def test_gradients_nobody_asked_for_are_not_computed(launches: list[Launch]) -> None:
    of = forward(BF16, 65536, 1024, 31)
    launches.clear()
    backward(of, (True, True, *(False,) * 6))
    found = by_name(launches)
    assert "reduce" not in found
    assert "x64xf32" in (whole := found["gradients"].compile(TARGETS["sm_90"]).asm["ttir"])
    assert whole.count("tt.dot ") == 3  # dZ W_m, which both sides share, and dU W of either
    launches.clear()
    backward(of, (False, False, True, False, False, False, False, False))
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
