"""λ, the moving average of measured strengths: `average_strength`, all of a step's bookkeeping in one launch.

In single operations it takes twelve per pair: 83 µs of a step on a CPU, and on a GPU more launches than the head step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import kernels
from .registration import register


def _average_strength_kernel(
    strength: Tensor, alpha: float, released: bool, weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor
) -> None:
    state = (weight, eval_weight, last, steps)
    kernels(weight.device).average_strength(strength, alpha, released, *state)
    # autograd is told of what was written, so that it refuses a backward pass that needs what was there
    torch.autograd.graph.increment_version([tensor for tensor in state if not tensor.is_inference()])


def _average_strength_fake(
    strength: Tensor, alpha: float, released: bool, weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor
) -> None:
    """Nothing is returned."""


_average_strength = register(
    "average_strength(Tensor strength, float alpha, bool released, "
    "Tensor(a!) weight, Tensor(b!) eval_weight, Tensor(c!) last, Tensor(d!) steps) -> ()",
    _average_strength_kernel,
    _average_strength_fake,
)


def average_strength(
    strength: Tensor, alpha: float, released: bool, weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor
) -> None:
    r"""Updates the λ of P pairs by their measured ω, in place, without a synchronisation::

        λ  <- ω_x if steps = 0 else α λ + (1-α) ω_x           released: the latter always
        λ_eval <- the new λ                                   released: the old
        last   <- ω,    steps <- steps + 1

    An ω_x that is not finite leaves λ and the count of steps as they are; a part of ω that is not leaves its last value.

    Args:
        strength: ω, of 2P numbers, the first modality's of each pair before the second's.
        alpha: α in [0, 1].
        released: follow the released code, which averages from the first step on.
        weight: λ, of P numbers.
        eval_weight: λ of evaluation, of P numbers.
        last: the last ω that was finite, of 2P numbers.
        steps: of P numbers, int64.

    All are contiguous, on one device, of any shapes with so many elements, and all but `steps` float32 or all float64. Nothing
    is checked: this is for modules, which own these tensors.

    Source: Yang, Wu, Jiang, "Instantaneous Probe-and-Rebalance Multimodal Learning", IJCAI 2025.
    """
    _average_strength(strength.detach(), alpha, released, weight, eval_weight, last, steps)
