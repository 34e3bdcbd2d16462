"""Valid calls of the registered operators, `torch.ops.iprm_cpp.*` and `torch.ops.iprm.*`, with arguments by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iprm_kernels import extension
from iprm_kernels.convention import REDUCTIONS, HeadState
from iprm_kernels.dtypes import FLOATING, arithmetic_dtype

GUARD = 64
#: What the unused memory around a tensor holds, byte by byte.
GUARD_BYTE = 0x5A


class Memory:
    """Makes tensors of random numbers, half of them amid memory that a call must leave alone."""

    def __init__(self, draw: random.Random, device: torch.device | str = "cpu") -> None:
        self.draw, self.device = draw, device
        self.generator = torch.Generator().manual_seed(draw.getrandbits(32))
        self.guards: list[Tensor] = []

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, as an operator's output is."""
        count = torch.Size(shape).numel()
        if self.draw.random() < 0.5:
            return torch.full((count,), 0.0 if dtype.is_floating_point else 0, dtype=dtype, device=self.device).view(shape)
        around = torch.empty(count + 2 * GUARD, dtype=dtype, device=self.device)
        around.view(torch.uint8).fill_(GUARD_BYTE)
        self.guards += [around[:GUARD], around[-GUARD:]]
        return around[GUARD : GUARD + count].view(shape)

    def numbers(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An input: random numbers, with any strides if it is a matrix."""
        values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64).to(dtype)
        kind = self.draw.choice(["contiguous", "contiguous", "columns first", "wide", "one row"])
        if len(shape) != 2 or kind == "contiguous":
            return self.new(shape, dtype).copy_(values)
        if kind == "columns first":
            return self.new(shape[::-1], dtype).T.copy_(values)
        if kind == "one row" and shape[0]:
            return self.new((1, shape[1]), dtype).copy_(values[:1]).expand(*shape)
        return self.new((shape[0], 2 * shape[1] + 3), dtype)[:, 1 : 1 + 2 * shape[1] : 2].copy_(values)

    def dense(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.new(shape, dtype).copy_(torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64))

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.draw.random() < 0.7 else None

    def assert_guards(self) -> None:
        for guard in self.guards:
            assert (guard.view(torch.uint8) == GUARD_BYTE).all(), "memory beside an argument was written"


class Sizes(NamedTuple):
    """B, D, C, the pairs of M modalities, and the types of a call."""

    rows: int
    columns: int
    classes: int
    modalities: int
    pairs: list[int]
    dtype: torch.dtype

    @staticmethod
    def drawn(draw: random.Random) -> Sizes:
        modalities = draw.choice([2, 2, 3])
        pairs = [place for _ in range(draw.choice([1, 1, 2, 3])) for place in draw.sample(range(modalities), 2)]
        rows, columns, classes = draw.choice([0, 1, 2, 5, 20]), draw.choice([0, 1, 3, 17, 40]), draw.choice([0, 1, 3, 17, 40])
        return Sizes(rows, columns, classes, modalities, pairs, draw.choice(FLOATING))

    @property
    def count(self) -> int:
        return len(self.pairs) // 2

    @property
    def wide(self) -> torch.dtype:
        return arithmetic_dtype(self.dtype)

    @property
    def state(self) -> int:
        return HeadState.size(self.rows, self.classes, self.modalities, self.count, self.dtype != self.wide)


def _head_inputs(m: Memory, of: Sizes) -> dict[str, Any]:
    heads = of.count + of.modalities
    return {
        "features": [m.numbers((of.rows, of.columns), of.dtype) for _ in range(of.modalities)],
        "weights": [m.numbers((of.classes, of.columns), of.dtype) for _ in range(heads)],
        "biases": [m.maybe(lambda: m.numbers((of.classes,), of.dtype)) for _ in range(heads)],
        "pairs": list(of.pairs),
        "target": m.new((of.rows,), torch.int64).copy_(_labels(m, of)),
    }


def _labels(m: Memory, of: Sizes) -> Tensor:
    if of.classes == 0:
        return torch.full((of.rows,), -100)  # the ignored label
    return torch.randint(0, of.classes, (of.rows,), generator=m.generator)


def _head_forward(m: Memory, of: Sizes) -> dict[str, Any]:
    heads = of.count + of.modalities
    return {
        **_head_inputs(m, of),
        "probe_weight": m.dense((of.count,), of.wide),
        "label_smoothing": 0.1, "ignore_index": -100, "parts": 3,
        "state": m.new((of.state,), of.wide),
        "logits": [m.new((of.rows, of.classes), of.dtype) for _ in range(heads)],
        "kl": m.dense((2 * of.count,), of.wide), "strength": m.new((2 * of.count,), of.wide),
        "loss": m.new((), of.wide), "losses": m.new((heads,), of.wide),
    }  # fmt: skip


def _head_backward(m: Memory, of: Sizes) -> dict[str, Any]:
    heads, inputs = of.count + of.modalities, _head_inputs(m, of)
    logits = [m.maybe(lambda: m.numbers((of.rows, of.classes), of.dtype)) for _ in range(heads)]
    return {
        "grad_loss": m.maybe(lambda: m.dense((), of.wide)), "grad_losses": m.maybe(lambda: m.dense((heads,), of.wide)),
        "grad_logits": logits, **inputs, "biases": inputs["biases"][: of.count],
        "state": m.dense((of.state,), of.wide),
        "unimodal": [m.dense((of.rows, of.classes), of.dtype) for _ in range(of.modalities)],
        "strength": m.dense((2 * of.count,), of.wide), "label_smoothing": 0.1, "ignore_index": -100,
        "grad_features": [m.maybe(lambda: m.new((of.rows, of.columns), of.dtype)) for _ in range(of.modalities)],
        "grad_weights": [m.maybe(lambda: m.new((of.classes, of.columns), of.dtype)) for _ in range(heads)],
        "grad_biases": [m.maybe(lambda: m.new((of.classes,), of.dtype)) for _ in range(heads)],
    }  # fmt: skip


def _head_step(m: Memory, of: Sizes) -> dict[str, Any]:
    options = {"label_smoothing": 0.1, "ignore_index": -100, "group": ""}
    return {**_head_inputs(m, of), "probe_weight": m.dense((of.count,), of.wide), **options}


def _head_step_backward(m: Memory, of: Sizes) -> dict[str, Any]:
    of_kernel = _head_backward(m, of)
    needed = [m.draw.random() < 0.7 for _ in range(of.modalities + 2 * (of.count + of.modalities))]
    return {name: value for name, value in of_kernel.items() if not name.startswith(("grad_f", "grad_w", "grad_b"))} | {
        "needed": needed
    }


def _average(m: Memory, of: Sizes) -> dict[str, Any]:
    pairs = m.draw.choice([0, 1, of.count])
    return {
        "strength": m.dense((2 * pairs,), of.wide), "alpha": 0.8, "released": m.draw.random() < 0.5,
        "weight": m.dense((pairs,), of.wide), "eval_weight": m.dense((pairs,), of.wide),
        "last": m.dense((pairs, 2), of.wide), "steps": m.new((pairs,), torch.int64).zero_(),
    }  # fmt: skip


def _kl(m: Memory, of: Sizes) -> dict[str, Any]:
    return {name: m.numbers((of.rows, of.classes), of.dtype) for name in ("p_logits", "q_logits")}


def _mix(m: Memory, of: Sizes) -> dict[str, Any]:
    features = {name: m.numbers((of.rows, of.columns), of.dtype) for name in ("x", "y")}
    return {**features, "weight": m.dense((of.rows,), of.wide)}


def _matrix(m: Memory, of: Sizes) -> Tensor:
    return m.numbers((of.rows, of.columns), of.dtype)


def _of_value(m: Memory, of: Sizes, reduction: int) -> Tensor:
    return m.dense((of.rows,) if reduction == 2 else (), of.wide)


def _cpp(m: Memory, of: Sizes, reduction: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """The kernels: inputs, then outputs, under the names of the schema."""
    rows, matrix, logits = (of.rows,), (of.rows, of.columns), (of.rows, of.classes)
    three, five = (3, of.rows), (5, of.rows)
    return {
        "normalize": lambda: {"x": _matrix(m, of), "eps": 1e-12, "out": m.new(matrix, of.dtype), "norm": m.new(rows, of.wide)},
        "normalize_backward": lambda: {
            "grad": _matrix(m, of), "x": _matrix(m, of), "norm": m.dense(rows, of.wide), "eps": 1e-12,
            "grad_x": m.new(matrix, of.dtype),
        },
        "geodesic_mixup": lambda: {**_mix(m, of), "eps": 1e-12, "z": m.new(matrix, of.dtype), "stats": m.new(three, of.wide)},
        "geodesic_remix": lambda: {**_mix(m, of), "stats": m.dense(three, of.wide), "eps": 1e-12, "z": m.new(matrix, of.dtype)},
        "geodesic_mixup_backward": lambda: {
            "grad": _matrix(m, of), **_mix(m, of), "stats": m.dense(three, of.wide), "eps": 1e-12,
            "grad_x": m.maybe(lambda: m.new(matrix, of.dtype)), "grad_y": m.maybe(lambda: m.new(matrix, of.dtype)),
            "grad_w": m.maybe(lambda: m.new(rows, of.wide)),
        },
        "batch_kl": lambda: {
            **_kl(m, of), "reduction": reduction, "value": _of_value(m, of, reduction), "stats": m.new(five, of.wide),
        },
        "batch_kl_backward": lambda: {
            "grad": _of_value(m, of, reduction), **_kl(m, of), "stats": m.dense(five, of.wide), "reduction": reduction,
            "grad_p": m.maybe(lambda: m.new(logits, of.dtype)), "grad_q": m.maybe(lambda: m.new(logits, of.dtype)),
        },
        "batch_kl_pair": lambda: {
            **_kl(m, of), "other_logits": m.numbers(logits, of.dtype), "kl": m.new((2,), of.wide),
        },
        "strength_weights": lambda: {"kl": m.dense(rows, of.wide), "strength": m.new(rows, of.wide)},
        "strength_weights_backward": lambda: {
            "grad": m.dense(rows, of.wide), "kl": m.dense(rows, of.wide), "grad_kl": m.new(rows, of.wide),
        },
        "average_strength": lambda: _average(m, of),
        "head_forward": lambda: _head_forward(m, of),
        "head_backward": lambda: _head_backward(m, of),
    }  # fmt: skip


def _iprm(m: Memory, of: Sizes, reduction: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """The operators: inputs only."""
    kernels, name = _cpp(m, of, reduction), REDUCTIONS[reduction]

    def inputs(kernel: str, *outputs: str, **others: Any) -> Callable[[], dict[str, Any]]:
        return lambda: {k: v for k, v in kernels[kernel]().items() if k not in outputs} | others

    def needed(count: int) -> list[bool]:
        return [m.draw.random() < 0.7 for _ in range(count)]

    return {
        "normalize": inputs("normalize", "out", "norm"),
        "normalize_backward": inputs("normalize_backward", "grad_x"),
        "geodesic_mixup": inputs("geodesic_mixup", "z", "stats"),
        "geodesic_remix": inputs("geodesic_remix", "z"),
        "geodesic_mixup_backward": inputs("geodesic_mixup_backward", "grad_x", "grad_y", "grad_w", needed=needed(3)),
        "batch_kl": inputs("batch_kl", "value", "stats", reduction=name),
        "batch_kl_backward": inputs("batch_kl_backward", "grad_p", "grad_q", reduction=name, needed=needed(2)),
        "batch_kl_pair": inputs("batch_kl_pair", "kl"),
        "strength_weights": inputs("strength_weights", "strength"),
        "strength_weights_backward": inputs("strength_weights_backward", "grad_kl"),
        "average_strength": lambda: _average(m, of),
        "linear_probe_rebalance": lambda: _head_step(m, of),
        "linear_probe_rebalance_backward": lambda: _head_step_backward(m, of),
    }


def registered() -> list[str]:
    """The names of all operators of both namespaces, from the registration."""
    extension.load()
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name for name in names if name.startswith(("iprm::", "iprm_cpp::")))


def valid_arguments(name: str, m: Memory, of: Sizes) -> list[Any]:
    """Valid arguments of an operator, in the order of its schema."""
    namespace, _, operator = name.partition("::")
    made = (_iprm if namespace == "iprm" else _cpp)(m, of, m.draw.randrange(3))[operator]()
    return [made[argument.name] for argument in overload(name)._schema.arguments]


def overload(name: str) -> Any:
    namespace, _, operator = name.partition("::")
    return getattr(getattr(torch.ops, namespace), operator).default
