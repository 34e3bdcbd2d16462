"""The formulas of the operators in plain torch, and the step as released: what is timed with torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Head = tuple[Tensor, Tensor]


def geodesic_mixup(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """The formula of geodesic mixup, written directly.  (B, D) x2 -> (B, D)"""
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    theta = torch.acos((x * y).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6))
    return (torch.sin(weight * theta) * x + torch.sin((1 - weight) * theta) * y) / torch.sin(theta)


def batch_kl(p: Tensor, q: Tensor) -> Tensor:
    """(B, C) x2 -> ()"""
    log_p, log_q = F.log_softmax(p, 1), F.log_softmax(q, 1)
    return (log_p.exp() * (log_p - log_q)).sum()


def released(x: Tensor, y: Tensor, head_x: Head, head_y: Head, head_mix: Head, target: Tensor, weight: Tensor) -> Tensor:
    """The two-pass step of the released code, without its two copies to the host, so that torch.compile takes it."""
    logits_x, logits_y = F.linear(x, *head_x), F.linear(y, *head_y)
    with torch.no_grad():
        probe = F.linear(_slerp(x, y, weight), *head_mix).log_softmax(1)
        kl_x, kl_y = (
            F.kl_div(probe, logits.log_softmax(1), reduction="batchmean", log_target=True) for logits in (logits_x, logits_y)
        )
        strength = kl_y / (kl_x + kl_y)
    mixed = F.linear(_slerp(x, y, strength), *head_mix)
    return F.cross_entropy(mixed, target) + F.cross_entropy(logits_x, target) + F.cross_entropy(logits_y, target)


def _slerp(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    angle = torch.arccos((x * y).sum(1, keepdim=True).clamp(-1, 1))
    sine = torch.sin(angle) + 1e-8
    return torch.sin(weight * angle) / sine * x + torch.sin((1 - weight) * angle) / sine * y
