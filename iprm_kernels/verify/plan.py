"""What is verified: operators, types, sizes, and the shapes of each size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..verdict import SIZES, Case, name_of, size_class
from .operators import OPERATORS, Shape


class Check(NamedTuple):
    """One case, on each of its shapes; the first of them is timed."""

    case: Case
    shapes: tuple[Shape, ...]
    compiled: bool = False  #: whether torch.compile is timed as well


#: How the reason of a backend that does not support a case begins.
REFUSED = "refused: "
HEADS = ("linear_probe_rebalance", "linear_probe_rebalance_pairs")
#: (M,) divergences, or P pairs: always small.
VECTORS = ("strength_weights", "average_strength")
#: (B, D) or (B, C), with the reason for each.
ROWS: dict[str, tuple[Shape, ...]] = {
    "small": (
        (64, 512),  # IPRM's features
        (33, 127),  # padded to a block, an odd number of rows
    ),
    "medium": (
        (1024, 512),
        (37, 20_000),  # rows that the Triton kernels read block by block
    ),
    "large": (
        (2304, 1024),
        (301, 8_193),
    ),
}
#: (B, D, C).
STEPS: dict[str, tuple[Shape, ...]] = {
    "small": (
        (64, 512, 31),
        (33, 100, 7),
        (5, 16, 1000),  # classes beyond the tiles of the Triton kernels, whose products torch.mm computes
    ),
    "medium": (
        (1024, 512, 31),
        (256, 512, 1000),
    ),
    "large": (
        (16_384, 512, 33),  # enough rows for the largest tiles
        (1024, 512, 1000),
    ),
}


def work(operator: str, shape: Shape) -> int:
    """The number that `size_class` divides calls by."""
    if operator in VECTORS:
        return shape[0]
    return shape[0] * shape[1] * (shape[2] if operator in HEADS else 1)


def checks(dtypes: Sequence[torch.dtype], *, quick: bool, operators: Sequence[str] = tuple(OPERATORS)) -> list[Check]:
    """All cases of these operators and types, small ones first; the quick form has one shape per case, and times no
    torch.compile."""
    found = [
        Check(Case(operator, name_of(dtype), size), shapes[:1] if quick else shapes, not quick and dtype == torch.float32)
        for operator in operators
        for dtype in dtypes
        if dtype in OPERATORS[operator].dtypes
        for size, shapes in _shapes(operator)
    ]
    return sorted(found, key=lambda check: SIZES.index(check.case.size))


def checks_of_run(operators: Sequence[str], dtypes: Sequence[torch.dtype], step: Shape) -> list[Check]:
    """The cases of a training run, on its own shape (B, D, C)."""
    batch, width, classes = step
    found: dict[Case, Check] = {}
    for operator in operators:
        shapes: dict[str, list[Shape]] = {
            "batch_kl": [(batch, classes)],
            "probe_rebalance": [step, (batch, min(width, classes), classes)],  # whose KL has the size of the logits
        }
        own = shapes.get(operator, [(4,) if operator in VECTORS else step if operator in HEADS else (batch, width)])
        for dtype in dtypes:
            for shape in own:
                case = Case(operator, name_of(dtype), size_class(work(operator, shape), operator in HEADS))
                if dtype in OPERATORS[operator].dtypes:
                    found.setdefault(case, Check(case, (shape,)))
    return list(found.values())


def _shapes(operator: str) -> Iterator[tuple[str, tuple[Shape, ...]]]:
    if operator in VECTORS:
        yield SIZES[0], ((2,), (10,))
    elif operator in HEADS:
        yield from STEPS.items()
    else:  # with a head of few classes, for the operator that takes one
        yield from ((size, tuple((*shape, 31) for shape in shapes)) for size, shapes in ROWS.items())
