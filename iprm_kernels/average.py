"""λ, the moving average of measured strengths: `average_strength`, updated in one launch per step.

As separate torch operations the update takes twelve per pair: 83 µs per step on a CPU, and on a GPU more launches than the head
step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import kernels
from .registration import register


def _average_strength_kernel(
    strength: Tensor, alpha: float, released: bool, weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor
) -> None:
    if torch._C._current_graph_task_id() != -1:
        return  # inside a backward pass, where a compiled module is being recomputed
    state = (weight, eval_weight, last, steps)
    kernels(weight.device).average_strength(strength, alpha, released, *state)
    # the version counters are bumped so that autograd refuses a backward pass that needs the overwritten values
    torch.autograd.graph.increment_version([tensor for tensor in state if not tensor.is_inference()])


def _average_strength_fake(
    strength: Tensor, alpha: float, released: bool, weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor
) -> None:
    """The operator returns nothing."""


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

        λ  <- ω_x if steps = 0 else α λ + (1-α) ω_x           released: always the average
        λ_eval <- the new λ                                   released: the old λ
        last   <- ω,    steps <- steps + 1

    Inside a backward pass nothing changes: what runs there is a recomputation, by activation checkpointing for example, of a
    pass that has updated λ before.

    If ω_x is not finite, λ and the step count stay unchanged. If an element of ω is not finite, its entry in `last` stays
    unchanged.

    Args:
        strength: ω, 2P elements; for each pair the first modality, then the second.
        alpha: α in [0, 1].
        released: average from the first step on, as the released code does.
        weight: λ, P elements.
        eval_weight: λ used in evaluation, P elements.
        last: the last finite ω, 2P elements.
        steps: number of updates, P elements, int64.

    All tensors are contiguous and on one device, with any shape of the stated number of elements. All but `steps` have one
    dtype, float32 or float64. Arguments are not checked: the function is meant for modules, which own these tensors.

    Source: Yang, Wu, Jiang, "Instantaneous Probe-and-Rebalance Multimodal Learning", IJCAI 2025.
    """
    _average_strength(strength.detach(), alpha, released, weight, eval_weight, last, steps)
