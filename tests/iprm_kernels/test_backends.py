"""Choosing a backend, and that what the tests rest on works: poisoned memory, interchangeable statistics, equal bits."""

from __future__ import annotations

import os
import subprocess
import sys

import cases
import heads
import pytest
import torch
from places import Place

import iprm_kernels as ik
from iprm_kernels.backends import NAMES, kernels, requested


def step(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Forward and backward through every op."""
    x, y, w = x.detach().requires_grad_(), y.detach().requires_grad_(), torch.full((), 0.3, device=x.device, requires_grad=True)
    kl = torch.stack([ik.batch_kl(x, y), ik.batch_kl(y, x)])
    z = ik.normalize(ik.geodesic_mixup(x, y, w))
    (z.square() * x.detach()).sum().add(ik.strength_weights(kl)[0]).backward()
    return [z.detach(), kl.detach(), x.grad, y.grad, w.grad]


def test_repeats_bitwise(place: Place) -> None:
    x, y = cases.feature_pairs(129, 100, torch.float32, place.device)
    for first, second in zip(step(x, y), step(x, y), strict=True):
        assert torch.equal(first, second)


def test_thread_count_changes_no_bit() -> None:
    """1000 rows of 1000, and 200 of 500 with 31 classes: enough for the C++ kernels to divide, unevenly."""
    if not ik.backends()["cpp"].available:
        pytest.skip(str(ik.backends()["cpp"]))
    x, y = cases.feature_pairs(1000, 1000, torch.float32)
    results = []
    with ik.use_backend("cpp"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
            z, kl = ik.geodesic_mixup(*leaves, 0.3), ik.batch_kl(*leaves, reduction="none")
            (z.square().sum(1) + kl).backward(torch.linspace(-1, 1, 1000))
            step = heads.run(heads.inputs(200, 500, 31))
            results.append([z.detach(), kl.detach(), leaves[0].grad, leaves[1].grad])
            results[-1] += [*step.outputs.values(), *step.gradients.values()]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_statistics_of_one_backend_serve_the_backward_of_another(fused: Place) -> None:
    x, y = cases.feature_pairs(9, 31, torch.float64, fused.device)
    leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
    for forward, backward in (("reference", fused.backend), (fused.backend, "reference")):
        with ik.use_backend(forward):
            z, kl = ik.geodesic_mixup(*leaves, 0.3), ik.batch_kl(*leaves)
            value = ik.normalize(z).sum() + kl
        with ik.use_backend(backward):
            crossed = torch.autograd.grad(value, leaves)
        with ik.use_backend(forward):
            z, kl = ik.geodesic_mixup(*leaves, 0.3), ik.batch_kl(*leaves)
            own = torch.autograd.grad(ik.normalize(z).sum() + kl, leaves)
        torch.testing.assert_close(crossed, own, rtol=1e-12, atol=1e-12)


def test_a_forgotten_element_is_seen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs come from poisoned memory: a kernel that skips the last element leaves a NaN there."""
    namespace = kernels(place.device)
    whole = namespace.normalize

    def forgetful(x: torch.Tensor, eps: float, out: torch.Tensor, norm: torch.Tensor) -> None:
        written = torch.zeros_like(out)
        whole(x, eps, written, norm)
        out.view(-1)[:-1] = written.view(-1)[:-1]

    monkeypatch.setattr(namespace, "normalize", forgetful)
    out = ik.normalize(cases.randn(3, 7, device=place.device))
    assert out[2, 6].isnan()
    assert out.view(-1)[:-1].isfinite().all()


def test_backends_reports_each(place: Place) -> None:
    statuses = ik.backends()
    assert tuple(statuses) == NAMES
    assert statuses["reference"].available
    for status in statuses.values():
        assert status.available or status.reason, status.name


def test_an_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"backend: expected one of reference, cpp, triton, cuda, got 'tpu'"),
        ik.use_backend("tpu"),
    ):
        pass


def test_an_unavailable_backend_is_refused_with_its_reason() -> None:
    status = ik.backends()["cuda"]
    if status.available:
        pytest.skip("the CUDA kernels are built and a GPU is there")
    with pytest.raises(ik.BackendUnavailableError) as caught, ik.use_backend("cuda"):
        pass
    assert status.reason in str(caught.value)


def test_use_backend_nests_and_survives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    before = kernels(cpu)
    with ik.use_backend("reference"):
        reference = kernels(cpu)
        with pytest.raises(KeyError), ik.use_backend("reference"):
            raise KeyError
        assert kernels(cpu) is reference
    assert kernels(cpu) is before


def test_use_backend_of_two_threads_takes_back_its_own() -> None:
    """Entered a, b; left a, b: within b, b is in use to its end."""
    first, second = ik.use_backend("cpp"), ik.use_backend("reference")
    if not ik.backends()["cpp"].available:
        pytest.skip(str(ik.backends()["cpp"]))
    before = requested()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert requested() == "reference"
    second.__exit__(None, None, None)
    assert requested() == before


@pytest.mark.parametrize(
    ("value", "outcome"),
    [("reference", "ran"), ("cuda", "BackendUnavailableError"), ("tpu", "ValueError: backend: expected one of")],
)
def test_environment_variable(value: str, outcome: str) -> None:
    script = "import torch, iprm_kernels as ik; ik.normalize(torch.ones(2, 3)); print('ran')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "IPRM_KERNELS_BACKEND": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout + done.stderr
