"""The reference in the calling convention of `iprm_kernels.convention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..arguments import labels
from ..convention import PROBE, REBALANCE, HeadBackwardInputs, HeadGradients, HeadInputs, HeadOutputs, HeadState, Kernel
from ..registration import AUTOCAST, below
from . import average, divergence, geodesic, head


def into(function: Callable[..., tuple[Tensor, ...]], *, outputs: int) -> Callable[..., None]:
    """A kernel that copies the results of `function`, called with its first arguments, into its last `outputs` arguments."""

    def kernel(*arguments: Any) -> None:
        with below(AUTOCAST):
            fill(arguments[-outputs:], function(*arguments[:-outputs]))

    return kernel


def fill(outputs: Sequence[Tensor | None], values: Sequence[Tensor]) -> None:
    for out, value in zip(outputs, values, strict=True):
        if out is not None:
            out.copy_(value)


normalize = into(geodesic.normalize, outputs=2)
normalize_backward = into(geodesic.normalize_backward, outputs=1)
geodesic_mixup = into(geodesic.geodesic_mixup, outputs=2)
geodesic_mixup_backward = into(geodesic.geodesic_mixup_backward, outputs=3)
geodesic_remix = into(geodesic.geodesic_remix, outputs=1)
batch_kl = into(divergence.batch_kl, outputs=2)
batch_kl_backward = into(divergence.batch_kl_backward, outputs=2)
batch_kl_pair = into(divergence.batch_kl_pair, outputs=1)
strength_weights = into(divergence.strength_weights, outputs=1)
strength_weights_backward = into(divergence.strength_weights_backward, outputs=1)


def average_strength(
    strength: Tensor, alpha: float, released: bool, weight: Tensor, eval_weight: Tensor, last: Tensor, steps: Tensor
) -> None:
    pairs = strength.numel() // 2
    state = [weight.view(pairs), eval_weight.view(pairs), last.view(pairs, 2), steps.view(pairs)]
    fill(state, average.average_strength(strength.view(pairs, 2), alpha, released, *state))


def head_forward(inputs: HeadInputs, parts: int, outputs: HeadOutputs) -> None:
    pairs, logits = len(inputs.pairs) // 2, outputs.logits
    labels(inputs.target, logits[0].shape[1], inputs.ignore_index)
    state = HeadState.views(outputs.state, logits[pairs:], pairs)
    with below(AUTOCAST):
        if parts & PROBE:
            stats, projected, unimodal, kl = head.head_probe(inputs)
            fill((state.stats, state.projected, *state.unimodal, outputs.kl), (stats, projected, *unimodal, kl))
            fill(logits[pairs:], state.unimodal)
            for gap in HeadState.gaps(outputs.state, logits[pairs:], pairs):
                gap.zero_()
        if parts & REBALANCE:
            strength, mixed, *rest = head.head_rebalance(inputs, state, outputs.kl)
            filled = (outputs.strength, *logits[:pairs], outputs.loss, outputs.losses, state.counted)
            fill(filled, (strength, *mixed, *rest))


def head_backward(inputs: HeadBackwardInputs, gradients: HeadGradients) -> None:
    state = HeadState.views(inputs.state, inputs.unimodal, len(inputs.pairs) // 2)
    with below(AUTOCAST):
        for outputs, values in zip(gradients, head.head_backward(inputs, state), strict=True):
            fill(outputs, values)


SERVES = {
    "normalize": Kernel(normalize),
    "normalize_backward": Kernel(normalize_backward),
    "geodesic_mixup": Kernel(geodesic_mixup),
    "geodesic_mixup_backward": Kernel(geodesic_mixup_backward),
    "geodesic_remix": Kernel(geodesic_remix),
    "batch_kl": Kernel(batch_kl),
    "batch_kl_backward": Kernel(batch_kl_backward),
    "batch_kl_pair": Kernel(batch_kl_pair),
    "strength_weights": Kernel(strength_weights),
    "strength_weights_backward": Kernel(strength_weights_backward),
    "average_strength": Kernel(average_strength),
    "head_forward": Kernel(head_forward),
    "head_backward": Kernel(head_backward),
}
