"""What all backends share: the signature of every kernel, the layout of the state that a head step saves, and the constants.

A kernel takes its inputs first and then the outputs to fill, which the operator has allocated; a gradient output is None where
the gradient is not needed. Features and logits are 2-D with any strides, outputs are contiguous. The tensors that a forward
pass saves (`norm`, `stats`, `state`) have the same meaning in every backend, so that one backend can run the backward pass of
another.

The head step has M modalities and P pairs of them. Everything that exists once per head (weights, biases, logits, losses and
their gradients) lists the P mixtures first and then the M modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: The smallest norm that features are divided by: the default of `normalize` and `geodesic_mixup`, fixed in the head step.
EPS = 1e-12
#: c is clamped to at least -1 + this, where the great circle through x̂ and ŷ stops being unique.
ANTIPODE_MARGIN = {torch.float32: 1e-6, torch.float64: 1e-12}
#: Below this c the two terms of z are over twice as long as z, which their rounding may then make longer than 1.
NEAR_ANTIPODE = -0.9
#: Statistics hold c or, below NEAR_ANTIPODE, -1 / (1 + c), at most -10: values below this one. In float32, c near -1 has few
#: digits of 1 + c, which the angle depends on: two at 179.9°.
SAVED_BELOW = -2.0
#: Below this value of h = (1 - c) / 2, ∂S/∂c is summed as a series; above it the closed form has lost at most three bits.
SERIES_BELOW = 0.125
#: Terms of that series: the first one left out is below half an ulp of the sum at h = SERIES_BELOW.
SERIES_TERMS = {torch.float32: 10, torch.float64: 20}
#: Below this |d|, d + exp(-d) - 1 is summed as a series of this many terms.
EXCESS_SERIES_BELOW = 0.5
EXCESS_SERIES_TERMS = {torch.float32: 9, torch.float64: 15}

#: 16 bytes of float32, the widest load of a GPU. Triton compiles a kernel anew for each combination of unaligned addresses.
STATE_ALIGNMENT = 4

#: The reductions of `batch_kl`; the C++ kernels take the index.
REDUCTIONS = ("sum", "mean", "none")

#: The two parts of a head step's forward pass: up to the KL sums, and from the KL sums on. `parts` is one of them, or their sum
#: for both. Between the two parts the KL sums can be all-reduced.
PROBE, REBALANCE = 1, 2


class HeadInputs(NamedTuple):
    """Inputs of the head step's forward pass."""

    features: Sequence[Tensor]  #: M of (B, D)
    weights: Sequence[Tensor]  #: P + M of (C, D)
    biases: Sequence[Tensor | None]  #: P + M of (C,), or None
    pairs: Sequence[int]  #: P times two indices into `features`, in one list
    target: Tensor  #: (B,) int64; on the CPU a label out of range raises before anything is computed
    probe_weight: Tensor  #: (P,) λ of the first modality of each pair, in the arithmetic type
    label_smoothing: float
    ignore_index: int


class HeadOutputs(NamedTuple):
    """Outputs of the head step's forward pass. `kl` is also an input of the part REBALANCE."""

    state: Tensor  #: see `HeadState`
    logits: Sequence[Tensor]  #: P + M of (B, C), in the type of the features
    kl: Tensor  #: (2P,) batch KL of both modalities of each pair from the probed mixture
    strength: Tensor  #: (2P,) ω
    loss: Tensor  #: () mean loss of the mixtures and sum of the losses of the modalities
    losses: Tensor  #: (P + M,)


class HeadBackwardInputs(NamedTuple):
    """Inputs of the head step's backward pass."""

    grad_loss: Tensor | None  #: ()
    grad_losses: Tensor | None  #: (P + M,)
    grad_logits: Sequence[Tensor | None]  #: P + M of (B, C)
    features: Sequence[Tensor]  #: M of (B, D)
    weights: Sequence[Tensor]  #: P + M of (C, D)
    biases: Sequence[Tensor | None]  #: P of (C,), the biases of the mixture heads
    pairs: Sequence[int]
    target: Tensor
    state: Tensor
    unimodal: Sequence[Tensor]  #: M of (B, C), the logits of the modalities as they were returned
    strength: Tensor  #: (2P,)
    label_smoothing: float
    ignore_index: int


class HeadGradients(NamedTuple):
    """Outputs of the head step's backward pass; None for a gradient that is not needed."""

    features: Sequence[Tensor | None]  #: M of (B, D)
    weights: Sequence[Tensor | None]  #: P + M of (C, D)
    biases: Sequence[Tensor | None]  #: P + M of (C,)


class HeadState(NamedTuple):
    """What a head step saves for its backward pass, as views of one tensor; csrc/host/head_step.h has the same layout.

    Every field, and every matrix of `unimodal`, starts at a multiple of STATE_ALIGNMENT elements, for any batch. The elements
    in between, `gaps`, are zeros.
    """

    stats: Tensor  #: (P, 3, B) holding ‖x‖, ‖y‖, c (see SAVED_BELOW) of each pair
    projected: Tensor  #: (P, 2, B, C) A = X W_mᵀ and V = Y W_mᵀ
    unimodal: tuple[Tensor, ...]  #: M of (B, C), in the arithmetic type; stored only if the returned logits are narrower
    counted: Tensor  #: () number of rows that the losses average over

    @staticmethod
    def offsets(batch: int, classes: int, modalities: int, pairs: int, narrow: bool) -> tuple[int, int, int, int]:
        """Where `projected`, `unimodal` and `counted` start, and the number of elements from one of `unimodal` to the next.

        narrow: the logits are returned in a type narrower than the arithmetic type.
        """
        projected = _aligned(3 * pairs * batch)
        unimodal, step = projected + _aligned(2 * pairs * batch * classes), _aligned(batch * classes)
        return projected, unimodal, unimodal + (modalities * step if narrow else 0), step

    @staticmethod
    def size(batch: int, classes: int, modalities: int, pairs: int, narrow: bool) -> int:
        """Number of elements."""
        return HeadState.offsets(batch, classes, modalities, pairs, narrow)[2] + 1

    @staticmethod
    def gaps(state: Tensor, unimodal: Sequence[Tensor], pairs: int) -> list[Tensor]:
        """What lies between the fields, up to STATE_ALIGNMENT - 1 elements each; nothing if that divides the batch."""
        (batch, classes), narrow = unimodal[0].shape, unimodal[0].dtype != state.dtype
        if batch % STATE_ALIGNMENT == 0:
            return []
        projected, own, counted, step = HeadState.offsets(batch, classes, len(unimodal), pairs, narrow)
        ends = [3 * pairs * batch, projected + 2 * pairs * batch * classes]
        ends += [first + batch * classes for first in range(own, counted, max(1, step))]
        return [state[end : _aligned(end)] for end in ends if end % STATE_ALIGNMENT]

    @staticmethod
    def counted_of(state: Tensor) -> Tensor:
        """The field `counted`.  -> ()"""
        return state[-1]

    @staticmethod
    def views(state: Tensor, unimodal: Sequence[Tensor], pairs: int) -> HeadState:
        """All fields. unimodal: M of (B, C) returned logits"""
        modalities, (batch, classes) = len(unimodal), unimodal[0].shape
        narrow, matrix = unimodal[0].dtype != state.dtype, batch * classes
        projected, own, _, step = HeadState.offsets(batch, classes, modalities, pairs, narrow)
        firsts = [own + m * step for m in range(modalities)]
        return HeadState(
            state[: 3 * pairs * batch].view(pairs, 3, batch),
            state[projected : projected + 2 * pairs * matrix].view(pairs, 2, batch, classes),
            tuple(state[first : first + matrix].view(batch, classes) for first in firsts) if narrow else tuple(unimodal),
            HeadState.counted_of(state),
        )


def _aligned(elements: int) -> int:
    return -(-elements // STATE_ALIGNMENT) * STATE_ALIGNMENT


def pairs_of(flat: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of modalities in the flat list that operators and kernels take."""
    return list(zip(flat[::2], flat[1::2], strict=True))


class Kernels(Protocol):
    """The kernels that serve a device, by name. Tensors are (B, D) or (B, C) unless a comment says otherwise."""

    # norm (B,)
    def normalize(self, x: Tensor, eps: float, out: Tensor, norm: Tensor, /) -> None: ...
    def normalize_backward(self, grad: Tensor, x: Tensor, norm: Tensor, eps: float, grad_x: Tensor, /) -> None: ...

    # weight (B,), with stride 0 if one value serves all rows; stats (3, B) holding ‖x‖, ‖y‖, c (see SAVED_BELOW); grad_w (B,)
    def geodesic_mixup(self, x: Tensor, y: Tensor, weight: Tensor, eps: float, z: Tensor, stats: Tensor, /) -> None: ...
    def geodesic_mixup_backward(
        self, grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float,
        grad_x: Tensor | None, grad_y: Tensor | None, grad_w: Tensor | None, /,
    ) -> None: ...  # fmt: skip
    def geodesic_remix(self, x: Tensor, y: Tensor, weight: Tensor, stats: Tensor, eps: float, z: Tensor, /) -> None: ...

    # value and its gradient () or (B,); stats (5, B) holding max p, Σ exp(p - max p), the same two for q, and KL; kl (2,)
    def batch_kl(self, p_logits: Tensor, q_logits: Tensor, reduction: str, value: Tensor, stats: Tensor, /) -> None: ...
    def batch_kl_backward(
        self, grad: Tensor, p_logits: Tensor, q_logits: Tensor, stats: Tensor, reduction: str,
        grad_p: Tensor | None, grad_q: Tensor | None, /,
    ) -> None: ...  # fmt: skip
    def batch_kl_pair(self, p_logits: Tensor, other_logits: Tensor, q_logits: Tensor, kl: Tensor, /) -> None: ...

    # kl, strength and their gradients (M,)
    def strength_weights(self, kl: Tensor, strength: Tensor, /) -> None: ...
    def strength_weights_backward(self, grad: Tensor, kl: Tensor, grad_kl: Tensor, /) -> None: ...

    # strength has 2P elements; the last four are read and written, contiguous, with P, P, 2P and P elements in any shape
    def average_strength(
        self, strength: Tensor, alpha: float, released: bool,
        weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor, /,
    ) -> None: ...  # fmt: skip

    def head_forward(self, inputs: HeadInputs, parts: int, outputs: HeadOutputs, /) -> None: ...
    def head_backward(self, inputs: HeadBackwardInputs, gradients: HeadGradients, /) -> None: ...


#: The names of all kernels.
KERNELS = tuple(name for name in vars(Kernels) if not name.startswith("_"))


class Kernel(NamedTuple):
    """One backend's implementation of a kernel."""

    run: Callable[..., None]
    #: Called with the arguments of the kernel; returns why it does not support their shapes or types, empty if it does.
    refuses: Callable[..., str] | None = None
    #: The supported shapes, in a few words.
    limits: str = ""


#: The public operators, and the kernels that each of them calls.
OPERATORS = {
    "normalize": ("normalize", "normalize_backward"),
    "geodesic_mixup": ("geodesic_mixup", "geodesic_mixup_backward"),
    "batch_kl": ("batch_kl", "batch_kl_backward"),
    "strength_weights": ("strength_weights", "strength_weights_backward"),
    "average_strength": ("average_strength",),
    "probe_rebalance": (
        "geodesic_mixup", "geodesic_remix", "geodesic_mixup_backward", "batch_kl_pair", "strength_weights",
    ),
    "linear_probe_rebalance": ("head_forward", "head_backward"),
    "linear_probe_rebalance_pairs": ("head_forward", "head_backward"),
}  # fmt: skip
