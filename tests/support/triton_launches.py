"""Launches of Triton kernels recorded instead of run, and compiled ahead of time for GPUs that this machine lacks.

The launchers run on meta tensors, and a recorder replaces the launch itself. What is compiled is therefore a real call, with
the tile, warps and flags that the launcher chose.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: there is nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Those of MI200, which the default tier compiles for a few cases only.
FURTHER_TARGETS = {"gfx90a": GPUTarget("hip", "gfx90a", 64)}
ALL_TARGETS = TARGETS | FURTHER_TARGETS


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def aligned(tensor: torch.Tensor) -> bool:
    """Whether the address is a multiple of 16 bytes, on a device whose allocations are."""
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


@dataclass
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def source(self) -> ASTSource:
        """The kernel and its arguments, specialised as a launch does it: None and 1 are constants, multiples of 16 and aligned
        pointers are marked. test_triton_launches.py compares the result with that of a launch."""
        signature, constants, attributes = {}, {}, {}

        def described(value: Any, path: tuple[int, ...], specialize: bool) -> Any:
            if isinstance(value, tuple):
                return tuple(described(element, (*path, k), specialize) for k, element in enumerate(value))
            if value is None or (isinstance(value, int) and value == 1 and specialize):
                constants[path] = value
                if len(path) == 1:  # as Triton's JIT, whose keys this compilation shares
                    attributes[path] = []
                return "constexpr"
            if specialize:
                divisible = aligned(value) if isinstance(value, torch.Tensor) else value % 16 == 0
                attributes[path] = [["tt.divisibility", 16]] if divisible else []
            return mangle_type(value)

        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(index,)], attributes[(index,)] = "constexpr", value, []
            else:
                signature[parameter.name] = described(value, (index,), not parameter.do_not_specialize)
        return ASTSource(self.kernel, signature, constants, attributes)

    @property
    def variant(self) -> str:
        """What a launch looks its compiled kernel up by: equal for launches that share one."""
        return f"{self.source().hash()} {sorted(self.options.items())}"

    def compile(self, target: GPUTarget) -> CompiledKernel:
        return triton.compile(self.source(), target=target, options=self.options)


def recording(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """A list that records the launches of a test."""
    recorded: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        recorded.append(Launch(self, arguments, options, grid))

    monkeypatch.setattr(JITFunction, "run", record)
    return recorded


def spills(compiled: CompiledKernel, folder: Path) -> dict[str, int]:
    """Bytes of stack and local memory (NVIDIA), spilled registers and scratch (AMD), as the assembler reports them."""
    if "amdgcn" in compiled.asm:
        found = re.findall(r"\.(\w+_spill_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"])
    else:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"(STACK|LOCAL):(\d+)", report)
    return {name: int(value) for name, value in found}
