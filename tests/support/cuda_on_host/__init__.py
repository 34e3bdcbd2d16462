"""The CUDA kernels of the head step on CPU tensors, by an emulator of blocks, warps and their barriers: see emulator.h.

On a machine without a GPU, it tests that the kernels compute correct results and have the necessary barriers. It tests neither
their speed nor whether a GPU's memory model requires more synchronisation.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from iprm_kernels.convention import PROBE, REBALANCE, HeadBackwardInputs, HeadGradients, HeadInputs, HeadOutputs, HeadState

SOURCE = Path(__file__).parent / "head.cpp"
Pointers3 = ctypes.c_void_p * 3
Pointers2 = ctypes.c_void_p * 2


class Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64))

    @staticmethod
    def of(tensor: Tensor) -> Matrix:
        return Matrix(tensor.data_ptr(), *tensor.stride())


class Head(ctypes.Structure):
    _fields_ = (
        ("x", Matrix), ("y", Matrix), ("weight", Pointers3), ("bias", Pointers3), ("target", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64), ("stats", ctypes.c_void_p), ("projected", Pointers2), ("own", Pointers2),
        ("counted", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("classes", ctypes.c_int64),
        ("label_smoothing", ctypes.c_double), ("ignore_index", ctypes.c_int64),
    )  # fmt: skip


class Forward(ctypes.Structure):
    _fields_ = (
        ("head", Head), ("weight", ctypes.c_void_p), ("logits_mix", ctypes.c_void_p), ("logits", Pointers2),
        ("kl", ctypes.c_void_p), ("strength", ctypes.c_void_p), ("loss", ctypes.c_void_p), ("losses", ctypes.c_void_p),
        ("kl_parts", ctypes.c_void_p), ("loss_parts", ctypes.c_void_p), ("probe", ctypes.c_bool), ("rebalance", ctypes.c_bool),
    )  # fmt: skip


class Backward(ctypes.Structure):
    _fields_ = (
        ("head", Head), ("grad_loss", ctypes.c_void_p), ("grad_losses", ctypes.c_void_p), ("strength", ctypes.c_void_p),
        ("upstream", Pointers3), ("differences", Pointers3), ("z_from", Pointers2), ("grad_x", ctypes.c_void_p),
        ("grad_y", ctypes.c_void_p), ("grad_weight", Pointers3), ("grad_bias", Pointers3),
    )  # fmt: skip


def obstacle() -> str:
    """Why the emulator cannot run here; empty if it can."""
    return "" if shutil.which("g++") else "no g++ was found to compile the CUDA kernels for the host"


class Emulated:
    """`head_forward` and `head_backward` in the calling convention of `iprm_kernels.convention`, for one pair."""

    def __init__(self, folder: Path, *, blocks: int = 2, seed: int = 0) -> None:
        """blocks: of the cooperative launch; fewer than tiles of rows, so that a block handles several."""
        library = folder / "head.so"
        # -fno-gnu-unique: otherwise all loaded libraries share the state of the emulator
        flags = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-Wno-unknown-pragmas")
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.tiles.argtypes, self.library.tiles.restype = [ctypes.c_int64], ctypes.c_int64
        self.library.scratch.argtypes, self.library.scratch.restype = [ctypes.c_char_p, *2 * [ctypes.c_int64]], ctypes.c_int64
        self.blocks, self.seed = blocks, seed
        self.kept: list[Tensor] = []

    def scratch(self, dtype: torch.dtype, rows: int, classes: int) -> int:
        """Elements of the arithmetic type that a backward pass allocates."""
        return self.library.scratch(_name(dtype), rows, classes)

    def head_forward(self, inputs: HeadInputs, parts: int, outputs: HeadOutputs) -> None:
        x, (logits_mix, *unimodal), state = inputs.features[0], outputs.logits, outputs.state
        head = self._head(inputs, inputs.biases, state, unimodal)
        blocks = max(1, min(self.blocks, self.library.tiles(len(x))))
        sums = torch.empty((blocks, 6), dtype=torch.float64)
        narrow = [logits.data_ptr() for logits in unimodal] if x.dtype != state.dtype else (None, None)
        written = (t.data_ptr() for t in (outputs.kl, outputs.strength, outputs.loss, outputs.losses))
        args = Forward(
            head, inputs.probe_weight.data_ptr(), logits_mix.data_ptr(), Pointers2(*narrow), *written,
            sums.data_ptr(), sums.data_ptr() + 16 * blocks, bool(parts & PROBE), bool(parts & REBALANCE),
        )  # fmt: skip
        self.library.head_forward(_name(x.dtype), ctypes.byref(args), blocks, self.seed)
        self.kept.clear()

    def head_backward(self, inputs: HeadBackwardInputs, gradients: HeadGradients) -> None:
        x, state, unimodal = inputs.features[0], inputs.state, inputs.unimodal
        head = self._head(inputs, (*inputs.biases, None, None), state, unimodal)
        rows, classes = unimodal[0].shape
        scratch = torch.empty(self.scratch(x.dtype, rows, classes), dtype=state.dtype)
        z_from, matrix = scratch.data_ptr(), rows * classes * x.element_size()
        differences = z_from + 2 * rows * state.element_size()
        features, weights, biases = ([None if t is None else t.data_ptr() for t in tensors] for tensors in gradients)
        args = Backward(
            head, self._pointer(inputs.grad_loss), self._pointer(inputs.grad_losses), inputs.strength.data_ptr(),
            Pointers3(*map(self._pointer, inputs.grad_logits)), Pointers3(*(differences + i * matrix for i in range(3))),
            Pointers2(z_from, z_from + rows * state.element_size()), *features, Pointers3(*weights), Pointers3(*biases),
        )  # fmt: skip
        self.library.head_backward(_name(x.dtype), ctypes.byref(args), self.seed)
        self.kept.clear()

    def _head(
        self,
        inputs: HeadInputs | HeadBackwardInputs,
        biases: Sequence[Tensor | None],
        state: Tensor,
        unimodal: Sequence[Tensor],
    ) -> Head:
        (x, y), target, of = inputs.features, inputs.target, HeadState.views(state, unimodal, 1)
        return Head(
            Matrix.of(x), Matrix.of(y), Pointers3(*map(self._pointer, inputs.weights)), Pointers3(*map(self._pointer, biases)),
            target.data_ptr(), *target.stride(), of.stats.data_ptr(), Pointers2(*(t.data_ptr() for t in of.projected[0])),
            Pointers2(*(t.data_ptr() for t in of.unimodal)), of.counted.data_ptr(), *x.shape, unimodal[0].shape[1],
            inputs.label_smoothing, inputs.ignore_index,
        )  # fmt: skip

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.kept.append(tensor.contiguous())
        return self.kept[-1].data_ptr()


def _name(dtype: torch.dtype) -> bytes:
    return str(dtype).removeprefix("torch.").encode()
