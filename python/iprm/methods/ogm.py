"""OGM and OGM-GE: gradients of the dominant modality's encoder are scaled down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from iprm.distributed import process_group
from iprm.errors import check_choice, check_number, plain_number
from iprm.fusion.module import IGNORE_INDEX
from iprm_kernels.collectives import all_reduce_sum

from .gradients import Gradients, scale
from .rule import GRADIENTS, Rule, Step, Update

#: Added to the standard deviation of the noise, as the released code does.
NOISE_FLOOR = 1e-8


class OGM(Rule):
    r"""On-the-fly gradient modulation, based on the probability that each modality assigns to the label::

        s_m = Σ_i softmax(logits_m[i])[y_i]                  # the parts of the fused logits, before the update
        ρ_m = mean over j ≠ m of s_m / s_j
        k_m = 1 - tanh(alpha ρ_m) if ρ_m > 1 else 1
        gradient of encoder m  <-  k_m · gradient  (+ N(0, std(gradient) + 1e-8) per tensor, with `noise`: OGM-GE)

    The noise has the standard deviation of the gradient before scaling, and is added in the encoders of all modalities, except
    to tensors of a single number. Sums run over the rows of all processes and of all batches of an accumulation window, without
    rows labelled -100. Only the epochs of `window` are modulated. ``alpha=0`` without noise is bit-identical to plain training.
    An optimiser that normalises gradients, such as Adam, cancels k_m.

    Args:
        alpha: strength of the modulation, from 0 up; the authors' README: 0.1 in general, 0.8 for CREMA-D.
        noise: add the noise above (generalisation enhancement): OGM-GE.
        modulate: "conv" for the weights of 2-D convolutions (4-dimensional tensors) only, as in the released code; "all" for
            every parameter of the encoder; "auto" for "conv" in encoders that have such weights, "all" in others.
        window: first and last modulated epoch.
        form: "paper", or "released": at exactly equal scores of two modalities the released code slows the first one.

    Buffers: ``seed`` of the noise, drawn at construction and equal on all processes with the same torch seed, and ``count`` of
    modulated updates. The noise of an update depends only on these two.

    Measures: ``k_<modality>``.

    Source: Peng, Wei, Deng, Wang, Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation", CVPR 2022, and the
    authors' code; the mean of pairwise ratios for more than two modalities follows the authors' answer in its issues.
    """

    needs = frozenset({GRADIENTS})
    seed: Tensor
    count: Tensor

    def __init__(
        self,
        modalities: Sequence[str],
        *,
        alpha: float = 0.1,
        noise: bool = False,
        modulate: str = "auto",
        window: Sequence[int] = (0, 50),
        form: str = "paper",
    ) -> None:
        super().__init__(modalities)
        alpha = float(check_number("alpha", alpha))
        check_choice("modulate", modulate, ("auto", "conv", "all"))
        check_choice("form", form, ("paper", "released"))
        given = [plain_number(epoch) for epoch in window] if isinstance(window, (Sequence, np.ndarray)) else []
        epochs = [epoch for epoch in given if isinstance(epoch, int)]
        if len(given) != 2 or len(epochs) != 2:
            raise ValueError(f"window: expected the first and the last epoch, got {window!r}")
        if form == "released" and len(self.modalities) != 2:
            raise ValueError(f"form: 'released' is for two modalities, got {len(self.modalities)}")
        self.alpha, self.noise, self.scope, self.form = alpha, bool(noise), modulate, form
        self.first, self.last = epochs
        self._host = (torch.initial_seed() % 2**63, 0)  # seed and count: reading the buffers would synchronise with a GPU
        self.register_buffer("seed", torch.tensor(self._host[0], dtype=torch.int64))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))
        self._scores: Tensor | None = None  # (M,) sums of this process over the accumulation window
        self._factors: Tensor | None = None  # (M,)
        self.register_load_state_dict_post_hook(_read_back)

    def updates(self, step: Step) -> Iterator[Update]:
        output = step.forward()
        if self._modulates(step):
            scores = label_probability([output.logits_by[m] for m in self.modalities], step.target)
            self._scores = scores if self._scores is None else self._scores + scores
            self._factors = self.factors(all_reduce_sum(self._scores.clone(), process_group()))
            measures = dict(zip((f"k_{m}" for m in self.modalities), self._factors.unbind(), strict=True))
            output = output._replace(measures=output.measures | measures)
        yield Update(output)

    def factors(self, scores: Tensor) -> Tensor:
        """k of scores s.  (M,) -> (M,)"""
        ratio = (scores[:, None] / scores).fill_diagonal_(0).sum(1) / (len(scores) - 1)
        slowed = ratio > 1
        if self.form == "released":
            slowed = torch.stack([~slowed[1], slowed[1]])
        return torch.where(slowed, 1 - torch.tanh(self.alpha * ratio), torch.ones_like(ratio))

    @torch.no_grad()
    def modulate(self, gradients: Gradients, step: Step) -> None:
        if not self._modulates(step) or self._factors is None:
            return
        factors, self._scores, self._factors = self._factors, None, None
        for place, (modality, factor) in enumerate(zip(self.modalities, factors.unbind(), strict=True)):
            chosen = self._chosen(gradients.encoder(modality))
            if not self.noise:
                scale(chosen, factor)
                continue
            noisy = [gradient for gradient in chosen if gradient.numel() > 1]  # a single number has no standard deviation
            spreads = [gradient.std() for gradient in noisy]
            scale(chosen, factor)
            for gradient, spread, drawn in zip(noisy, spreads, self.draws(place, noisy), strict=True):
                gradient.add_(drawn * (spread + NOISE_FLOOR))
        self.count += 1
        self._host = (self._host[0], self._host[1] + 1)

    def draws(self, place: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Standard normal numbers in the shapes of the gradients of the modality at `place`, for the next modulated update."""
        if not gradients:
            return []
        mixed = np.random.SeedSequence([*self._host, place]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(gradients[0].device).manual_seed(int(mixed) >> 1)
        return [torch.randn(g.shape, generator=generator, device=g.device, dtype=g.dtype) for g in gradients]

    def _modulates(self, step: Step) -> bool:
        return self.first <= step.epoch <= self.last

    def _chosen(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        convolutions = [gradient for gradient in gradients.values() if gradient.dim() == 4]
        every = self.scope == "all" or (self.scope == "auto" and not convolutions)
        return list(gradients.values()) if every else convolutions


@torch.no_grad()
def label_probability(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Σ_i softmax(logits_m[i])[y_i], over rows that have a label.  M x (B, C), (B,) -> (M,), at least float32"""
    labelled = target != IGNORE_INDEX
    label = target.masked_fill(~labelled, 0)[:, None]
    stacked = torch.stack(list(logits))
    probability = stacked.to(torch.promote_types(stacked.dtype, torch.float32)).softmax(2)
    chosen = probability.gather(2, label.expand(len(logits), -1, 1))[..., 0]
    return chosen.masked_fill(~labelled, 0).sum(1)


def _read_back(module: nn.Module, _: object) -> None:
    """Load hook: copies the restored seed and count to the host."""
    assert isinstance(module, OGM)
    module._host = (int(module.seed), int(module.count))
