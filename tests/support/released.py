"""The released algorithm, transcribed to plain torch and autograd: the oracle of the parity tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8


class ReleasedStep(NamedTuple):
    loss: Tensor  # ()
    strength: Tensor  # (2,) ω
    probed_with: Tensor  # () λ of this step's probe


def released_slerp(x: Tensor, y: Tensor, weight: Tensor | float) -> Tensor:
    """(B, D) x2, weight of x -> (B, D)"""
    x_hat, y_hat = F.normalize(x, dim=1), F.normalize(y, dim=1)
    cosine = (x_hat * y_hat).sum(1, keepdim=True)
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle) + EPS
    return torch.sin(weight * angle) / sine * x_hat + torch.sin((1 - weight) * angle) / sine * y_hat


def released_strength(logits_x: Tensor, logits_y: Tensor, mixed: Tensor) -> Tensor:
    """ω from the mean KL of both predictions from the mixed one.  (B, C) x3 -> (2,)"""
    log_mixed = mixed.log_softmax(1)
    kl_x, kl_y = (
        F.kl_div(log_mixed, logits.log_softmax(1), reduction="batchmean", log_target=True) for logits in (logits_x, logits_y)
    )
    return torch.stack([kl_y / (kl_x + kl_y), kl_x / (kl_x + kl_y)])


class ReleasedIPRM(nn.Module):
    """Two passes through plain linear heads, λ averaged from 1/2 at every step."""

    def __init__(self, width: int, classes: int, alpha: float = 0.8) -> None:
        super().__init__()
        self.head_x, self.head_y, self.head_mix = (nn.Linear(width, classes) for _ in range(3))
        self.alpha = alpha
        self.weight: Tensor | float = 0.5

    def forward(self, x: Tensor, y: Tensor, target: Tensor) -> ReleasedStep:
        logits_x, logits_y = self.head_x(x), self.head_y(y)
        probed_with = torch.as_tensor(self.weight, dtype=x.dtype)
        with torch.no_grad():
            probe = self.head_mix(released_slerp(x, y, probed_with))
            strength = released_strength(logits_x, logits_y, probe)
        mixed = self.head_mix(released_slerp(x, y, strength[0]))
        self.weight = self.alpha * probed_with + (1 - self.alpha) * strength[0]
        loss = sum(F.cross_entropy(logits, target) for logits in (mixed, logits_x, logits_y))
        return ReleasedStep(loss, strength, probed_with)
