"""How rows are distributed over programs and threads, and how their blocks are loaded, stored and summed.

A kernel that sums over the batch runs at most MOST_PARTS programs, each of which strides over the blocks of rows and
stores one part; the next kernel adds the parts in a fixed order. Sums therefore need no atomics, and results are bit-identical
between runs.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements in the tile of one program if it holds several short rows, by the size in bytes of the arithmetic type. A thread
#: computes the row mathematics of every row it holds a part of: twice as many elements spill.
TILE = {4: 1024, 8: 256}
#: The most rows in a tile: below eight columns a program waits for the row mathematics, not for memory.
TILE_ROWS = 128
#: The longest row held in registers, by the same size; longer rows are read block by block. Rows twice as long spill.
WHOLE_ROW = {4: 8192, 8: 2048}
#: Columns of such a block.
LOOPED_BLOCK = 2048

#: Elements of a tile of whole rows of logits, by the size of the arithmetic type.
ROW_TILE = {4: 512, 8: 256}
#: The most programs of a kernel that stores parts of a sum: four to eight per multiprocessor of a large GPU.
MOST_PARTS = 1024
PARTS_BLOCK = tl.constexpr(256)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def tiling(width: int, arithmetic: torch.dtype, whole_row: Mapping[int, int] = WHOLE_ROW) -> dict[str, Any]:
    """The tile of a kernel that reduces rows of `width`: its constants and num_warps.

    Four warps (of 32 or of 64 threads) hold up to 1,024 elements; a longer row gets a warp for every 256 or 512 of them, up to
    16 warps, as many as a block of 64-thread warps may have.
    """
    block = triton.next_power_of_2(max(width, 1))
    whole = block <= whole_row[arithmetic.itemsize]
    if not whole:
        block = LOOPED_BLOCK
    rows = min(max(TILE[arithmetic.itemsize] // block, 1), TILE_ROWS)
    return {"BLOCK_B": rows, "BLOCK_D": block, "WHOLE": whole, "num_warps": min(max(block // 256, 4), 16)}


def row_tile(classes: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, classes and warps of a tile of whole rows of logits."""
    block = triton.next_power_of_2(max(classes, 1))
    return min(max(ROW_TILE[itemsize] // block, 1), TILE_ROWS), block, min(max(block // 256, 4), 16)


def part_programs(rows: int, block: int) -> int:
    """The number of programs of a kernel that stores parts of a sum over blocks of rows; one if there are no rows (sum
    zero)."""
    return max(1, min(triton.cdiv(rows, block), MOST_PARTS))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which the current device, which launches use, is that of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dense(tensor: Any) -> Any:
    return tensor if tensor is None else tensor.contiguous()


def scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def strides(features: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(x.stride(0) for x in features), tuple(x.stride(1) for x in features)


@triton.jit
def block_rows(n_rows, i_rows, BLOCK_B: tl.constexpr):
    """Offsets and mask of the rows of a program.  -> (BLOCK_B,) x2"""
    o_rows = i_rows * tl.full((), BLOCK_B, tl.int64) + tl.arange(0, BLOCK_B)
    return o_rows, o_rows < n_rows


@triton.jit
def load_block(p, stride_row, stride_col, o_rows, m_rows, o_cols, n_cols, DTYPE: tl.constexpr, other=0.0):
    """Rows and columns of a matrix of any strides, in the arithmetic type.  -> (BLOCK_B, BLOCK_D)"""
    pointers = p + o_rows[:, None] * stride_row + o_cols[None, :].to(tl.int64) * stride_col
    return tl.load(pointers, mask=m_rows[:, None] & (o_cols < n_cols)[None, :], other=other).to(DTYPE)


@triton.jit
def store_block(p, value, o_rows, m_rows, o_cols, n_cols):
    """Stores `value` into rows and columns of a contiguous matrix, in the matrix's type."""
    pointers = p + o_rows[:, None] * n_cols + o_cols[None, :]
    if INTERPRETED and p.dtype.element_ty == tl.bfloat16:
        value = nearest_bfloat16(value)
    tl.store(pointers, value.to(p.dtype.element_ty), mask=m_rows[:, None] & (o_cols < n_cols)[None, :])


@triton.jit
def nearest_bfloat16(value):
    """float32 rounded to the nearest bfloat16, ties to even, as every GPU converts; the interpreter truncates."""
    bits = value.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def sum_of_parts(p_parts, n_parts, COLUMNS: tl.constexpr, COLUMN: tl.constexpr):
    """The sum of one column of parts (n_parts, COLUMNS), in a fixed order."""
    DTYPE: tl.constexpr = p_parts.dtype.element_ty
    o = tl.arange(0, PARTS_BLOCK)
    b_sum = tl.zeros((PARTS_BLOCK,), DTYPE)
    for i in range(0, n_parts, PARTS_BLOCK):
        b_sum += tl.load(p_parts + (i + o) * COLUMNS + COLUMN, mask=i + o < n_parts, other=0.0)
    return tl.sum(b_sum, axis=0)
