"""The CUDA kernels of the head step on CPU tensors, by an emulator of blocks, warps and their barriers: see emulator.h.

It shows that the kernels compute what they should and wait where they must, on a machine without a GPU. It shows nothing of
their speed, nor that a GPU's memory model asks for no more.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from iprm_kernels.backends import PROBE, REBALANCE
from iprm_kernels.reference.head import State

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
        ("upstream", Pointers3), ("gradients", Pointers3), ("z_from", Pointers2), ("grad_x", ctypes.c_void_p),
        ("grad_y", ctypes.c_void_p), ("grad_weight", Pointers3), ("grad_bias", Pointers3),
    )  # fmt: skip


def obstacle() -> str:
    """Why nothing can be emulated here; empty if it can."""
    return "" if shutil.which("g++") else "no g++ was found to compile the CUDA kernels for the host"


class Emulated:
    """`head_forward` and `head_backward` in the calling convention of `iprm_kernels.backends`."""

    def __init__(self, folder: Path, *, blocks: int = 2, seed: int = 0) -> None:
        """blocks: of the cooperative launch; fewer than tiles of rows, so that a block takes several."""
        library = folder / "head.so"
        flags = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas")
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.tiles.argtypes, self.library.tiles.restype = [ctypes.c_int64], ctypes.c_int64
        self.blocks, self.seed = blocks, seed
        self.kept: list[Tensor] = []

    def head_forward(
        self, x: Tensor, y: Tensor, weight_mix: Tensor, weight_x: Tensor, weight_y: Tensor, bias_mix: Tensor | None,
        bias_x: Tensor | None, bias_y: Tensor | None, target: Tensor, probing: Tensor, label_smoothing: float,
        ignore_index: int, parts: int, state: Tensor, logits_mix: Tensor, logits_x: Tensor, logits_y: Tensor, kl: Tensor,
        strength: Tensor, loss: Tensor, losses: Tensor,
    ) -> None:  # fmt: skip
        weights, biases, unimodal = (weight_mix, weight_x, weight_y), (bias_mix, bias_x, bias_y), (logits_x, logits_y)
        head = self._head(x, y, weights, biases, target, state, unimodal, label_smoothing, ignore_index)
        blocks = max(1, min(self.blocks, self.library.tiles(len(x))))
        sums = torch.empty((blocks, 6), dtype=torch.float64)
        narrow = (logits_x.data_ptr(), logits_y.data_ptr()) if x.dtype != state.dtype else (None, None)
        args = Forward(
            head, probing.data_ptr(), logits_mix.data_ptr(), Pointers2(*narrow), kl.data_ptr(), strength.data_ptr(),
            loss.data_ptr(), losses.data_ptr(), sums.data_ptr(), sums.data_ptr() + 16 * blocks, bool(parts & PROBE),
            bool(parts & REBALANCE),
        )  # fmt: skip
        self.library.head_forward(_name(x), ctypes.byref(args), blocks, self.seed)
        self.kept.clear()

    def head_backward(
        self, grad_loss: Tensor | None, grad_losses: Tensor | None, grad_logits_mix: Tensor | None,
        grad_logits_x: Tensor | None, grad_logits_y: Tensor | None, x: Tensor, y: Tensor, weight_mix: Tensor,
        weight_x: Tensor, weight_y: Tensor, bias_mix: Tensor | None, target: Tensor, state: Tensor, logits_x: Tensor,
        logits_y: Tensor, strength: Tensor, label_smoothing: float, ignore_index: int, *outputs: Tensor | None,
    ) -> None:  # fmt: skip
        weights, biases = (weight_mix, weight_x, weight_y), (bias_mix, None, None)
        head = self._head(x, y, weights, biases, target, state, (logits_x, logits_y), label_smoothing, ignore_index)
        gradients = torch.empty((3, *logits_x.shape), dtype=state.dtype)
        z_from = torch.empty((2, len(x)), dtype=state.dtype)
        written = [None if t is None else t.data_ptr() for t in outputs]
        args = Backward(
            head, self._pointer(grad_loss), self._pointer(grad_losses), strength.data_ptr(),
            Pointers3(*map(self._pointer, (grad_logits_mix, grad_logits_x, grad_logits_y))),
            Pointers3(*(t.data_ptr() for t in gradients)), Pointers2(*(t.data_ptr() for t in z_from)), *written[:2],
            Pointers3(*written[2:5]), Pointers3(*written[5:]),
        )  # fmt: skip
        self.library.head_backward(_name(x), ctypes.byref(args), self.seed)
        self.kept.clear()

    def _head(
        self, x: Tensor, y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], target: Tensor, state: Tensor,
        unimodal: Sequence[Tensor], label_smoothing: float, ignore_index: int,
    ) -> Head:  # fmt: skip
        of = State.views(state, unimodal, 1)
        return Head(
            Matrix.of(x), Matrix.of(y), Pointers3(*map(self._pointer, weights)), Pointers3(*map(self._pointer, biases)),
            target.data_ptr(), *target.stride(), of.stats.data_ptr(), Pointers2(*(t.data_ptr() for t in of.projected[0])),
            Pointers2(*(t.data_ptr() for t in of.unimodal)), of.counted.data_ptr(), *x.shape, unimodal[0].shape[1],
            label_smoothing, ignore_index,
        )  # fmt: skip

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.kept.append(tensor.contiguous())
        return self.kept[-1].data_ptr()


def _name(x: Tensor) -> bytes:
    return str(x.dtype).removeprefix("torch.").encode()
