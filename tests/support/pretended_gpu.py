"""A pytest plugin for machines without a GPU: torch says that there is one, and its tensors are on `meta`.

The triton backend serves `meta` tensors alone, by the fake kernels, and reading a result gives zeros. So a test of the GPU runs
until it compares numbers; but one that passes a CPU tensor where a GPU's is needed fails before, and is listed at the end.
"""

from __future__ import annotations

import hypothesis
import places
import pytest
import stand_in
import torch

import iprm_kernels as ik

torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
stand_in.serve("meta")
hypothesis.settings.register_profile(
    "one example",
    max_examples=1,
    phases=[hypothesis.Phase.generate],
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
_place, _cpu = places._place, torch.Tensor.cpu
misplaced: list[str] = []


def on_meta(backend: str, device: str) -> object:
    parameters = _place(backend, device)
    if device == "cuda":
        object.__setattr__(parameters.values[0], "device", torch.device("meta"))
    return parameters


def zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else _cpu(tensor)


places._place, torch.Tensor.cpu = on_meta, zeros
for parameters in (*places.FUSED, *places.HEAD):
    if parameters.values[0].device.type == "cuda":
        object.__setattr__(parameters.values[0], "device", torch.device("meta"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    if call.excinfo is not None:
        error = call.excinfo.value
        said = str(error).partition("\n")[0]
        of_places = " device" in said and "autocast device" not in said  # autocast knows no meta device
        if of_places or isinstance(error, ik.BackendUnavailableError):
            misplaced.append(f"{item.nodeid}: {type(error).__name__}: {said}")
    return (yield)


def pytest_terminal_summary(terminalreporter: object) -> None:
    for line in misplaced:
        terminalreporter.write_line(f"MISPLACED {line}")
