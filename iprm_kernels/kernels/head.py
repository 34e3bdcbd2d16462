"""The linear head step: launchers, forward and backward.

Heads of up to FEW_CLASSES classes: the kernels of `_head_products` multiply, and a step is three or four launches forward and
two or three backward, for two modalities or for three. More classes, float64, or what would spill: the products are torch's,
and the rows are worked on in between.
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
from ..reference.head import EPS, State, pairs_of
from ._head_products import head_features_kernel, head_gradients_kernel, head_project_kernel, head_reduce_kernel
from ._head_rows import head_coefficients_kernel, head_losses_kernel, head_probe_kernel, head_rebalance_kernel
from ._tiles import TILE, on_device_of, part_programs, row_tile
from .divergence import kl_sums_kernel

#: The most classes for which the kernels multiply themselves, by the type of the features: twice as many spill.
FEW_CLASSES = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
#: The most modalities whose tiles fit into registers, with those of all their pairs.
MOST_MODALITIES = 3
#: Programs that keep a large GPU busy: tiles are smaller where there would be fewer.
ENOUGH_PROGRAMS = 256
#: The most classes of which a program holds a row, by the size of the arithmetic type.
MOST_CLASSES = {4: 4096, 8: 1024}
#: Programs that gradients are spread over, and the elements that the parts of head gradients may take, 4 MiB in float32.
GRADIENT_PROGRAMS = 1024
PART_ELEMENTS = 1 << 20
REDUCE_BLOCK = 1024


def serves(features: list[Tensor], weights: list[Tensor]) -> bool:
    """Whether rows of so many classes are short enough for these kernels."""
    return len(weights[0]) <= MOST_CLASSES[8 if features[0].dtype == torch.float64 else 4]


def projects_itself(features: list[Tensor], classes: int) -> bool:
    """Whether tiles of all projections fit into registers: of three modalities, six heads, those of half as many classes."""
    few = FEW_CLASSES.get(features[0].dtype, 0)
    return len(features) <= MOST_MODALITIES and classes <= (few if len(features) == 2 else few // 2)


def differentiates_itself(features: list[Tensor], classes: int) -> bool:
    """Whether those of all gradients do: of three modalities in bfloat16 alone, with rows of whole vectors; else they spill."""
    of_two = len(features) == 2 or (features[0].dtype == torch.bfloat16 and not unaligned(features))
    return of_two and projects_itself(features, classes)


def logit_tile(stats: Tensor, modalities: int, classes: int) -> tuple[int, int, int]:
    """Rows, classes and warps of a tile of a kernel that works on logits: of more heads half as many rows at a time."""
    rows, block_c, num_warps = row_tile(classes, stats.element_size())
    return rows if modalities == 2 else max(1, rows // 2), block_c, num_warps


class ProductTile(NamedTuple):
    """Rows, classes and columns of the tiles of a kernel that multiplies, its warps, and how many iterations of its loads are
    under way at once: what registers allow."""

    rows: int
    classes: int
    columns: int
    num_warps: int
    num_stages: int = 3

    @staticmethod
    def of_projection(features: list[Tensor], classes: int) -> ProductTile:
        x, block_c, two = features[0], max(16, triton.next_power_of_2(classes)), len(features) == 2
        most, columns = (32, 16) if x.dtype == torch.float32 else (64, 64) if block_c <= 32 and two else (32, 32)
        warps = 8 if x.dtype == torch.float32 else 4
        if unaligned(features):
            return ProductTile(16, block_c, 16, warps)
        rows = next((r for r in (64, 32) if r <= most and two and len(x) >= r * ENOUGH_PROGRAMS), 16)
        return ProductTile(rows, block_c, columns, warps)

    @staticmethod
    def of_gradients(features: list[Tensor], classes: int) -> ProductTile:
        x, block_c, two = features[0], max(16, triton.next_power_of_2(classes)), len(features) == 2
        if not two:
            return ProductTile(16, block_c, 16 if torch.version.hip else 32, 8, 2)
        if x.dtype == torch.float32 or block_c > 32:
            return ProductTile(16, block_c, 32, 8, 2 if unaligned(features) else 3)
        if torch.version.hip:
            return ProductTile(32, block_c, 32, 8)
        return ProductTile(32 if block_c == 16 else 16, block_c, 64, 8)

    def constants(self, x: Tensor) -> dict[str, Any]:
        warps = self.num_warps // 2 if torch.version.hip else self.num_warps  # of 64 threads there
        blocks = {"BLOCK_B": self.rows, "BLOCK_C": self.classes, "BLOCK_D": self.columns}
        return {
            **blocks,
            "PRECISION": precision(x),
            "num_warps": warps,
            "num_stages": 2 if torch.version.hip else self.num_stages,
        }


def unaligned(features: list[Tensor]) -> bool:
    """Whether rows begin anywhere, so that a tile takes an address for every element."""
    return any(x.shape[1] % 16 or x.stride(0) % 16 for x in features)


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
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[int],
    target: Tensor,
    probing: Tensor,
    label_smoothing: float,
    ignore_index: int,
    parts: int,
    state: Tensor,
    logits: Tensor,
    kl: Tensor,
    strength: Tensor,
    loss: Tensor,
    losses: Tensor,
) -> None:
    labels(target, logits.shape[2], ignore_index)
    shape: dict[str, Any] = {"MODALITIES": len(features), "PAIRS": tuple(pairs_of(pairs))}
    mixtures = len(shape["PAIRS"])
    of = State.views(state, logits, mixtures)
    kl_parts, kl_out = kl[None], None  # what processes have added up, if this is their rebalance
    with on_device_of(features[0]):
        if parts & PROBE:
            kl_parts, kl_out = _probe(features, weights, biases, shape, probing, of, logits[mixtures:]), kl
        if parts & REBALANCE:
            inputs = (of, biases[:mixtures], shape, target, label_smoothing, ignore_index, kl_parts)
            _rebalance(*inputs, kl_out, strength, logits, loss, losses)
        else:
            kl_sums_kernel[(1,)](kl_parts, kl, len(kl_parts), COLUMNS=2 * mixtures, num_warps=4)


def _probe(
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    shape: dict[str, Any],
    probing: Tensor,
    of: State,
    logits: Tensor,
) -> Tensor:
    """Fills the state but its last number, and the unimodal logits.  -> (programs, 2P) parts of the KL sums"""
    (_, batch, classes), width, itemsize = logits.shape, features[0].shape[1], of.stats.element_size()
    heads, offsets = tuple(map(dense, weights)), tuple(map(dense, biases))
    pairs, widened = shape["PAIRS"], logits.dtype != of.stats.dtype
    rows, block_c, num_warps = logit_tile(of.stats, len(features), classes)
    block_d = max(16, TILE[itemsize] // rows // (1 if len(features) == 2 else 4))
    programs = part_programs(batch, rows)
    sizes = (batch, width, classes)
    multiplied: tuple[Tensor, ...] = ()
    if projects_itself(features, classes):
        if batch:
            tile = ProductTile.of_projection(features, classes)
            head_project_kernel[(triton.cdiv(batch, tile.rows),)](
                tuple(features), heads, offsets, of.stats, of.projected, of.unimodal if widened else None, logits,
                *strides(features), *sizes, **shape, EPS=EPS, **tile.constants(features[0]),
            )  # fmt: skip
    else:
        multiplied = tuple(features)
        with below(AUTOCAST):
            for k, pair in enumerate(pairs):
                for side, m in enumerate(pair):
                    multiply(features[m], heads[k].T, of.projected[k, side])
            for m, x in enumerate(features):
                multiply(x, heads[len(pairs) + m].T, of.unimodal[m])
    kl_parts = scratch(of.stats, programs, 2 * len(pairs))
    head_probe_kernel[(programs,)](
        multiplied, offsets, probing, of.stats, of.projected, of.unimodal, logits if widened else None, kl_parts,
        *strides(features), *sizes, **shape, EPS=EPS, BLOCK_B=rows, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    return kl_parts


def strides(features: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(x.stride(0) for x in features), tuple(x.stride(1) for x in features)


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
    biases: list[Tensor | None],
    shape: dict[str, Any],
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    kl_parts: Tensor,
    kl: Tensor | None,
    strength: Tensor,
    logits: Tensor,
    loss: Tensor,
    losses: Tensor,
) -> None:
    _, batch, classes = logits.shape
    rows, block_c, num_warps = logit_tile(of.stats, shape["MODALITIES"], classes)
    programs = part_programs(batch, rows)
    loss_parts = scratch(of.stats, programs, len(losses) + 1) if programs > 1 else None
    head_rebalance_kernel[(programs,)](
        of.projected, of.unimodal, of.stats, tuple(map(dense, biases)), target, kl_parts,
        kl, strength, logits, loss_parts, loss, losses, of.counted,
        *target.stride(), batch, classes, len(kl_parts), ignore_index, **shape, SMOOTHING=label_smoothing, EPS=EPS,
        BLOCK_B=rows, BLOCK_C=block_c, num_warps=num_warps,
    )  # fmt: skip
    if loss_parts is not None:
        head_losses_kernel[(1,)](loss_parts, loss, losses, of.counted, programs, **shape, num_warps=4)


def head_backward(
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_logits: Tensor | None,
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    pairs: list[int],
    target: Tensor,
    state: Tensor,
    logits: Tensor,
    strength: Tensor,
    label_smoothing: float,
    ignore_index: int,
    grad_features: list[Tensor | None],
    grad_weights: list[Tensor | None],
    grad_biases: list[Tensor | None],
) -> None:
    shape: dict[str, Any] = {"MODALITIES": len(features), "PAIRS": tuple(pairs_of(pairs))}
    mixtures = len(shape["PAIRS"])
    of = State.views(state, logits, mixtures)
    heads, batch, classes = logits.shape
    itself = differentiates_itself(features, classes)
    # gradients are factors of products in bfloat16 anyway; in float16 those below 6e-8 would vanish
    narrow = features[0].dtype == torch.bfloat16 or not itself
    of_logits = scratch(features[0] if narrow else of.stats, heads, batch, classes)
    factors = scratch(of.stats, mixtures, 8, batch)
    rows, block_c, num_warps = logit_tile(of.stats, len(features), classes)
    with on_device_of(features[0]):
        if batch:
            head_coefficients_kernel[(triton.cdiv(batch, rows),)](
                *map(dense, (grad_loss, grad_losses, grad_logits)), of.projected, of.unimodal, of.stats,
                tuple(map(dense, biases[:mixtures])), target, strength, of.counted, of_logits, factors, *target.stride(), batch,
                classes, ignore_index, **shape, SMOOTHING=label_smoothing, EPS=EPS, BLOCK_B=rows, BLOCK_C=block_c,
                num_warps=max(num_warps, 8) if rows == 1 and len(features) > 2 else num_warps,
            )  # fmt: skip
        gradients = _gradients if itself else _library_gradients
        gradients(features, weights, shape, factors, of_logits, grad_features, grad_weights, grad_biases)


def _gradients(
    features: list[Tensor],
    weights: list[Tensor],
    shape: dict[str, Any],
    factors: Tensor,
    of_logits: Tensor,
    grad_features: list[Tensor | None],
    grad_weights: list[Tensor | None],
    grad_biases: list[Tensor | None],
) -> None:
    """Gradients of features and heads from those of the logits: one launch, or two where rows are taken in chunks."""
    (heads, batch, classes), x, width = of_logits.shape, features[0], features[0].shape[1]
    tile = ProductTile.of_gradients(features, classes)
    panels = triton.cdiv(width, tile.columns)
    # 16-bit features leave of 8BC floats, the memory of a step, as many to the parts as float32 would have taken for gradients
    elements = PART_ELEMENTS + (batch * classes if x.dtype != torch.float32 else 0)
    chunks = max(1, min(triton.cdiv(batch, tile.rows), GRADIENT_PROGRAMS // panels, elements // (heads * classes * width)))
    parts: Any = (tuple(grad_weights), tuple(grad_biases))
    if chunks > 1:
        parts = [tuple(t if t is None else scratch(factors, chunks, *t.shape) for t in grads) for grads in parts]
    head_gradients_kernel[(panels * chunks,)](
        tuple(features), tuple(map(dense, weights)), factors, of_logits, tuple(grad_features), *parts,
        *strides(features), batch, width, classes, chunks, **shape, **tile.constants(x),
    )  # fmt: skip
    if chunks > 1 and any(t is not None for t in (*grad_weights, *grad_biases)):
        programs = heads * triton.cdiv(classes * width, REDUCE_BLOCK)
        head_reduce_kernel[(programs,)](
            *parts, tuple(grad_weights), tuple(grad_biases), classes * width, classes, chunks, BLOCK=REDUCE_BLOCK, num_warps=4
        )


def _library_gradients(
    features: list[Tensor],
    weights: list[Tensor],
    shape: dict[str, Any],
    factors: Tensor,
    of_logits: Tensor,
    grad_features: list[Tensor | None],
    grad_weights: list[Tensor | None],
    grad_biases: list[Tensor | None],
) -> None:
    """The same by torch's products, in the memory of the gradients themselves."""
    pairs, (batch, width) = shape["PAIRS"], features[0].shape
    block_d = min(triton.next_power_of_2(width), TILE[factors.element_size()])
    block_b = TILE[factors.element_size()] // block_d
    grid = (triton.cdiv(batch, block_b) * triton.cdiv(width, block_d),)
    written: set[int] = set()

    def through_mixture(k: int, g: Tensor | None, outputs: list[Tensor | None], mixture: Tensor | None = None) -> None:
        x, y = (features[m] for m in pairs[k])
        add_x, add_y = (m in written for m in pairs[k])
        if batch:
            head_features_kernel[grid](
                g, x, y, factors[k], *outputs, mixture, *x.stride(), *y.stride(), batch, width, ADD_X=add_x,
                ADD_Y=add_y, BLOCK_B=block_b, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip

    with below(AUTOCAST):
        spare = next((t for t in grad_features if t is not None), None)
        for k, grad_weight in enumerate(grad_weights[: len(pairs)]):
            if grad_weight is not None:
                spare = scratch(features[0], batch, width) if spare is None else spare
                through_mixture(k, None, [None, None], spare)
                torch.mm(of_logits[k].T, spare, out=grad_weight)
        for k, pair in enumerate(pairs):
            wanted = {m: grad_features[m] for m in pair if grad_features[m] is not None}
            fresh: Tensor | None = next((t for m, t in wanted.items() if m not in written), None)
            if fresh is not None:
                torch.mm(of_logits[k], weights[k], out=fresh)
            else:  # no gradient is still to be written whose memory would hold dZ W
                for side, m in enumerate(pair):
                    if (grad := wanted.get(m)) is not None:
                        by_row = factors[k, 2 + side, :, None]
                        grad.addmm_(torch.where(by_row == 0, 0, of_logits[k] * by_row).to(grad.dtype), weights[k])
            if wanted:
                through_mixture(k, fresh, [grad_features[m] for m in pair])
                written.update(wanted)
        for m, x in enumerate(features):
            grad, weight, grad_features_m = of_logits[len(pairs) + m], weights[len(pairs) + m], grad_features[m]
            if grad_features_m is not None:
                torch.addmm(grad_features_m, grad, weight, beta=int(m in written), out=grad_features_m)
            if (grad_weight := grad_weights[len(pairs) + m]) is not None:
                torch.mm(grad.T, x, out=grad_weight)
        for grad, grad_bias in zip(of_logits, grad_biases, strict=True):
            if grad_bias is not None:
                torch.sum(grad, 0, out=grad_bias)
