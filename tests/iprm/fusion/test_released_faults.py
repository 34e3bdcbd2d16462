"""Three inputs on which the released formulas fail and those of this project do not."""

from __future__ import annotations

import torch
from released import released_slerp, released_strength

import iprm_kernels as ik

RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))


def _gradients(mix, x, y):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    z = mix(x, y, 0.3)
    z.square().sum().add(z.sum()).backward()
    return z.detach(), x.grad, y.grad


def test_identical_vectors_mix_to_themselves():
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    z, dx, _ = _gradients(released_slerp, x, x)
    assert (z == 0).all(1).any(), "released: zero vectors"
    if RELEASE < (2, 14):  # since then, torch's gradients of these formulas are finite; the zero vectors stay
        assert not dx.isfinite().all(), "released: gradients that are not finite"

    z, dx, dy = _gradients(ik.geodesic_mixup, x, x)
    torch.testing.assert_close(z, torch.nn.functional.normalize(x))
    assert dx.isfinite().all()
    assert dy.isfinite().all()


def test_a_dead_row_gets_no_gradient():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)
    x[3] = 0
    _, dx, _ = _gradients(released_slerp, x, y)
    assert not dx[3].abs().max() < 1e6, "released: 1 / eps, or not a number"

    z, dx, dy = _gradients(ik.geodesic_mixup, x, y)
    assert (dx[3] == 0).all()
    assert all(tensor.isfinite().all() for tensor in (z, dx, dy))


def test_equal_predictions_share_the_weight():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert released_strength(logits, logits, logits).isnan().all(), "released: 0/0"

    kl = torch.stack([ik.batch_kl(logits, logits), ik.batch_kl(logits, logits)])
    assert ik.strength_weights(kl).tolist() == [0.5, 0.5]
