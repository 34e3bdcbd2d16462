"""Choice of a backend, and what other tests rely on: poisoned memory, interchangeable statistics, bit-identical repeats."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import cases
import heads
import pytest
import torch
from places import INTERPRETED, Place

import iprm_kernels as ik
from iprm_kernels import extension
from iprm_kernels.backends import kernels, requested
from iprm_kernels.convention import OPERATORS, HeadInputs, Kernel
from iprm_kernels.loading import NAMES, Loaded
from iprm_kernels.reference import kernels as reference

choice = sys.modules["iprm_kernels.backends"]  # in the package, the function of this name hides the module


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


def test_use_backend_in_two_threads_removes_its_own_entry() -> None:
    """Enter a, enter b, leave a, leave b: b stays in use until it is left."""
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


# by operator and shape


class Table:
    """Backends that a test defines, all on the CPU, tried in the order in which they were added."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded = {name: Loaded({}, (), "not in this test") for name in NAMES}
        self.calls: list[tuple[str, str]] = []
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(choice, "load", self.loaded.__getitem__)
        monkeypatch.setattr(choice, "_from_environment", None)
        self.use()

    def use(self, *names: str) -> None:
        """Sets the default backends, best first."""
        self.monkeypatch.setattr(choice, "TABLE", tuple(choice.Choice("cpu", name, "") for name in names))
        choice._select.cache_clear()

    def add(self, backend: str, *names: str, refuses: Any = None, limits: str = "") -> None:
        """Adds a backend that has the named kernels, each from the reference."""

        def counted(name: str) -> Any:
            def run(*arguments: Any) -> None:
                self.calls.append((backend, name))
                reference.SERVES[name].run(*arguments)

            return run

        made = {name: Kernel(counted(name), refuses, limits) for name in names or reference.SERVES}
        self.loaded[backend] = Loaded(made, ("cpu",), "")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    yield Table(monkeypatch)
    monkeypatch.undo()
    choice._select.cache_clear()


def few_classes(step: Any, *_: Any) -> str:
    classes = len(step.weights[0])
    return "" if classes <= 4 else f"its kernels take at most 4 classes, got {classes}"


class TestChoice:
    def test_by_default_another_backend_serves_an_operator_that_the_first_lacks(self, table: Table) -> None:
        table.add("cpp", "normalize", "normalize_backward")
        table.add("reference")
        table.use("cpp", "reference")
        x, y = cases.feature_pairs(5, 7, torch.float32)
        ik.geodesic_mixup(ik.normalize(x), y, 0.3)
        assert table.calls == [("cpp", "normalize"), ("reference", "geodesic_mixup")]
        statuses = ik.backends()
        assert statuses["cpp"].operators["normalize"].default_for == ("cpu",)
        assert statuses["reference"].operators["normalize"].default_for == ()
        assert statuses["reference"].operators["geodesic_mixup"].default_for == ("cpu",)

    def test_by_default_another_backend_serves_a_shape_that_the_first_refuses(self, table: Table) -> None:
        table.add("cpp", "head_forward", "head_backward", refuses=few_classes)
        table.add("reference")
        table.use("cpp", "reference")
        for classes, backend in ((4, "cpp"), (5, "reference")):
            table.calls.clear()
            heads.run(heads.inputs(5, 7, classes))
            assert table.calls == [(backend, "head_forward"), (backend, "head_backward")]

    def test_a_requested_backend_hands_no_operator_to_another(self, table: Table) -> None:
        table.add("cpp", "normalize", "normalize_backward")
        table.add("reference")
        table.use("cpp", "reference")
        x, y = cases.feature_pairs(5, 7, torch.float32)
        message = r"^geodesic_mixup: backend 'cpp' cannot serve a tensor on 'cpu': it has no kernel for this operator$"
        with ik.use_backend("cpp"):
            ik.normalize(x)
            with pytest.raises(ik.BackendUnavailableError, match=message):
                ik.geodesic_mixup(x, y, 0.3)
        assert table.calls == [("cpp", "normalize")]

    def test_nor_a_shape(self, table: Table) -> None:
        table.add("cpp", "head_forward", "head_backward", refuses=few_classes)
        table.add("reference")
        table.use("cpp", "reference")
        message = r"^linear_probe_rebalance: backend 'cpp' cannot serve a tensor on 'cpu': .* at most 4 classes, got 5$"
        with ik.use_backend("cpp"), pytest.raises(ik.BackendUnavailableError, match=message):
            heads.call(heads.inputs(5, 7, 5))
        assert table.calls == []

    def test_nor_a_backward_pass(self, table: Table) -> None:
        table.add("cpp", "normalize")
        table.add("reference")
        table.use("reference")
        x = torch.ones(2, 3, requires_grad=True)
        with ik.use_backend("cpp"):
            z = ik.normalize(x)
            with pytest.raises(ik.BackendUnavailableError, match=r"^normalize: backend 'cpp'"):
                z.sum().backward()

    def test_an_operator_is_shipped_by_one_backend_first(self, table: Table) -> None:
        """The status of each backend lists its kernels, and names those it lacks."""
        table.add("reference")
        table.add("cpp", *(name for name in reference.SERVES if name != "average_strength"))
        table.use("cpp", "reference")
        operators = ik.backends()["cpp"].operators
        assert [name for name, status in operators.items() if not status.available] == ["average_strength"]
        assert operators["average_strength"].reason == "it has no kernel average_strength"
        assert str(operators["average_strength"]) == "unavailable (it has no kernel average_strength)"

    def test_status_reports_limits(self, table: Table) -> None:
        table.add("triton", "head_forward", "head_backward", refuses=few_classes, limits="up to 4 classes")
        operators = ik.backends()["triton"].operators
        assert operators["linear_probe_rebalance"].limits == "up to 4 classes"
        assert str(operators["linear_probe_rebalance"]) == "available (up to 4 classes)"

    def test_another_device_is_refused_with_its_reason(self, table: Table) -> None:
        table.add("cpp")
        with pytest.raises(ik.BackendUnavailableError, match=r"'cpp' cannot serve a tensor on 'cuda': it serves cpu tensors"):
            choice._select("cpp", torch.device("cuda")).normalize()


def test_the_cuda_kernels_take_one_pair_of_two_modalities() -> None:
    step = reference_step(2)
    assert extension._more_than_one_pair(step) == ""
    assert "one pair of two modalities, got 3 modalities in 3 pairs" in extension._more_than_one_pair(reference_step(3))


def test_the_triton_kernels_take_up_to_4096_classes() -> None:
    triton_kernels = pytest.importorskip("iprm_kernels.kernels")
    assert triton_kernels.refuses(reference_step(2, classes=4096)) == ""
    reason = triton_kernels.refuses(reference_step(2, classes=4097))
    assert reason == "its kernels take at most 4096 classes of torch.float32, got 4097"
    reason = triton_kernels.refuses(reference_step(3, classes=1025, dtype=torch.float64))
    assert reason == "its kernels take at most 1024 classes of torch.float64, got 1025"


@pytest.mark.skipif(not INTERPRETED, reason="tests the Triton backend on CPU tensors, with TRITON_INTERPRET=1")
def test_the_triton_backend_hands_no_shape_to_plain_torch(place: Place) -> None:
    with pytest.raises(ik.BackendUnavailableError, match=r"^linear_probe_rebalance: backend 'triton' .* at most 4096 classes"):
        heads.call(heads.inputs(2, 3, 4097, device=place.device))


def reference_step(modalities: int, classes: int = 6, dtype: torch.dtype = torch.float32) -> Any:
    pairs = [0, 1] if modalities == 2 else [0, 1, 0, 2, 1, 2]
    made = {"dtype": dtype, "device": "meta"}
    weights = [torch.empty(classes, 7, **made) for _ in range(modalities + len(pairs) // 2)]
    features = [torch.empty(5, 7, **made) for _ in range(modalities)]
    return HeadInputs(features, weights, [None] * len(weights), pairs, torch.empty(5), torch.empty(1), 0.0, -100)


def test_every_backend_that_runs_here_has_a_status_per_operator() -> None:
    for status in ik.backends().values():
        assert set(status.operators) == set(OPERATORS)
        for operator in status.operators.values():
            assert operator.available or operator.reason
            assert not operator.default_for or operator.available
