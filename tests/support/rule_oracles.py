"""OGM, OGM-GE, MSLR and DGL from their formulas, scalar by scalar, with torch.optim.SGD written out. Everything is float64.

The model has one encoder per modality, z_m = encoders[m](parameters of m, input of m) with z_m (B, D_m), and a late-fusion
head:
- fusion="sum": h_m = W_m z_m + b_m, h = Σ_m h_m. Parameters `heads.<m>.weight` (C, D_m) and `heads.<m>.bias` (C,).
- fusion="concat": h = W [z_1 .. z_M] + b; the part of modality m is W_m z_m + b / M, with W_m its columns of W. Parameters
  `head.weight` (C, Σ D_m) and `head.bias` (C,).
A bias may be absent. The parameters of an encoder are `encoders.<m>.<name>`. The modalities stand in the order of `encoders`,
and the tensors of an encoder in the order of `parameters`.

torch.autograd gives the raw gradients of the loss, and nothing else here uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
#: OGM-GE's addition to the standard deviation.
DEVIATION_FLOOR = 1e-8

Parameters = dict[str, Tensor]
#: Maps the parameters of one encoder (without the prefix `encoders.<m>.`) and its input to features (B, D_m).
Encoder = Callable[[Parameters, Tensor], Tensor]
#: (modality, index of the tensor, its shape, step) -> standard normal draws of that shape.
Noise = Callable[[str, int, tuple[int, ...], int], Tensor]


class Batch(NamedTuple):
    """One micro-batch. A row whose label is -100 is left out of the loss and of the scores."""

    inputs: Mapping[str, Tensor]  # by modality, (B, ...)
    target: Tensor  # (B,)
    share: float | None = None  # the weight of its mean loss; None: 1 / number of micro-batches in the step


@dataclass(frozen=True)
class Plain:
    """Loss CE(h), no modulation."""


@dataclass(frozen=True)
class OGM:
    """OGM, and OGM-GE where `noise` is given. Loss CE(h).

    With the logits before the step, summed over all rows i of all micro-batches of the step:

        s_m = Σ_i softmax(part_m[i])[y_i]
        ρ_m = mean over j ≠ m of s_m / s_j       (two modalities: ρ_v = s_v / s_a, ρ_a = s_a / s_v)
        k_m = 1 - tanh(alpha ρ_m) where ρ_m > 1, else 1

    At ρ = 1 no modality is slowed. With two modalities at most one is slowed; with more, several may be.

    In the epochs window[0] .. window[1], both included, each modulated tensor of encoder m with raw gradient g (summed over the
    micro-batches, before weight decay) gets

        OGM:     g ← k_m g
        OGM-GE:  g ← k_m g + (std(g) + 1e-8) n,    n = noise(m, index, shape, step)

    The standard deviation "before scaling" is read as that of the raw g, not of k_m g; the noise is added to the scaled
    gradient and is itself not scaled by k_m. All encoders get noise, those with k_m = 1 as well. std is unbiased (N - 1); for a
    tensor of one element, where N - 1 = 0 and the method is not defined, std is 0 here (torch.std would give NaN).

    modulate="conv": the tensors of the encoder with exactly 4 dimensions; "all": all parameters of the encoder. Heads are never
    modulated. `index` counts the modulated tensors of the modality from 0, `step` the optimiser steps of the run from 0; the
    calls are made modality by modality, tensor by tensor. A tensor without gradient is skipped and keeps its index.
    """

    alpha: float
    window: tuple[int, int] = (0, 50)
    modulate: Literal["conv", "all"] = "conv"
    noise: Noise | None = None

    def ratios(self, scores: Mapping[str, float]) -> dict[str, float]:
        ratios = {}
        for m in scores:
            total = 0.0
            for j in scores:
                if j != m:
                    total += _quotient(scores[m], scores[j])
            ratios[m] = total / (len(scores) - 1)
        return ratios

    def coefficients(self, ratios: Mapping[str, float]) -> dict[str, float]:
        return {m: 1 - math.tanh(self.alpha * ratio) if ratio > 1 else 1.0 for m, ratio in ratios.items()}

    def modulated(self, name: str, tensor: Tensor, modality: str) -> bool:
        return name.startswith(f"encoders.{modality}.") and (self.modulate == "all" or tensor.dim() == 4)


@dataclass(frozen=True)
class MSLR:
    """MSLR. Loss CE(h); the learning rate of modality m is lr · factor_m.

    acc_m(e) = accuracies[e][m] is the validation accuracy after epoch e, epochs from 0. The factor in epoch e is

        "keep":        init_m
        "window":      init_m · r_m,  r_m = acc_m(e-1) / mean(acc_m(e-6) .. acc_m(e-2)); r_m = 1 for e < 6, where fewer
                       than five accuracies stand before the latest one. Not cumulative.
        "cumulative":  init_m, multiplied after each 5th epoch (5, 10, 15, ... epochs completed) by
                       acc_m / mean(the last 5 acc_m, this one included)

    The factor belongs to the encoder and the own head of m ("keep", "window"), or to the encoder only ("cumulative"). All other
    parameters, the concat head among them, keep lr.

    The factor multiplies the rate, not the gradient. The step is therefore lr · factor · buffer, and the buffer holds unscaled
    gradients and unscaled weight decay: the factor scales the weight decay too, and a new factor scales the momentum of earlier
    steps. A scaled gradient would do neither.
    """

    form: Literal["window", "cumulative", "keep"]
    init: Mapping[str, float]
    accuracies: Sequence[Mapping[str, float]] = ()

    def factor(self, m: str, epoch: int) -> float:
        factor = self.init[m]
        if self.form == "keep":
            return factor
        if len(self.accuracies) < epoch:
            raise ValueError(f"accuracies: expected those of {epoch} epochs, got {len(self.accuracies)}")
        history = [self.accuracies[e][m] for e in range(epoch)]
        if self.form == "window":
            if epoch < 6:
                return factor
            return factor * (history[epoch - 1] / (sum(history[epoch - 6 : epoch - 1]) / 5))
        for completed in range(5, epoch + 1, 5):
            factor *= history[completed - 1] / (sum(history[completed - 5 : completed]) / 5)
        return factor

    def owns(self, m: str, name: str) -> bool:
        return name.startswith(f"encoders.{m}.") or (self.form != "cumulative" and name.startswith(f"heads.{m}."))


@dataclass(frozen=True)
class DGL:
    """DGL. Loss CE(h(z.detach())) + alpha Σ_m CE(h_m(z_m)), with h_m = W_m z_m + b_m of `heads.<m>`.

    The encoders learn from the unimodal losses only, the concat head `head` from the features without their graph. The own
    heads learn from the unimodal losses, and with fusion="sum", where they are the fused head, from the fused loss too.
    """

    alpha: float = 1.0


class After(NamedTuple):
    """One optimiser step: the parameters after it, and what led there."""

    parameters: Parameters
    gradients: dict[str, Tensor | None]  # modulated, before weight decay
    scores: dict[str, float]  # s_m
    ratios: dict[str, float]  # ρ_m; empty unless the rule is OGM
    coefficients: dict[str, float]  # k_m, 1 outside the window; empty unless the rule is OGM
    rates: dict[str, float]  # learning rate by parameter


def train(
    parameters: Mapping[str, Tensor],
    encoders: Mapping[str, Encoder],
    epochs: Sequence[Sequence[Sequence[Batch]]],
    *,
    lr: float | Callable[[int], float],
    rule: Plain | OGM | MSLR | DGL = Plain(),
    fusion: Literal["sum", "concat"] = "concat",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> list[After]:
    """Trains with SGD; returns one `After` per optimiser step.

    `epochs[e][t]` is step t of epoch e: its micro-batches, whose losses (mean over the labelled rows, times `share`) add up.
    The ranks of a distributed run are micro-batches too. A micro-batch without a labelled row contributes the loss 0. `lr` may
    be a function of the epoch. The arguments are not modified.
    """
    now = {name: p.detach().to(torch.float64, copy=True) for name, p in parameters.items()}
    buffers: Parameters = {}
    history: list[After] = []
    for epoch, steps in enumerate(epochs):
        base = lr(epoch) if callable(lr) else lr
        for micro_batches in steps:
            gradients, scores = _backward(now, encoders, micro_batches, rule, fusion)
            ratios, coefficients = {}, {}
            if isinstance(rule, OGM):
                ratios, coefficients = rule.ratios(scores), dict.fromkeys(encoders, 1.0)
                if rule.window[0] <= epoch <= rule.window[1]:
                    coefficients = rule.coefficients(ratios)
                    for m in encoders:
                        names = [name for name, p in now.items() if rule.modulated(name, p, m)]
                        for index, name in enumerate(names):
                            raw = gradients[name]
                            if raw is not None:
                                gradients[name] = coefficients[m] * raw
                                if rule.noise is not None:
                                    normal = rule.noise(m, index, tuple(raw.shape), len(history)).to(torch.float64)
                                    gradients[name] += (_deviation(raw) + DEVIATION_FLOOR) * normal
            rates = dict.fromkeys(now, base)
            if isinstance(rule, MSLR):
                for m in encoders:
                    rates |= {name: base * rule.factor(m, epoch) for name in now if rule.owns(m, name)}
            now = {name: sgd(p, gradients[name], buffers, name, rates[name], momentum, weight_decay) for name, p in now.items()}
            history.append(After(now, gradients, scores, ratios, coefficients, rates))
    return history


def sgd(p: Tensor, g: Tensor | None, buffers: Parameters, name: str, lr: float, momentum: float, weight_decay: float) -> Tensor:
    """torch.optim.SGD without dampening: p - lr v, v ← momentum v + g + weight_decay p; at first v = g + weight_decay p.

    A parameter without gradient does not move, and its buffer does not change.
    """
    if g is None:
        return p
    g = g + weight_decay * p
    if momentum:
        buffers[name] = momentum * buffers[name] + g if name in buffers else g
        g = buffers[name]
    return p - lr * g


def _backward(
    parameters: Parameters, encoders: Mapping[str, Encoder], micro_batches: Sequence[Batch], rule: object, fusion: str
) -> tuple[dict[str, Tensor | None], dict[str, float]]:
    """Raw gradients of the step's loss by parameter, None where the loss does not reach; scores s_m."""
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    scores = dict.fromkeys(encoders, 0.0)
    for batch in micro_batches:
        share = 1 / len(micro_batches) if batch.share is None else batch.share
        features = {}
        for m, encoder in encoders.items():
            prefix = f"encoders.{m}."
            own = {name.removeprefix(prefix): p for name, p in leaves.items() if name.startswith(prefix)}
            features[m] = encoder(own, batch.inputs[m].to(torch.float64))
        if isinstance(rule, DGL):
            parts = _parts(leaves, {m: z.detach() for m, z in features.items()}, fusion)
            loss = cross_entropy(sum(parts.values()), batch.target)
            for own in _parts(leaves, features, "sum").values():
                loss = loss + rule.alpha * cross_entropy(own, batch.target)
        else:
            parts = _parts(leaves, features, fusion)
            loss = cross_entropy(sum(parts.values()), batch.target)
        (share * loss).backward()
        for m, part in parts.items():
            scores[m] += score(part.detach(), batch.target)
    return {name: p.grad for name, p in leaves.items()}, scores


def _parts(parameters: Parameters, features: dict[str, Tensor], fusion: str) -> dict[str, Tensor]:
    """Logits (B, C) by modality, which sum to the fused logits."""
    parts, first = {}, 0
    for m, z in features.items():
        if fusion == "sum":
            parts[m] = z @ parameters[f"heads.{m}.weight"].T
            bias = parameters.get(f"heads.{m}.bias")
        else:
            parts[m] = z @ parameters["head.weight"][:, first : first + z.shape[1]].T
            bias = parameters.get("head.bias")
            bias = None if bias is None else bias / len(features)
            first += z.shape[1]
        if bias is not None:
            parts[m] = parts[m] + bias
    return parts


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the labelled rows i of log Σ_c exp(logits[i, c]) - logits[i, y_i]; 0 where no row is labelled."""
    total, count = 0 * logits.sum(), 0
    for row, y in zip(logits, target.tolist(), strict=True):
        if y != IGNORED:
            total = total + row.logsumexp(0) - row[y]
            count += 1
    return total / max(count, 1)


def score(logits: Tensor, target: Tensor) -> float:
    """Σ over the labelled rows i of exp(logits[i, y_i]) / Σ_c exp(logits[i, c])."""
    total = 0.0
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        if y != IGNORED:
            total += math.exp(row[y] - max(row)) / sum(math.exp(logit - max(row)) for logit in row)
    return total


def _quotient(a: float, b: float) -> float:
    """a / b for scores; equal scores of 0, those of a step without a labelled row, have the ratio 1."""
    return a / b if b else (math.inf if a else 1.0)


def _deviation(tensor: Tensor) -> float:
    values = tensor.flatten().tolist()
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
