"""The method: `ProbeRebalance`, a fusion head for features of two or more modalities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import iprm_kernels as ik
from iprm.distributed import process_group
from iprm_kernels import autocast
from iprm_kernels.collectives import all_reduce_sum, joint_sums

from .module import IGNORE_INDEX, FusionModule, cross_entropy, sum_logits
from .output import FusionOutput


class ProbeRebalance(FusionModule):
    r"""Classifies from the features of several modalities, none of which may starve the others.

    Each training step probes a pair of modalities (x, y) with its weight λ, and learns from the weights ω it measures::

        P̄  = head_xy(mix(x, y, λ))                              # the probe, without gradient
        KL  = batch_kl(head_x(x), P̄), batch_kl(head_y(y), P̄)
        ω   = strength_weights(KL)                              # closer to the mixture: stronger
        λ  <- ω_x at the pair's first step, then α λ + (1-α) ω_x
        logits_xy = head_xy(mix(x, y, ω_x))                     # the rebalanced mixture
        loss   = cross_entropy(logits_xy) + Σ_m cross_entropy(head_m(m))
        logits = logits_xy + Σ_m head_m(m)

    ``mix`` is `iprm_kernels.geodesic_mixup`; all heads are linear. Evaluation mixes once, with the newest λ, and changes
    nothing. With more than two modalities losses and logits of the pairs' mixtures are averaged. Under an initialised
    torch.distributed the KL sums and counts of rows are added over all processes, in one call of 2P + 1 numbers a step: ω and λ
    are those of the joint batch, on every process, and so are loss and gradients once they are averaged over processes.

    Use, on top of any encoders::

        >>> fusion = ProbeRebalance(512, num_classes=31, modalities=("audio", "video"))
        >>> features = {"audio": torch.randn(64, 512), "video": torch.randn(64, 512)}
        >>> out = fusion(features, torch.randint(31, (64,)))
        >>> out.loss.backward()
        >>> out.logits.shape, out.strength.shape
        (torch.Size([64, 31]), torch.Size([2]))

    Args:
        feature_dim: width D of all modalities, or a mapping modality -> width; those wider than the narrowest get a
            learned linear projection to it, ``projections.<modality>``.
        num_classes: C.
        modalities: two or more names.
        alpha: share of the old λ in the new, in [0, 1]; 0 takes each step's ω as it is.
        pairs: with M > 2 modalities, "all" pairs a step (Tri-CLS of the paper), or one of them at "random" (with
            ``shared_mix_head``, its Single-CLS). The draw depends on the count of steps alone: equal on all processes, and
            continued by a restored module. "random" with separate heads leaves heads without gradient in a step
            (``find_unused_parameters`` of DistributedDataParallel); "random" is not for torch.compile, which would
            specialise on the count.
        shared_mix_head: one head, ``mix_heads.shared``, for the mixtures of all pairs instead of ``mix_heads.<a>_<b>``.
        mixup: "geodesic", or "linear" for λ x + (1-λ) y on the features as they are.
        passes: 2, or 1 to learn from the probe itself, mixed with λ.
        ema_start: "paper" as above; "released" averages from the first step on, λ_1 = α/2 + (1-α) ω, and evaluates with the
            λ that the last training step probed with, as the released code does.

    Buffers: ``weight`` (λ of the next step), ``eval_weight`` (λ of evaluation), ``strength`` (last ω), ``steps`` (training
    steps by pair), of shapes (), (), (2,), () for two modalities and (P,), (P,), (P, 2), (P,) for P pairs. They stay at
    least float32 in a module of a narrower type.

    Shapes: features (B, D_modality) each, target (B,) -> `FusionOutput`, whose ``weight`` is the λ this call mixed or probed
    with and whose ``strength`` is the ω measured, in evaluation the one last measured; ``losses_by`` has "mix" and each
    modality, ``measures`` each ω: "strength_<modality>" for two modalities, "strength_<a>_<b>_<modality>" for a pair of more.

    Raises:
        TypeError, ValueError: arguments out of the ranges above.

    Source: Yang, Wu, Jiang, "Instantaneous Probe-and-Rebalance Multimodal Learning", IJCAI 2025.
    """

    weight: Tensor
    eval_weight: Tensor
    strength: Tensor
    steps: Tensor

    def __init__(
        self,
        feature_dim: int | Mapping[str, int],
        num_classes: int,
        modalities: Sequence[str] = ("x", "y"),
        *,
        alpha: float = 0.8,
        pairs: str = "all",
        shared_mix_head: bool = False,
        mixup: str = "geodesic",
        passes: int = 2,
        ema_start: str = "paper",
    ) -> None:
        super().__init__(feature_dim, num_classes, modalities)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha: expected a number in [0, 1], got {alpha!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
        self.alpha = float(alpha)
        self.sampling = _choice("pairs", pairs, ("all", "random"))
        self.mixup = _choice("mixup", mixup, ("geodesic", "linear"))
        self.passes = _choice("passes", passes, (1, 2))
        self.ema_start = _choice("ema_start", ema_start, ("paper", "released"))
        self._names = frozenset(self.modalities)
        self.pairs = tuple(itertools.combinations(self.modalities, 2))
        self.mix_head_names = tuple("shared" if shared_mix_head else f"{a}_{b}" for a, b in self.pairs)
        prefixes = ["strength"] if len(self.pairs) == 1 else [f"strength_{a}_{b}" for a, b in self.pairs]
        self._strength_names = [f"{prefix}_{m}" for prefix, pair in zip(prefixes, self.pairs, strict=True) for m in pair]
        if not shared_mix_head and len(set(self.mix_head_names)) < len(self.pairs):
            raise ValueError(f"modalities: names whose pairs are distinct when joined by '_', got {self.modalities}")

        width = self._project_to_smallest()
        self.heads = nn.ModuleDict({name: nn.Linear(width, self.num_classes) for name in self.modalities})
        self.mix_heads = nn.ModuleDict(
            {name: nn.Linear(width, self.num_classes) for name in dict.fromkeys(self.mix_head_names)}
        )

        shape = (len(self.pairs),) if len(self.pairs) > 1 else ()
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("weight", torch.full(shape, 0.5, dtype=dtype))
        self.register_buffer("eval_weight", torch.full(shape, 0.5, dtype=dtype))
        self.register_buffer("strength", torch.full((*shape, 2), 0.5, dtype=dtype))
        self.register_buffer("steps", torch.zeros(shape, dtype=torch.int64))
        self._draws = 0  # training steps on the host, so that drawing a pair reads nothing back from the device
        self.register_load_state_dict_post_hook(_recount)

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        fused = self.training and self.passes == 2 and self.mixup == "geodesic"
        if fused and target is not None and self._operator_checks(features, target):
            draws = self._draws
            try:
                return self._fused_step({name: features[name] for name in self.modalities}, target)
            except Exception as error:
                refused, self._draws = error, draws
            self._checked(features, target)  # names a wrong argument as the caller knows it
            raise refused
        features, target = self._checked(features, target)
        features = self._projected(features)
        if not self.training:
            return self._evaluate(features, target)
        if fused and target is not None:
            return self._fused_step(features, target)
        return self._step(features, target)

    def _operator_checks(self, features: Mapping[str, Tensor], target: Tensor) -> bool:
        """Whether all that `_checked` refuses is refused by the operator of `_fused_step` too, which then checks alone.

        Both checks take 35 µs where the operator takes 430 forward and backward, at (64, 512, 6) on one core of a Xeon.
        """
        whole = type(features) is dict and features.keys() == self._names and not self.projections
        return whole and isinstance(target, Tensor) and target.dtype == torch.int64 and not torch.compiler.is_compiling()

    def _fused_step(self, features: dict[str, Tensor], target: Tensor) -> FusionOutput:
        """The training step with labels: one operator, which multiplies, probes, rebalances and differentiates."""
        weight = self.weight.clone()  # the buffer moves on before the backward pass reads this one
        drawn = self._draw()
        own = [_parameters(self.heads[name]) for name in features]
        mixing = [_parameters(self.mix_heads[self.mix_head_names[pair]]) for pair in drawn]
        logits_by: dict[str, Tensor]
        if len(features) == 2:
            (x, y), (head_x, head_y), (head_mix,) = features.values(), own, mixing
            step = ik.linear_probe_rebalance(x, y, head_x, head_y, head_mix, target, weight, group=process_group())
            logits_by = dict(zip(self.modalities, (step.logits_x, step.logits_y), strict=True)) | {"mix": step.logits_mix}
            loss, strength = step.loss, step.strength
            losses_by = dict(zip(("mix", *self.modalities), step.losses.unbind(), strict=True))
        else:
            places = [(self.modalities.index(a), self.modalities.index(b)) for a, b in (self.pairs[pair] for pair in drawn)]
            probing = weight[drawn[0] : drawn[-1] + 1]  # all pairs, or the one that was drawn
            steps = ik.linear_probe_rebalance_pairs(
                list(features.values()), own, mixing, target, probing, pairs=places, group=process_group()
            )
            mixed = torch.stack(steps.mix_logits).mean(0) if len(drawn) > 1 else steps.mix_logits[0]
            logits_by = dict(zip(self.modalities, steps.logits, strict=True)) | {"mix": mixed}
            loss, strength = steps.loss, steps.strength
            losses_by = dict(zip(self.modalities, steps.losses.unbind(), strict=True)) | {"mix": steps.mix_losses.mean()}
        self._advance(drawn, strength, len(target))
        return self._measured(FusionOutput(loss, sum_logits(logits_by), logits_by, None, weight, losses_by))

    def _step(self, features: dict[str, Tensor], target: Tensor | None) -> FusionOutput:
        """The training step without labels, or one that is not the paper's."""
        weight = self.weight.clone()
        unimodal = {name: self.heads[name](x) for name, x in features.items()}
        drawn = self._draw()
        share = None
        if self.mixup == "geodesic" and self.passes == 2:
            mixed, strength = self._probe_and_rebalance(drawn, features, unimodal, weight)
        else:
            with torch.set_grad_enabled(self.passes == 1 and torch.is_grad_enabled()), autocast.uncached(weight):
                probes = [self._mixed(pair, features, weight.reshape(-1)[pair]) for pair in drawn]
            with torch.no_grad():
                kl, share = self._joint(self._divergences(drawn, unimodal, probes), target)
                strength = torch.stack([ik.strength_weights(own) for own in kl.view(-1, 2)])
            rebalanced = (self._mixed(pair, features, own[0]) for pair, own in zip(drawn, strength, strict=True))
            mixed = probes if self.passes == 1 else list(rebalanced)
        self._advance(drawn, strength, len(next(iter(features.values()))))
        return self._output(unimodal, mixed, target, weight, share)

    def _probe_and_rebalance(
        self, drawn: list[int], features: dict[str, Tensor], unimodal: dict[str, Tensor], weight: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Of each of K drawn pairs the mixed logits (B, C) to learn from; and the measured ω (K, 2)."""
        mixed, strengths = [], []
        for pair in drawn:
            a, b = self.pairs[pair]
            head, probing = self.mix_heads[self.mix_head_names[pair]], weight.reshape(-1)[pair]
            step = ik.probe_rebalance(features[a], features[b], unimodal[a], unimodal[b], head, probing, group=process_group())
            mixed.append(step.logits)
            strengths.append(step.strength)
        return mixed, torch.stack(strengths)

    def _divergences(self, drawn: list[int], unimodal: dict[str, Tensor], probes: list[Tensor]) -> Tensor:
        """Batch KL of both modalities of each drawn pair from its probe.  -> (2P,)"""
        named = zip((self.pairs[pair] for pair in drawn), probes, strict=True)
        return torch.stack([ik.batch_kl(unimodal[name], probe) for pair, probe in named for name in pair])

    def _joint(self, kl: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The KL sums of all processes, and the share of this one in the mean of their losses, if there are any."""
        group = process_group()
        if group is None or target is None:
            return all_reduce_sum(kl, group), None
        return joint_sums(kl, target, IGNORE_INDEX, group)

    def _advance(self, drawn: list[int], strength: Tensor, rows: int) -> None:
        """Takes the measured ω (K, 2) of the drawn pairs into λ: in place, for DistributedDataParallel holds on to the buffers.

        An empty batch measures nothing, and an ω that is not finite is left out, so that one bad batch spoils no later one.
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

    def _evaluate(self, features: dict[str, Tensor], target: Tensor | None) -> FusionOutput:
        weight = self.eval_weight.clone()
        unimodal = {name: self.heads[name](x) for name, x in features.items()}
        return self._output(unimodal, self._mixtures(features, weight), target, weight)

    def mixtures(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Each pair's mixed logits as evaluation makes them, with the newest λ, in the order of ``pairs``.

        ``logits_by["mix"]`` of an evaluation is their mean.  (B, D_modality) each -> (B, C) each
        """
        features, _ = self._checked(features, None)
        return self._mixtures(self._projected(features), self.eval_weight)

    def _mixtures(self, features: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
        return [self._mixed(pair, features, weight.reshape(-1)[pair]) for pair in range(len(self.pairs))]

    def _mixed(self, pair: int, features: dict[str, Tensor], weight: Tensor) -> Tensor:
        """The pair's mixture with the given weight of its first modality, through its head.  () -> (B, C)"""
        x, y = (features[name] for name in self.pairs[pair])
        z = ik.geodesic_mixup(x, y, weight) if self.mixup == "geodesic" else weight * x + (1 - weight) * y
        return self.mix_heads[self.mix_head_names[pair]](z)

    def _output(
        self,
        unimodal: dict[str, Tensor],
        mixed: list[Tensor],
        target: Tensor | None,
        weight: Tensor,
        share: Tensor | None = None,
    ) -> FusionOutput:
        logits_by = {**unimodal, "mix": torch.stack(mixed).mean(0) if len(mixed) > 1 else mixed[0]}
        if target is None:
            return self._measured(FusionOutput(None, sum_logits(logits_by), logits_by, None, weight))
        losses_by = {name: cross_entropy(logits, target, share) for name, logits in unimodal.items()}
        losses_by["mix"] = torch.stack([cross_entropy(logits, target, share) for logits in mixed]).mean()
        loss = losses_by["mix"] + torch.stack([losses_by[name] for name in unimodal]).sum()
        return self._measured(FusionOutput(loss, sum_logits(logits_by), logits_by, None, weight, losses_by))

    def _measured(self, output: FusionOutput) -> FusionOutput:
        """With the ω last measured, in one piece and by name."""
        strength = self.strength.clone()
        measures = dict(zip(self._strength_names, strength.flatten().unbind(), strict=True))
        return output._replace(strength=strength, measures=measures)

    def state_measures(self) -> dict[str, Tensor]:
        """λ of each pair: "weight" for two modalities, "weight_<a>_<b>" for more."""
        names = ["weight"] if len(self.pairs) == 1 else [f"weight_{a}_{b}" for a, b in self.pairs]
        return dict(zip(names, self.weight.flatten().unbind(), strict=True))

    def _draw(self) -> list[int]:
        """The pairs of this step."""
        if self.sampling == "all" or len(self.pairs) == 1:
            return list(range(len(self.pairs)))
        self._draws += 1
        return [_hash(self._draws) % len(self.pairs)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProbeRebalance:
        # bfloat16 could not hold the average: its step near 1/2 is 2⁻⁸, and a smaller (1-α)(ω-λ) would leave λ where it is
        exact = {name: getattr(self, name) for name in ("weight", "eval_weight", "strength")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, value.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, alpha={self.alpha}, pairs={self.sampling!r}, mixup={self.mixup!r}, "
            f"passes={self.passes}, ema_start={self.ema_start!r}"
        )


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _parameters(head: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(head, nn.Linear)
    return head.weight, head.bias


def _hash(count: int) -> int:
    """SplitMix64's output function: the same 64 well-mixed bits for the same count, everywhere."""
    mask = 2**64 - 1
    bits = count * 0x9E3779B97F4A7C15 & mask
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
    return bits ^ bits >> 31


def _recount(module: nn.Module, _: Any) -> None:
    """After a state was loaded, continues the draws from its count of steps."""
    assert isinstance(module, ProbeRebalance)
    module._draws = int(module.steps.sum())
