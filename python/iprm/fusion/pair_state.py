"""What `ProbeRebalance` keeps from step to step: λ, ω and the step count of each pair of modalities, and the draw of pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import iprm_kernels as ik
from iprm.distributed import process_group
from iprm.errors import check_choice, check_number
from iprm.names import pair_names

from .module import FusionModule
from .output import FusionOutput
from .repetition import History, Pass, in_backward


class PairState(FusionModule):
    """A fusion module with a λ per pair of modalities, which moves once per training step.

    Args:
        feature_dim, num_classes, modalities: as of `FusionModule`.
        alpha, pairs, ema_start: as of `ProbeRebalance`.
    """

    weight: Tensor
    eval_weight: Tensor
    strength: Tensor
    steps: Tensor
    _probed: Tensor

    def __init__(
        self,
        feature_dim: int | Mapping[str, int],
        num_classes: int,
        modalities: Sequence[str],
        *,
        alpha: float,
        pairs: str,
        ema_start: str,
    ) -> None:
        super().__init__(feature_dim, num_classes, modalities)
        check_number("alpha", alpha, 1)
        self.alpha = float(alpha)
        self.sampling = check_choice("pairs", pairs, ("all", "random"))
        self.ema_start = check_choice("ema_start", ema_start, ("paper", "released"))
        self.pairs = tuple(itertools.combinations(self.modalities, 2))
        self._suffixes = [""] if len(self.pairs) == 1 else [f"_{name}" for name in pair_names(self.modalities)]
        self._strength_names = [f"strength{of}_{m}" for of, pair in zip(self._suffixes, self.pairs, strict=True) for m in pair]

        shape = (len(self.pairs),) if len(self.pairs) > 1 else ()
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("weight", torch.full(shape, 0.5, dtype=dtype))
        self.register_buffer("eval_weight", torch.full(shape, 0.5, dtype=dtype))
        self.register_buffer("strength", torch.full((*shape, 2), 0.5, dtype=dtype))
        self.register_buffer("steps", torch.zeros(shape, dtype=torch.int64))
        # the λ that the last compiled pass probed with, for its recomputation
        self.register_buffer("_probed", torch.full(shape, 0.5, dtype=dtype), persistent=False)
        self._draws = 0  # host copy of the step count: drawing a pair must not synchronise with the device
        self._history = History()
        self.register_load_state_dict_post_hook(_recount)

    def _begin(
        self, features: dict[str, Tensor], target: Tensor | None, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, list[int], Pass | None]:
        """λ and the drawn pairs of a pass: its own, or those of the pass that it repeats (see `repetition`)."""
        if torch.compiler.is_compiling():
            weight = _probing_weight(self.weight, self._probed)
            self._probed.copy_(weight)
            return weight, self._draw(), None
        tensors, buffer, known = list(features.values()), self.weight, None
        if in_backward():
            known = self._history.recomputed(tensors, target)
        elif process_group() is None:
            known = self._history.repeated(tensors, buffer, parameters)
        if known is not None:
            return known.weight.clone(), known.drawn, known
        # copies: the buffer is updated before the backward pass reads λ, and the caller may modify the λ of the output
        begun = Pass(buffer.clone(), self._draw(), tensors, target)
        return begun.weight.clone() if begun.sums else begun.weight, begun.drawn, begun

    def _end(
        self,
        begun: Pass | None,
        drawn: list[int],
        strength: Tensor,
        kl: Tensor,
        features: dict[str, Tensor],
        parameters: Sequence[Tensor],
    ) -> bool:
        """Updates λ after a new pass. False if the pass was taken for a repetition, but measured another KL: it runs anew."""
        rows = len(next(iter(features.values())))
        if begun is None:
            self._advance(drawn, strength, rows)
        elif begun.kl is None:
            self._advance(drawn, strength, rows)
            self._history.measured(begun, kl, self.weight, parameters)
        elif not in_backward() and not (begun.kl.shape == kl.shape and torch.equal(begun.kl, kl)):
            self._history.refute()
            return False
        return True

    def _draw(self) -> list[int]:
        """Indices of the pairs of this step."""
        if self.sampling == "all" or len(self.pairs) == 1:
            return list(range(len(self.pairs)))
        self._draws += 1
        return [_hash(self._draws) % len(self.pairs)]

    def _advance(self, drawn: list[int], strength: Tensor, rows: int) -> None:
        """Updates λ of the drawn pairs by the measured ω (K, 2), in place: DistributedDataParallel refers to the buffers.

        An empty batch and a non-finite ω leave λ unchanged, so that one bad batch does not affect later ones.
        """
        if rows == 0 and process_group() is None:
            return
        state = (self.weight, self.eval_weight, self.strength, self.steps)
        if len(drawn) < len(self.pairs):
            weight, eval_weight, last, steps = (tensor[drawn[0]] for tensor in state)
        else:
            weight, eval_weight, last, steps = state
        strength = strength.to(last.dtype)
        ik.average_strength(strength, self.alpha, self.ema_start == "released", weight, eval_weight, last, steps)

    def _measured(self, output: FusionOutput) -> FusionOutput:
        """Adds the ω last measured to the output, as a tensor and as named measures."""
        strength = self.strength.clone()
        measures = dict(zip(self._strength_names, strength.flatten().unbind(), strict=True))
        return output._replace(strength=strength, measures=measures)

    def state_measures(self) -> dict[str, Tensor]:
        """λ of each pair: "weight" for two modalities, "weight_<a>_<b>" for more."""
        return {f"weight{of}": x for of, x in zip(self._suffixes, self.weight.flatten().unbind(), strict=True)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PairState:
        # bfloat16 is too coarse for the average: its spacing near 1/2 is 2⁻⁸, and a smaller (1-α)(ω-λ) would not change λ
        exact = {name: getattr(self, name) for name in ("weight", "eval_weight", "strength", "_probed")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, value.to(moved.device))
        return self


@torch.library.custom_op("iprm_fusion::probing_weight", mutates_args=())
def _probing_weight(weight: Tensor, probed: Tensor) -> Tensor:
    """A copy of λ; inside a backward pass, of the λ that the last pass probed with.

    An operator decides when it runs, where compiled code has no branch to decide: it runs in the forward graph, and in the
    backward graph if that recomputes the pass.
    """
    return (probed if in_backward() else weight).clone()


@_probing_weight.register_fake
def _(weight: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _hash(count: int) -> int:
    """SplitMix64's output function: 64 well-mixed bits, a function of the count alone on every platform."""
    mask = 2**64 - 1
    bits = count * 0x9E3779B97F4A7C15 & mask
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
    return bits ^ bits >> 31


def _recount(module: nn.Module, _: Any) -> None:
    """Load hook: sets the host's step count, and the buffer that checkpoints do not hold, from the restored buffers."""
    assert isinstance(module, PairState)
    module._draws = int(module.steps.sum())
    if module._probed.is_meta:  # the module was made without memory, for `load_state_dict(assign=True)`
        module._probed = module.weight.detach().clone()
