"""The Triton interpreter with the float32 arithmetic of an NVIDIA GPU.

The interpreter computes with numpy: exponentials and quotients are exact to the last bit or nearly so, where compiled kernels
use less accurate instructions, and a fused multiply-add rounds twice, where a GPU rounds once. `fuse_multiply_add` mends the
second for every interpreted test. `approximate` adds the largest errors that NVIDIA documents (PTX ISA, floating-point
instructions; CUDA programming guide, mathematical functions):

    exp          ex2.approx.f32 of x log2(e), rounded
    exp2         ex2.approx.f32, 2 ulp
    x / y        div.full.f32, 2 ulp
    log          logf, 1 ulp
    sqrt         sqrt.approx.f32, relative error 2⁻²³
    div_rn, sqrt_rn, fma, and all of float64: unchanged

An error is a function of the bits of the arguments, so that runs repeat bitwise. It has no bias, and is otherwise worse than
that of a device, which stays below its bound for nearly all arguments.
"""

from __future__ import annotations

import numpy as np
import pytest

LOG2_E = np.float32(1.4426950408889634)
ULP = {"exp2": 2.0, "divide": 2.0, "log": 1.0}
#: Which errors: see `approximate`.
draw = 0


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z in float32 with one rounding. The product of two float32 is exact in float64."""
    with np.errstate(all="ignore"):
        return (x.astype(np.float64) * y + z).astype(x.dtype)


def noise(*arguments: np.ndarray) -> np.ndarray:
    """Between -1 and 1, from the bits of float32 arguments."""
    bits = np.uint64(draw)
    with np.errstate(over="ignore"):
        for argument in arguments:
            bits = bits ^ np.ascontiguousarray(argument, np.float32).view(np.uint32).astype(np.uint64)
            bits = bits * np.uint64(0x9E3779B97F4A7C15)
            bits = bits ^ (bits >> np.uint64(29))
        bits = bits * np.uint64(0xBF58476D1CE4E5B9)
    return (bits >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def erroneous(exact: np.ndarray, ulps: float, *arguments: np.ndarray) -> np.ndarray:
    """float32 within `ulps` units in the last place of an exact result in float64. Half a unit is left for the rounding here.
    Infinities, NaN, zeros and results that round to zero are exact."""
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    value = exact + (ulps - 0.5) * unit * noise(*arguments)
    return np.where(np.isfinite(unit) & (exact.astype(np.float32) != 0), value, exact).astype(np.float32)


def exp2(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.float32:
        return np.exp2(x)
    with np.errstate(all="ignore"):
        return np.where(x == 0, np.float32(1), erroneous(np.exp2(x.astype(np.float64)), ULP["exp2"], x))


def exp(x: np.ndarray) -> np.ndarray:
    return exp2(x * LOG2_E) if x.dtype == np.float32 else np.exp(x)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        quotient = np.divide(x, y)
        if quotient.dtype != np.float32:
            return quotient
        return erroneous(np.divide(x.astype(np.float64), y.astype(np.float64)), ULP["divide"], x, y)


def log(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.float32:
        return np.log(x)
    with np.errstate(all="ignore"):
        return erroneous(np.log(x.astype(np.float64)), ULP["log"], x)


def sqrt(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.float32:
        return np.sqrt(x)
    with np.errstate(all="ignore"):
        exact = np.sqrt(x.astype(np.float64))
        return (exact * (1 + 0.5 * 2.0**-23 * noise(x))).astype(np.float32)


def fuse_multiply_add() -> None:
    """Mends the interpreter's fused multiply-add in this process. Exponentials of the kernels are accurate only with it."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        compute = fused_multiply_add if x.data.dtype == np.float32 else lambda x, y, z: x * y + z
        return TensorHandle(compute(x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def approximate(monkeypatch: pytest.MonkeyPatch, draw: int = 0) -> None:
    """Gives the interpreter the errors of a device, for one test. draw: every number gives other errors."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setitem(globals(), "draw", draw)
    for name, function in (("exp", exp), ("exp2", exp2), ("log", log), ("sqrt", sqrt)):
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", lambda self, x, f=function: self.unary_op(x, f))
    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", lambda self, x, y: self.binary_op(x, y, divide))
