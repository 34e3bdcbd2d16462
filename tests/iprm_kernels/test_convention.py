"""The calling convention: C++ and Python share constants and layouts, and kernels have one signature in all backends."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import iprm_kernels
from iprm_kernels import convention, extension
from iprm_kernels.convention import KERNELS, OPERATORS, STATE_ALIGNMENT, HeadState, Kernels
from iprm_kernels.reference import kernels as reference


@pytest.fixture
def built() -> Any:
    try:
        return extension.load()
    except ImportError as error:
        pytest.skip(str(error))


def test_constants_of_the_extension(built: Any) -> None:
    """A float32 constant equals the Python constant rounded to float32."""
    constants = built.constants()
    assert set(constants) >= {"EPS", "PROBE", "REBALANCE", "ANTIPODE_MARGIN", "SERIES_TERMS"}
    for name, value in constants.items():
        python = getattr(convention, name)
        if isinstance(python, dict):
            for dtype, own in zip((torch.float32, torch.float64), value, strict=True):
                wanted = torch.tensor(python[dtype], dtype=dtype).item() if isinstance(own, float) else python[dtype]
                assert own == wanted, (name, dtype)
        else:
            assert value == python, name


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("modalities", "pairs"), [(2, 1), (3, 3), (4, 2)])
@pytest.mark.parametrize(("batch", "classes"), [(5, 7), (4, 8), (1, 1), (0, 3), (3, 0)])
def test_layout_of_the_saved_state(built: Any, batch: int, classes: int, modalities: int, pairs: int, narrow: bool) -> None:
    sizes = (batch, classes, modalities, pairs, narrow)
    assert built.head_layout(*sizes) == HeadState.offsets(*sizes)


@pytest.mark.parametrize(("batch", "classes"), [(5, 7), (4, 8), (1, 1)])
def test_fields_and_gaps_of_the_state_fill_it_without_overlap(batch: int, classes: int) -> None:
    modalities, pairs = 3, 2
    state = torch.zeros(HeadState.size(batch, classes, modalities, pairs, True))
    unimodal = [torch.empty(batch, classes, dtype=torch.float16)] * modalities
    views = HeadState.views(state, unimodal, pairs)
    for view in (views.stats, views.projected, *views.unimodal, views.counted):
        view.add_(1)
    gaps = HeadState.gaps(state, unimodal, pairs)
    assert all(len(gap) < STATE_ALIGNMENT for gap in gaps)
    for gap in gaps:
        gap.add_(1)
    assert (state == 1).all()


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("backend", ["reference", "kernels"])
def test_kernels_have_the_parameters_of_the_protocol(backend: str) -> None:
    """Only kernels with named parameters are checked: the reference wraps most of its functions by `into`."""
    if backend == "kernels":
        pytest.importorskip("triton")
    serves = reference.SERVES if backend == "reference" else importlib.import_module("iprm_kernels.kernels").SERVES
    assert set(serves) <= set(KERNELS)
    for name, kernel in serves.items():
        found = parameters(kernel.run)
        assert found in (parameters(getattr(Kernels, name)), ["arguments"]), name


def test_every_kernel_belongs_to_an_operator() -> None:
    assert set(itertools.chain(*OPERATORS.values())) == set(KERNELS)


def test_a_function_of_the_reference_with_a_default_fills_its_outputs() -> None:
    """The number of outputs is stated explicitly, not derived from the function's parameters."""

    def scaled(x: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
        return x * factor, x

    kernel = reference.into(scaled, outputs=2)
    doubled, same = torch.empty(3), torch.empty(3)
    kernel(torch.ones(3), doubled, same)
    assert doubled.tolist() == [2.0] * 3
    assert same.tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="zip"):
        reference.into(scaled, outputs=1)(torch.ones(3), doubled)


def test_the_reference_is_loaded_like_any_backend() -> None:
    """Within the package, loading.py imports it; other files take constants and layouts from `convention`."""
    package = Path(iprm_kernels.__file__).parent
    for file in package.rglob("*.py"):
        if file.parent.name == "reference" or file.name == "loading.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
                assert not any("reference" in name.split(".") for name in names), file
