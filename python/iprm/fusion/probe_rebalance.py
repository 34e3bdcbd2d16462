"""The method: `ProbeRebalance`, a fusion head for features of two or more modalities."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import iprm_kernels as ik
from iprm.distributed import process_group
from iprm.encoders.named_modules import NamedModules
from iprm.errors import check_choice
from iprm.names import pair_names
from iprm_kernels import autocast
from iprm_kernels.collectives import all_reduce_sum, joint_sums

from .heads import plain_parameters
from .module import IGNORE_INDEX, cross_entropy, sum_logits
from .output import FusionOutput
from .pair_state import PairState
from .repetition import in_backward


class ProbeRebalance(PairState):
    r"""Classifies the features of several modalities, and rebalances their mixture so that no modality dominates training.

    Each training step probes a pair of modalities (x, y) with its weight λ, measures strengths ω, and mixes again with ω::

        P̄  = head_xy(mix(x, y, λ))                              # the probe, without gradient
        KL  = batch_kl(head_x(x), P̄), batch_kl(head_y(y), P̄)
        ω   = strength_weights(KL)                              # closer to the mixture: stronger
        λ  <- ω_x at the pair's first step, then α λ + (1-α) ω_x
        logits_xy = head_xy(mix(x, y, ω_x))                     # the rebalanced mixture
        loss   = cross_entropy(logits_xy) + Σ_m cross_entropy(head_m(m))
        logits = logits_xy + Σ_m head_m(m)

    ``mix`` is `iprm_kernels.geodesic_mixup`; all heads are linear. Evaluation mixes once, with the newest λ, and updates no
    state. With more than two modalities, losses and logits of the pairs' mixtures are averaged. If torch.distributed is
    initialised, KL sums and row counts are summed over all processes, in one all-reduce of 2P + 1 numbers per step. On every
    process, ω and λ are then those of the joint batch, and so are loss and gradients once they are averaged over processes.

    A pass that is run again, by activation checkpointing or by a second call on the same feature tensors, has the gradients of
    the first pass and updates no state; `iprm.fusion.repetition` says how it is recognised, and the limits.

    Any head may be replaced by a module (B, D) -> (B, C), or changed by hooks or parametrisations. It is then called, the head
    of a mixture twice per step, as `iprm_kernels.probe_rebalance` describes. Plain `nn.Linear` heads are fused.

    Example, on top of any encoders::

        >>> fusion = ProbeRebalance(512, num_classes=31, modalities=("audio", "video"))
        >>> features = {"audio": torch.randn(64, 512), "video": torch.randn(64, 512)}
        >>> out = fusion(features, torch.randint(31, (64,)))
        >>> out.loss.backward()
        >>> out.logits.shape, out.strength.shape
        (torch.Size([64, 31]), torch.Size([2]))

    Args:
        feature_dim: width D of all modalities, or a mapping modality -> width. Modalities wider than the narrowest get a
            learned linear projection to its width, ``projections.<modality>``.
        num_classes: C.
        modalities: two or more names.
        alpha: decay of the moving average of λ, in [0, 1]; 0 sets λ to the last ω.
        pairs: with M > 2 modalities, "all" pairs in each step (Tri-CLS of the paper), or one pair at "random" (Single-CLS of
            the paper, with ``shared_mix_head``). The draw depends on the step count alone, so it is equal on all processes
            and reproduced by a restored module. "random" with separate heads leaves some heads without gradient in each step,
            so DistributedDataParallel needs ``find_unused_parameters``. "random" does not support torch.compile, which would
            specialise on the count.
        shared_mix_head: one head, ``mix_heads.shared``, for the mixtures of all pairs instead of ``mix_heads.<a>_<b>``
            (see `iprm.names.pair_names`).
        mixup: "geodesic", or "linear" for λ x + (1-λ) y of the unnormalised features.
        passes: 2 for probe and rebalanced mixture, or 1 to learn from the probe itself, mixed with λ.
        ema_start: "paper" as above; "released" averages from the first step, λ_1 = α/2 + (1-α) ω, and evaluates with the λ
            that the last training step probed with, as the released code does.

    Buffers: ``weight`` (λ of the next step), ``eval_weight`` (λ of evaluation), ``strength`` (last ω), ``steps`` (training
    steps per pair), of shapes (), (), (2,), () for two modalities and (P,), (P,), (P, 2), (P,) for P pairs. λ and ω stay
    at least float32 in a module of a narrower dtype.

    Shapes: features (B, D_modality) each, target (B,) -> `FusionOutput`. Its ``weight`` is the λ that this call mixed or probed
    with; ``strength`` is the ω measured by this call, in evaluation the ω last measured. ``losses_by`` has "mix" and each
    modality; ``measures`` has each ω, "strength_<modality>" for two modalities, "strength_<a>_<b>_<modality>" for more.

    Raises:
        TypeError, ValueError: an argument out of the ranges above.
        InputError: in ``forward``, a replaced head does not give (B, C) logits; the message names it.

    Source: Yang, Wu, Jiang, "Instantaneous Probe-and-Rebalance Multimodal Learning", IJCAI 2025.
    """

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
        super().__init__(feature_dim, num_classes, modalities, alpha=alpha, pairs=pairs, ema_start=ema_start)
        self.mixup = check_choice("mixup", mixup, ("geodesic", "linear"))
        self.passes = check_choice("passes", passes, (1, 2))
        if mixup == "geodesic" and passes == 2:
            step = "linear_probe_rebalance" if len(self.modalities) == 2 else "linear_probe_rebalance_pairs"
            self.operators = (step, "average_strength", "geodesic_mixup")
        else:
            mixing = ("geodesic_mixup",) if mixup == "geodesic" else ()
            self.operators = (*mixing, "batch_kl", "strength_weights", "average_strength")
        self._names = frozenset(self.modalities)
        self.mix_head_names = tuple("shared" if shared_mix_head else name for name in pair_names(self.modalities))

        self._width = width = self._project_to_smallest()
        self._mix_places = {name: place for place, name in enumerate(dict.fromkeys(self.mix_head_names))}
        self.heads = NamedModules({name: nn.Linear(width, self.num_classes) for name in self.modalities})
        self.mix_heads = NamedModules({name: nn.Linear(width, self.num_classes) for name in self._mix_places})

    def forward(self, features: Mapping[str, Tensor], target: Tensor | None = None) -> FusionOutput:
        fused = self.training and self.passes == 2 and self.mixup == "geodesic"
        if fused and target is not None and self._operator_checks(features, target):
            draws = self._draws
            try:
                return self._fused_step({name: features[name] for name in self.modalities}, target)
            except Exception as error:
                if in_backward():  # torch ends a recomputation by an exception once it has all it needs
                    raise
                refused, self._draws = error, draws
            self._checked(features, target)  # raises an error in terms of the caller's arguments, if one is wrong
            raise refused
        features, target = self._checked(features, target)
        if not self.training:
            return self._evaluate(self._projected(features), target)
        if fused and target is not None:
            return self._fused_step(features, target)
        return self._step(features, target)

    def _operator_checks(self, features: Mapping[str, Tensor], target: Tensor) -> bool:
        """Whether the operator's own checks cover those of `_checked`, which can then be skipped.

        Both checks take 35 µs; the operator takes 430 µs forward and backward, at (64, 512, 6) on one core of a Xeon.
        """
        whole = type(features) is dict and features.keys() == self._names and not self.projections
        return whole and isinstance(target, Tensor) and target.dtype == torch.int64 and not torch.compiler.is_compiling()

    def _fused_step(self, features: dict[str, Tensor], target: Tensor) -> FusionOutput:
        """The training step with labels: one operator for heads, probe, rebalanced mixture, loss and gradients."""
        heads = [*(self.heads[name] for name in self.modalities), *(self.mix_heads[name] for name in self._mix_places)]
        linear = plain_parameters(heads, self._width, self.num_classes)
        if linear is None:
            return self._step(*self._checked(features, target))
        parameters = [tensor for head in linear for tensor in head if tensor is not None]
        if self.projections:
            parameters += self.projections.parameters()
        weight, drawn, begun = self._begin(features, target, parameters)
        own, given = linear[: len(features)], features
        mixing = [linear[len(features) + self._mix_places[self.mix_head_names[pair]]] for pair in drawn]
        features = self._projected(features)
        logits_by: dict[str, Tensor]
        if len(features) == 2:
            (x, y), (head_x, head_y), (head_mix,) = features.values(), own, mixing
            step = ik.linear_probe_rebalance(x, y, head_x, head_y, head_mix, target, weight, group=process_group())
            logits_by = dict(zip(self.modalities, (step.logits_x, step.logits_y), strict=True)) | {"mix": step.logits_mix}
            loss, strength, kl = step.loss, step.strength, step.kl
            losses_by = dict(zip(("mix", *self.modalities), step.losses.unbind(), strict=True))
        else:
            places = [(self.modalities.index(a), self.modalities.index(b)) for a, b in (self.pairs[pair] for pair in drawn)]
            probing = weight[drawn[0] : drawn[-1] + 1]  # all pairs, or the drawn one
            steps = ik.linear_probe_rebalance_pairs(
                list(features.values()), own, mixing, target, probing, pairs=places, group=process_group()
            )
            mixed = torch.stack(steps.mix_logits).mean(0) if len(drawn) > 1 else steps.mix_logits[0]
            logits_by = dict(zip(self.modalities, steps.logits, strict=True)) | {"mix": mixed}
            loss, strength, kl = steps.loss, steps.strength, steps.kl
            losses_by = dict(zip(self.modalities, steps.losses.unbind(), strict=True)) | {"mix": steps.mix_losses.mean()}
        if not self._end(begun, drawn, strength, kl, given, parameters):
            return self._fused_step(given, target)
        return self._measured(FusionOutput(loss, sum_logits(logits_by), logits_by, None, weight, losses_by))

    def _step(self, features: dict[str, Tensor], target: Tensor | None) -> FusionOutput:
        """The training step without labels, with other heads, or with options that the fused operator does not support."""
        given, parameters = features, list(self.parameters())
        weight, drawn, begun = self._begin(features, target, parameters)
        features = self._projected(features)
        unimodal = self._unimodal(features)
        share = None
        if self.mixup == "geodesic" and self.passes == 2:
            mixed, strength, kl = self._probe_and_rebalance(drawn, features, unimodal, weight)
            share = None if target is None else self._share(target)
        else:
            with torch.set_grad_enabled(self.passes == 1 and torch.is_grad_enabled()), autocast.uncached(weight):
                probes = [self._mixed(pair, features, weight.reshape(-1)[pair]) for pair in drawn]
            with torch.no_grad():
                kl, share = self._joint(self._divergences(drawn, unimodal, probes), target)
                strength = torch.stack([ik.strength_weights(own) for own in kl.view(-1, 2)])
            rebalanced = (self._mixed(pair, features, own[0]) for pair, own in zip(drawn, strength, strict=True))
            mixed = probes if self.passes == 1 else list(rebalanced)
        if not self._end(begun, drawn, strength, kl, given, parameters):
            return self._step(given, target)
        return self._output(unimodal, mixed, target, weight, share)

    def _unimodal(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The logits of each modality by its own head.  (B, D) each -> (B, C) each"""
        return {name: self._logits(f"heads[{name!r}]", self.heads[name], x) for name, x in features.items()}

    def _mix_head(self, pair: int) -> Callable[[Tensor], Tensor]:
        name = self.mix_head_names[pair]
        return functools.partial(self._logits, f"mix_heads[{name!r}]", self.mix_heads[name])

    def _probe_and_rebalance(
        self, drawn: list[int], features: dict[str, Tensor], unimodal: dict[str, Tensor], weight: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The rebalanced mixture logits (B, C) of each of K drawn pairs, and the measured ω and KL (K, 2)."""
        steps = []
        for pair in drawn:
            a, b = self.pairs[pair]
            head, probing = self._mix_head(pair), weight.reshape(-1)[pair]
            steps.append(
                ik.probe_rebalance(features[a], features[b], unimodal[a], unimodal[b], head, probing, group=process_group())
            )
        strength, kl = (torch.stack(values) for values in zip(*((step.strength, step.kl) for step in steps), strict=True))
        return [step.logits for step in steps], strength, kl

    def _divergences(self, drawn: list[int], unimodal: dict[str, Tensor], probes: list[Tensor]) -> Tensor:
        """Batch KL of both modalities of each drawn pair from its probe.  -> (2K,)"""
        named = zip((self.pairs[pair] for pair in drawn), probes, strict=True)
        return torch.stack([ik.batch_kl(unimodal[name], probe) for pair, probe in named for name in pair])

    def _joint(self, kl: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """KL sums over all processes, and with a target this process's share in the joint mean loss."""
        group = process_group()
        if group is None or target is None:
            return all_reduce_sum(kl, group), None
        return joint_sums(kl, target, IGNORE_INDEX, group)

    def _evaluate(self, features: dict[str, Tensor], target: Tensor | None) -> FusionOutput:
        weight = self.eval_weight.clone()
        return self._output(self._unimodal(features), self._mixtures(features, weight), target, weight)

    def mixtures(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The mixture logits of each pair with the newest λ, as in evaluation, in the order of ``pairs``.

        Their mean is ``logits_by["mix"]`` of an evaluation.  (B, D_modality) each -> (B, C) each
        """
        features, _ = self._checked(features, None)
        return self._mixtures(self._projected(features), self.eval_weight)

    def _mixtures(self, features: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
        return [self._mixed(pair, features, weight.reshape(-1)[pair]) for pair in range(len(self.pairs))]

    def _mixed(self, pair: int, features: dict[str, Tensor], weight: Tensor) -> Tensor:
        """The mixture logits of a pair, given the weight of its first modality.  weight () -> (B, C)"""
        x, y = (features[name] for name in self.pairs[pair])
        z = ik.geodesic_mixup(x, y, weight) if self.mixup == "geodesic" else weight * x + (1 - weight) * y
        return self._mix_head(pair)(z)

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

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, alpha={self.alpha}, pairs={self.sampling!r}, mixup={self.mixup!r}, "
            f"passes={self.passes}, ema_start={self.ema_start!r}"
        )
