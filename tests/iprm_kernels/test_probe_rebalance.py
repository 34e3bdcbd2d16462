"""`probe_rebalance`: calls of the head, kernel calls and gradients of the step with any head."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import heads
import pytest
import torch
import torch.nn.functional as F
from places import Place
from torch import Tensor, nn

import iprm_kernels as ik
from iprm_kernels.backends import kernels


def mlp(inputs: dict[str, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(31, 16), nn.Tanh(), nn.Linear(16, 6)).to(inputs["x"].device)


def test_any_head_is_called_twice_the_first_time_without_gradient(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    x, y = (inputs[name].requires_grad_() for name in "xy")
    own = [F.linear(inputs[m], inputs[f"weight_{m}"]) for m in "xy"]
    head, seen = mlp(inputs), []

    def counted(z: Tensor) -> Tensor:
        seen.append((z.detach(), torch.is_grad_enabled()))
        return head(z)

    result = ik.probe_rebalance(x, y, *own, counted, 0.3)
    assert [enabled for _, enabled in seen] == [False, True]
    kl = torch.stack([ik.batch_kl(logits, head(ik.geodesic_mixup(x, y, 0.3))) for logits in own]).detach()
    torch.testing.assert_close(result.kl, kl)
    torch.testing.assert_close(result.strength, ik.strength_weights(kl))
    torch.testing.assert_close(seen[1][0], ik.geodesic_mixup(x, y, result.strength[0]).detach())
    assert not result.strength.requires_grad
    assert not result.kl.requires_grad


def test_any_head_measures_the_features_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second mixture reuses norms and inner products of the first, and one call computes both divergences."""
    inputs = heads.inputs(9, 31, 6, device=place.device)
    own = [F.linear(inputs[m], inputs[f"weight_{m}"]) for m in "xy"]
    namespace, calls = kernels(place.device), []
    counted = {name: _counted(name, function, calls) for name, function in vars(namespace).items()}
    monkeypatch.setattr(ik.geodesic, "kernels", lambda device: SimpleNamespace(**counted))
    monkeypatch.setattr(ik.divergence, "kernels", lambda device: SimpleNamespace(**counted))
    ik.probe_rebalance(inputs["x"], inputs["y"], *own, mlp(inputs), 0.3)
    assert calls == ["geodesic_mixup", "batch_kl_pair", "strength_weights", "geodesic_remix"]


def _counted(name: str, function: Callable[..., None], calls: list[str]) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        calls.append(name)
        function(*arguments)

    return call


def test_features_of_two_types_both_learn_under_autocast(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    x, y = inputs["x"].requires_grad_(), inputs["y"].bfloat16().requires_grad_()
    own = [F.linear(inputs[m], inputs[f"weight_{m}"]) for m in "xy"]
    with torch.autocast(place.device.type, dtype=torch.bfloat16):
        result = ik.probe_rebalance(x, y, *own, mlp(inputs), 0.3)
    result.logits.float().sum().backward()
    assert x.grad.abs().sum() > 0
    assert y.grad.abs().sum() > 0
    assert y.grad.dtype == torch.bfloat16


def test_any_head_learns_from_the_rebalanced_mixture_alone(place: Place) -> None:
    inputs = heads.inputs(9, 31, 6, device=place.device)
    own = [F.linear(inputs[m], inputs[f"weight_{m}"]).requires_grad_() for m in "xy"]
    x, y = (inputs[name].requires_grad_() for name in "xy")
    head = mlp(inputs)
    leaves = [x, y, *head.parameters()]
    result = ik.probe_rebalance(x, y, *own, head, 0.3)
    gradients = torch.autograd.grad(result.logits.square().sum(), leaves, retain_graph=True)
    mixed = head(ik.geodesic_mixup(x, y, result.strength[0]))
    torch.testing.assert_close(gradients, torch.autograd.grad(mixed.square().sum(), leaves))
    assert torch.autograd.grad(result.logits.sum(), own, allow_unused=True) == (None, None)
