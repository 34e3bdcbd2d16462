"""The linear head step: launchers, forward and backward.

Heads of up to FEW_CLASSES classes: the kernels of `_head_products` multiply, and a step is three or four launches forward and
two or three backward. More classes, or float64: the products are torch's, whose library a kernel of ours would not beat, and
the rows are worked on in between.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._checks import labels
from .._library import AUTOCAST, below
from ..backends import PROBE, REBALANCE
from ..reference.head import EPS, State
from ._head_products import head_features_kernel, head_gradients_kernel, head_project_kernel, head_reduce_kernel
from ._head_rows import head_coefficients_kernel, head_losses_kernel, head_probe_kernel, head_rebalance_kernel
from ._tiles import TILE, on_device_of, part_programs, row_tile
from .divergence import kl_sums_kernel

#: The most classes for which the kernels multiply themselves, by the type of the features: twice as many spill.
FEW_CLASSES = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
#: Programs that keep a large GPU busy: tiles are smaller where there would be fewer.
ENOUGH_PROGRAMS = 256
#: The most classes of which a program holds a row, by the size of the arithmetic type.
MOST_CLASSES = {4: 4096, 8: 1024}
#: Programs that gradients are spread over, and the elements that the parts of head gradients may take, 4 MiB in float32.
GRADIENT_PROGRAMS = 1024
PART_ELEMENTS = 1 << 20
REDUCE_BLOCK = 1024


def serves(x: Tensor, weight_x: Tensor) -> bool:
    """Whether rows of so many classes are short enough for these kernels."""
    return len(weight_x) <= MOST_CLASSES[8 if x.dtype == torch.float64 else 4]


def multiplies_itself(x: Tensor, classes: int) -> bool:
    return classes <= FEW_CLASSES.get(x.dtype, 0)


class ProductTile(NamedTuple):
    """Rows, classes and columns of the tiles of a kernel that multiplies, and its warps: what registers allow."""

    rows: int
    classes: int
    columns: int
    num_warps: int

    @staticmethod
    def of_projection(x: Tensor, classes: int) -> ProductTile:
        block_c = max(16, triton.next_power_of_2(classes))
        most, columns = (32, 16) if x.dtype == torch.float32 else (64, 64) if block_c <= 32 else (32, 32)
        warps = 8 if x.dtype == torch.float32 else 4
        if x.shape[1] % 16 or x.stride(0) % 16:  # an address for every element
            return ProductTile(16, block_c, 16, warps)
        rows = next((r for r in (64, 32) if r <= most and len(x) >= r * ENOUGH_PROGRAMS), 16)
        return ProductTile(rows, block_c, columns, warps)

    @staticmethod
    def of_gradients(x: Tensor, classes: int) -> ProductTile:
        block_c = max(16, triton.next_power_of_2(classes))
        if x.dtype == torch.float32 or block_c > 32:
            return ProductTile(16, block_c, 32, 8)
        if torch.version.hip:
            return ProductTile(32, block_c, 32, 8)
        return ProductTile(32 if block_c == 16 else 16, block_c, 64, 8)

    def constants(self, x: Tensor) -> dict[str, Any]:
        warps = self.num_warps // 2 if torch.version.hip else self.num_warps  # of 64 threads there
        blocks = {"BLOCK_B": self.rows, "BLOCK_C": self.classes, "BLOCK_D": self.columns}
        return {**blocks, "PRECISION": precision(x), "num_warps": warps}


def precision(x: Tensor) -> str:
    """How factors in float32 are multiplied.

    In three products of TF32, which together are float32's, and in one where torch itself may or where the other factor was a
    float16, which TF32 holds as it is. AMD's matrix units multiply float32.
    """
    if torch.version.hip:
        return "ieee"
    one = x.dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if one else "tf32x3"


def dense(tensor: Any) -> Any:
    return tensor if tensor is None else tensor.contiguous()


def scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def head_forward(
    x: Tensor,
    y: Tensor,
    weight_x: Tensor,
    bias_x: Tensor | None,
    weight_y: Tensor,
    bias_y: Tensor | None,
    weight_mix: Tensor,
    bias_mix: Tensor | None,
    target: Tensor,
    weight: Tensor,
    label_smoothing: float,
    ignore_index: int,
    parts: int,
    state: Tensor,
    logits_mix: Tensor,
    logits_x: Tensor,
    logits_y: Tensor,
    kl: Tensor,
    strength: Tensor,
    loss: Tensor,
    losses: Tensor,
) -> None:
    labels(target, logits_mix.shape[1], ignore_index)
    of = State.views(state, logits_x, logits_y)
    kl_parts, kl_out = kl[None], None  # what processes have added up, if this is their rebalance
    with on_device_of(x):
        if parts & PROBE:
            heads = (weight_x, bias_x, weight_y, bias_y, weight_mix, bias_mix)
            kl_parts, kl_out = _probe(x, y, heads, weight, of, logits_x, logits_y), kl
        if parts & REBALANCE:
            inputs = (of, bias_mix, target, label_smoothing, ignore_index, kl_parts)
            _rebalance(*inputs, kl_out, strength, logits_mix, loss, losses)
        else:
            kl_sums_kernel[(1,)](kl_parts, kl, len(kl_parts), num_warps=4)


def _probe(
    x: Tensor, y: Tensor, heads: tuple[Any, ...], weight: Tensor, of: State, logits_x: Tensor, logits_y: Tensor
) -> Tensor:
    """Fills the state but its last number, and the unimodal logits.  -> (programs, 2) parts of the KL sums"""
    (batch, width), classes, itemsize = x.shape, logits_x.shape[1], of.a.element_size()
    weight_x, bias_x, weight_y, bias_y, weight_mix, bias_mix = map(dense, heads)
    widened = logits_x.dtype != of.a.dtype
    strides = (*x.stride(), *y.stride(), batch, width, classes)
    rows, block_c, num_warps = row_tile(classes, itemsize)
    programs = part_programs(batch, rows)
    features: tuple[Any, ...] = (x, y, bias_x, bias_y)
    if multiplies_itself(x, classes):
        features = (None,) * 4
        if batch:
            tile = ProductTile.of_projection(x, classes)
            head_project_kernel[(triton.cdiv(batch, tile.rows),)](
                x, y, weight_x, bias_x, weight_y, bias_y, weight_mix, of.stats, of.a, of.v,
                *((of.u_x, of.u_y) if widened else (None, None)), logits_x, logits_y, *strides, EPS=EPS, **tile.constants(x),
            )  # fmt: skip
    else:
        products = ((of.a, x, weight_mix), (of.v, y, weight_mix), (of.u_x, x, weight_x), (of.u_y, y, weight_y))
        with below(AUTOCAST):
            for out, matrix, head in products:
                multiply(matrix, head.T, out)
    kl_parts = scratch(of.a, programs, 2)
    copies = (logits_x, logits_y) if widened else (None, None)
    head_probe_kernel[(programs,)](
        *features, bias_mix, weight, of.stats, of.a, of.v, of.u_x, of.u_y, *copies, kl_parts, *strides, EPS=EPS,
        BLOCK_B=rows, BLOCK_C=block_c, BLOCK_D=max(16, TILE[itemsize] // rows), num_warps=num_warps,
    )  # fmt: skip
    return kl_parts


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, summed and stored in out's type, which may be wider than theirs."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _rebalance(
    of: State,
    bias_mix: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    kl_parts: Tensor,
    kl: Tensor | None,
    strength: Tensor,
    logits_mix: Tensor,
    loss: Tensor,
    losses: Tensor,
) -> None:
    batch, classes = of.a.shape
    rows, block_c, num_warps = row_tile(classes, of.a.element_size())
    programs = part_programs(batch, rows)
    loss_parts = scratch(of.a, programs, 4) if programs > 1 else None
    head_rebalance_kernel[(programs,)](
        of.a, of.v, of.u_x, of.u_y, of.stats, dense(bias_mix), target, kl_parts,
        kl, strength, logits_mix, loss_parts, loss, losses, of.counted,
        *target.stride(), batch, classes, len(kl_parts), ignore_index, SMOOTHING=label_smoothing, EPS=EPS, BLOCK_B=rows,
        BLOCK_C=block_c, num_warps=num_warps,
    )  # fmt: skip
    if loss_parts is not None:
        head_losses_kernel[(1,)](loss_parts, loss, losses, of.counted, programs, num_warps=4)


def head_backward(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_mix: Tensor | None,
    grad_logits_x: Tensor | None,
    grad_logits_y: Tensor | None,
    x: Tensor,
    y: Tensor,
    weight_x: Tensor,
    weight_y: Tensor,
    weight_mix: Tensor,
    bias_mix: Tensor | None,
    target: Tensor,
    state: Tensor,
    logits_x: Tensor,
    logits_y: Tensor,
    strength: Tensor,
    label_smoothing: float,
    ignore_index: int,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    *grad_heads: Tensor | None,
) -> None:
    of = State.views(state, logits_x, logits_y)
    batch, classes = of.a.shape
    itself = multiplies_itself(x, classes)
    # gradients are factors of products in bfloat16 anyway; in float16 those below 6e-8 would vanish
    narrow = x.dtype == torch.bfloat16 or not itself
    dz, du_x, du_y = scratch(x if narrow else of.a, 3, batch, classes)
    factors = scratch(of.a, 6, batch)
    rows, block_c, num_warps = row_tile(classes, of.a.element_size())
    upstream = map(dense, (grad_loss, grad_losses, grad_mix, grad_logits_x, grad_logits_y))
    with on_device_of(x):
        if batch:
            head_coefficients_kernel[(triton.cdiv(batch, rows),)](
                *upstream, of.a, of.v, of.u_x, of.u_y, of.stats, dense(bias_mix), target,
                strength, of.counted, dz, du_x, du_y, factors, *target.stride(), batch, classes, ignore_index,
                SMOOTHING=label_smoothing, EPS=EPS, BLOCK_B=rows, BLOCK_C=block_c, num_warps=num_warps,
            )  # fmt: skip
        gradients = _gradients if itself else _library_gradients
        gradients(x, y, (weight_x, weight_y, weight_mix), of.stats, factors, (dz, du_x, du_y), grad_x, grad_y, grad_heads)


def _gradients(
    x: Tensor,
    y: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    stats: Tensor,
    factors: Tensor,
    of_logits: tuple[Tensor, ...],
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    grad_heads: tuple[Tensor | None, ...],
) -> None:
    """Gradients of features and heads from those of the logits: one launch, or two where rows are taken in chunks."""
    (batch, width), classes = x.shape, heads[0].shape[0]
    tile = ProductTile.of_gradients(x, classes)
    panels = triton.cdiv(width, tile.columns)
    # 16-bit features leave of 8BC floats, the memory of a step, as many to the parts as float32 would have taken for gradients
    elements = PART_ELEMENTS + (batch * classes if x.dtype != torch.float32 else 0)
    chunks = max(1, min(triton.cdiv(batch, tile.rows), GRADIENT_PROGRAMS // panels, elements // (3 * classes * width)))
    parts: Any = grad_heads
    if chunks > 1:
        parts = [t if t is None else scratch(stats, chunks, *t.shape) for t in grad_heads]
    head_gradients_kernel[(panels * chunks,)](
        x, y, *(t.contiguous() for t in heads), stats, factors, *of_logits, grad_x, grad_y, *parts, *x.stride(), *y.stride(),
        batch, width, classes, chunks, EPS=EPS, **tile.constants(x),
    )  # fmt: skip
    if chunks > 1 and any(t is not None for t in grad_heads):
        programs = 3 * triton.cdiv(classes * width, REDUCE_BLOCK)
        head_reduce_kernel[(programs,)](*parts, *grad_heads, classes * width, classes, chunks, BLOCK=REDUCE_BLOCK, num_warps=4)


def _library_gradients(
    x: Tensor,
    y: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    stats: Tensor,
    factors: Tensor,
    of_logits: tuple[Tensor, ...],
    grad_x: Tensor | None,
    grad_y: Tensor | None,
    grad_heads: tuple[Tensor | None, ...],
) -> None:
    """The same by torch's products, in the memory of the gradients themselves."""
    (batch, width), (weight_x, weight_y, weight_mix), (dz, du_x, du_y) = x.shape, heads, of_logits
    grad_weight_x, grad_bias_x, grad_weight_y, grad_bias_y, grad_weight_mix, grad_bias_mix = grad_heads
    block_d = min(triton.next_power_of_2(width), TILE[stats.element_size()])
    block_b = TILE[stats.element_size()] // block_d
    grid = (triton.cdiv(batch, block_b) * triton.cdiv(width, block_d),)

    def through_mixture(g: Tensor | None, *outputs: Tensor | None) -> None:
        if batch:
            head_features_kernel[grid](
                g, x, y, stats, factors, *outputs, *x.stride(), *y.stride(), batch, width, EPS=EPS, BLOCK_B=block_b,
                BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip

    spare = next((t for t in (grad_y, grad_x) if t is not None), None)
    with below(AUTOCAST):
        if grad_weight_mix is not None:
            mixture = scratch(x, batch, width) if spare is None else spare
            through_mixture(None, mixture, None)
            torch.mm(dz.T, mixture, out=grad_weight_mix)
        if spare is not None:
            torch.mm(dz, weight_mix, out=spare)
            through_mixture(spare, grad_x, grad_y)
        sides = ((du_x, x, weight_x, grad_x, grad_weight_x), (du_y, y, weight_y, grad_y, grad_weight_y))
        for grad, features, weight, grad_features, grad_weight in sides:
            if grad_features is not None:
                grad_features.addmm_(grad, weight)
            if grad_weight is not None:
                torch.mm(grad.T, features, out=grad_weight)
        for grad, grad_bias in ((dz, grad_bias_mix), (du_x, grad_bias_x), (du_y, grad_bias_y)):
            if grad_bias is not None:
                torch.sum(grad, 0, out=grad_bias)
