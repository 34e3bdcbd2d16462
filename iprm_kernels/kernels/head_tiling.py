"""Which products of the head step our kernels compute, and their tile sizes, as registers allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..convention import HeadState
from .tiling import row_tile

#: The most classes for which our kernels compute the products, by the type of the features: twice as many spill.
FEW_CLASSES = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
#: The most modalities whose tiles, with those of all their pairs, fit in registers.
MOST_MODALITIES = 3
#: Programs that keep a large GPU busy; tiles shrink if there would be fewer.
ENOUGH_PROGRAMS = 256
#: Programs that gradients are spread over.
GRADIENT_PROGRAMS = 1024
#: 4 MB minus the parts of the KL sums and losses; and the bytes of scratch reserved at most for parts of head gradients.
SPARE, LEAST_PARTS = 3_840_000, 1 << 21
#: The fewest rows per chunk. Memory leaves fewer only if the saved state has used it up, as for one class.
LEAST_ROWS = 8192


def projects_itself(features: Sequence[Tensor], classes: int) -> bool:
    """True if the tiles of all projections fit in registers; three modalities (six heads) fit half as many classes."""
    few = FEW_CLASSES.get(features[0].dtype, 0)
    return len(features) <= MOST_MODALITIES and classes <= (few if len(features) == 2 else few // 2)


def differentiates_itself(features: Sequence[Tensor], classes: int) -> bool:
    """True if the gradient tiles fit in registers: for two modalities whenever the projection tiles do; for three only in
    bfloat16 with aligned rows."""
    of_two = len(features) == 2 or (features[0].dtype == torch.bfloat16 and not unaligned(features))
    return of_two and projects_itself(features, classes)


def logit_tile(stats: Tensor, modalities: int, classes: int) -> tuple[int, int, int]:
    """Rows, classes and warps of a tile of logits; with more than two modalities, half as many rows."""
    rows, block_c, num_warps = row_tile(classes, stats.element_size())
    return rows if modalities == 2 else max(1, rows // 2), block_c, num_warps


class ProductTile(NamedTuple):
    """Tile sizes of a matmul kernel (rows, classes, columns), its warps, and the number of pipelined load iterations, as
    registers allow."""

    rows: int
    classes: int
    columns: int
    num_warps: int
    num_stages: int = 3

    @staticmethod
    def of_projection(features: Sequence[Tensor], classes: int) -> ProductTile:
        x, block_c, two = features[0], max(16, triton.next_power_of_2(classes)), len(features) == 2
        most, columns = (32, 16) if x.dtype == torch.float32 else (64, 64) if block_c <= 32 and two else (32, 32)
        warps = 8 if x.dtype == torch.float32 else 4
        if unaligned(features):
            return ProductTile(16, block_c, 16, warps)
        rows = next((r for r in (64, 32) if r <= most and two and len(x) >= r * ENOUGH_PROGRAMS), 16)
        return ProductTile(rows, block_c, columns, warps)

    @staticmethod
    def of_gradients(features: Sequence[Tensor], classes: int) -> ProductTile:
        x, block_c, two = features[0], max(16, triton.next_power_of_2(classes)), len(features) == 2
        if not two:
            return ProductTile(16, block_c, 16 if torch.version.hip else 32, 8, 2)
        if x.dtype == torch.float32 or block_c > 32:
            return ProductTile(16, block_c, 32, 8, 2 if unaligned(features) else 3)
        if torch.version.hip:
            return ProductTile(32, block_c, 32, 8)
        return ProductTile(32 if block_c == 16 else 16, block_c, 64, 8)

    def constants(self, x: Tensor) -> dict[str, Any]:
        warps = self.num_warps // 2 if torch.version.hip else self.num_warps  # warps have 64 threads on AMD
        blocks = {"BLOCK_B": self.rows, "BLOCK_C": self.classes, "BLOCK_D": self.columns}
        return {
            **blocks,
            "PRECISION": precision(x),
            "num_warps": warps,
            "num_stages": 2 if torch.version.hip else self.num_stages,
        }


class RowChunks(NamedTuple):
    """How the backward pass splits the rows, so that a step needs at most 8BC numbers (with H heads 8/3 HBC) and 4 MB in
    addition to inputs, gradients and heads: all rows at once if the scratch fits beside the saved state, else in chunks."""

    rows: int  #: per chunk
    parts: int  #: partial sums of the head gradients per chunk

    @staticmethod
    def of(features: Sequence[Tensor], heads: int, classes: int, of_logits: torch.dtype) -> RowChunks:
        """Chunks for our own backward kernels, or for torch's products, which need no parts."""
        (batch, width), itemsize = features[0].shape, features[0].element_size()
        mixtures = heads - len(features)
        number = max(4, itemsize)  # bytes per number of the arithmetic type
        kept = (
            number * HeadState.size(batch, classes, len(features), mixtures, itemsize < 4) + heads * batch * classes * itemsize
        )
        room = 8 * number * heads * batch * classes // 3 + SPARE - kept
        a_row = heads * classes * of_logits.itemsize + 8 * number * mixtures
        part = number * heads * classes * (width + 1)
        wanted, least = 1, 0
        if itself := differentiates_itself(features, classes):
            tile = ProductTile.of_gradients(features, classes)
            most = max(1, GRADIENT_PROGRAMS // triton.cdiv(width, tile.columns))
            wanted = min(triton.cdiv(batch, tile.rows), most)
            least = min(wanted * part, LEAST_PARTS)
        if batch * a_row + least > room and (fit := (room - least) // a_row) >= LEAST_ROWS:
            chunks = triton.cdiv(batch, fit)
            rows = 64 * triton.cdiv(batch, 64 * chunks)  # a multiple of 64 keeps the chunks aligned like the whole matrix
            parts = min(wanted, (room - rows * a_row) // part // chunks) if itself else 1
            if parts > 0:
                return RowChunks(rows, parts)
        return RowChunks(max(1, batch), max(1, min(wanted, (room - batch * a_row) // part)))


def unaligned(features: Sequence[Tensor]) -> bool:
    """Whether rows may be unaligned, so that a tile needs one address per element."""
    return any(x.shape[1] % 16 or x.stride(0) % 16 or x.data_ptr() % 16 for x in features)


def precision(x: Tensor) -> str:
    """The precision of products of float32 factors.

    Three TF32 products, which together have the accuracy of float32; a single one if torch allows TF32, or if the other factor
    was float16, which TF32 represents exactly. AMD's matrix units multiply float32.
    """
    if torch.version.hip:
        return "ieee"
    one = x.dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if one else "tf32x3"
