"""Every public function with every wrong argument: before a kernel runs, an exception names the argument, the expected and the
passed value."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import iprm_kernels as ik
from iprm_kernels.backends import kernels
from iprm_kernels.convention import KERNELS

X = torch.ones(2, 3)
META = torch.ones(2, 3, device="meta")
KL = torch.ones(2)
NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def mixup(x: Any = X, y: Any = X, weight: Any = 0.5, **options: Any) -> Any:
    return ik.geodesic_mixup(x, y, weight, **options)


def kl(p: Any = X, q: Any = X, **options: Any) -> Any:
    return ik.batch_kl(p, q, **options)


T = torch.tensor([0, 3])
HEAD = (torch.ones(4, 3), torch.ones(4))
LOGITS = torch.ones(2, 4)
LINEAR = torch.nn.Linear(3, 4)


def step(x: Any = X, y: Any = X, *heads: Any, target: Any = T, weight: Any = 0.5, **options: Any) -> Any:
    return ik.linear_probe_rebalance(x, y, *(heads or (HEAD, HEAD, HEAD)), target, weight, **options)


def probe(x: Any = X, y: Any = X, *logits: Any, head: Any = LINEAR, weight: Any = 0.5, **options: Any) -> Any:
    return ik.probe_rebalance(x, y, *(logits or (LOGITS, LOGITS)), head, weight, **options)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ik.normalize([1.0]), TypeError, r"x: expected a tensor \(\.\.\., D\), got list"),
    (lambda: ik.normalize(X.int()), TypeError, r"x: expected float16, .*, got torch\.int32"),
    (lambda: ik.normalize(torch.tensor(1.0)), ValueError, r"x: expected shape \(\.\.\., D\) .*, got \(\)"),
    (lambda: ik.normalize(torch.ones(2, 0)), ValueError, r"x: .*at least 1, got \(2, 0\)"),
    (lambda: ik.normalize(X, eps=0.0), ValueError, r"eps: expected a positive finite number, got 0\.0"),
    (lambda: ik.normalize(X, eps=float("nan")), ValueError, r"eps: expected a positive finite number, got nan"),
    (lambda: ik.normalize(X, eps=1e-30), ValueError, r"eps: expected at least 1e-18 for torch\.float32, got 1e-30"),
    (lambda: ik.normalize(X, eps=1e39), ValueError, r"eps: expected at most 1e\+18 for torch\.float32, got 1e\+39"),
    (lambda: ik.normalize(X, eps=10**400), ValueError, r"eps: expected at most 1e\+18 for torch\.float32, got 1000"),
    (lambda: ik.normalize(X.to_sparse()), TypeError, r"x: expected a dense tensor .*, got torch\.sparse_coo"),
    (lambda: ik.normalize(X.to_sparse_csr()), TypeError, r"x: expected a dense tensor .*, got torch\.sparse_csr"),
    (lambda: ik.normalize(NESTED), TypeError, r"x: expected a dense tensor .*, got a nested tensor"),
    (lambda: mixup(weight=torch.ones(2).to_sparse()), TypeError, r"weight: expected a dense tensor .*, got torch\.sparse_coo"),
    (lambda: mixup(weight=1e39), ValueError, r"weight: expected a number that is finite in torch\.float32, got 1e\+39"),
    (lambda: mixup(weight=10**400), ValueError, r"weight: expected a number that is finite in torch\.float32, got 1000"),
    (lambda: kl(reduction=X.numpy()), ValueError, r"reduction: expected one of sum, mean, none, got array"),
    (lambda: step(X, X, (HEAD[0][:0], None), HEAD, HEAD), ValueError, r"head_x weight: .*with C at least 1, got \(0, 3\)"),
    (lambda: step(X, X, HEAD, (HEAD[0], NESTED), HEAD), TypeError, r"head_y bias: expected a dense tensor"),
    (lambda: step(X, X, HEAD, HEAD, (HEAD[0].to_sparse(), HEAD[1])), TypeError, r"head_mix weight: expected a dense tensor"),
    (lambda: step(target=T.to_sparse()), TypeError, r"target: expected a dense tensor .*, got torch\.sparse_coo"),
    (lambda: step(ignore_index=2**70), ValueError, r"ignore_index: expected an integer of 64 bits, got 1180591620717411303424"),
    (lambda: ik.normalize(X, eps="1"), TypeError, r"eps: expected a float, got str"),
    (lambda: ik.normalize(X, eps=True), TypeError, r"eps: expected a float, got bool"),
    (lambda: mixup(x=None), TypeError, r"x: expected a tensor \(\.\.\., D\), got NoneType"),
    (lambda: mixup(y=1.0), TypeError, r"y: expected a tensor \(\.\.\., D\), got float"),
    (lambda: mixup(y=X.bool()), TypeError, r"y: expected float16, .*, got torch\.bool"),
    (lambda: mixup(y=torch.ones(2, 4)), ValueError, r"y: expected the shape of x, \(2, 3\), got \(2, 4\)"),
    (lambda: mixup(y=META), ValueError, r"y: expected the device of x, cpu, got meta"),
    (lambda: mixup(y=X.double()), TypeError, r"y: expected the dtype of x, torch\.float32, got torch\.float64"),
    (lambda: mixup(weight="half"), TypeError, r"weight: expected a float or a tensor, got str"),
    (lambda: mixup(weight=True), TypeError, r"weight: expected a float or a tensor, got bool"),
    (lambda: mixup(weight=float("inf")), ValueError, r"weight: expected a finite number, got inf"),
    (lambda: mixup(weight=torch.tensor(1)), TypeError, r"weight: expected a floating tensor, got torch\.int64"),
    (lambda: mixup(weight=torch.ones(3)), ValueError, r"weight: expected a float, shape \(\) or \(2,\), got \(3,\)"),
    (lambda: mixup(weight=torch.ones(2, device="meta")), ValueError, r"weight: expected the device of x, cpu, got meta"),
    (lambda: mixup(eps=-1.0), ValueError, r"eps: expected a positive finite number, got -1\.0"),
    (lambda: kl(p=[0.0]), TypeError, r"p_logits: expected a tensor \(B, C\), got list"),
    (lambda: kl(p=X[0], q=X[0]), ValueError, r"p_logits: expected shape \(B, C\), got \(3,\)"),
    (lambda: kl(q=X.long()), TypeError, r"q_logits: expected float16, .*, got torch\.int64"),
    (lambda: kl(q=torch.ones(2, 4)), ValueError, r"q_logits: expected the shape of p_logits, \(2, 3\), got \(2, 4\)"),
    (lambda: kl(q=META), ValueError, r"q_logits: expected the device of p_logits, cpu, got meta"),
    (lambda: kl(q=X.half()), TypeError, r"q_logits: expected the dtype of p_logits, torch\.float32, got torch\.float16"),
    (lambda: kl(reduction="batchmean"), ValueError, r"reduction: expected one of sum, mean, none, got 'batchmean'"),
    (lambda: ik.strength_weights(1.0), TypeError, r"kl: expected a tensor \(M,\), got float"),
    (lambda: ik.strength_weights(KL.int()), TypeError, r"kl: expected float16, .*, got torch\.int32"),
    (lambda: ik.strength_weights(X), ValueError, r"kl: expected shape \(M,\), got \(2, 3\)"),
    (lambda: ik.strength_weights(KL[:0]), ValueError, r"kl: .*at least 1, got \(0,\)"),
    (lambda: step(x=X[0]), ValueError, r"x: expected shape \(B, D\), got \(3,\)"),
    (lambda: step(y=torch.ones(3, 3)), ValueError, r"y: expected the shape of x, \(2, 3\), got \(3, 3\)"),
    (lambda: step(y=X.double()), TypeError, r"y: expected the dtype of x, torch\.float32, got torch\.float64"),
    (lambda: step(X, X, HEAD[0], HEAD, HEAD), TypeError, r"head_x: expected \(weight \(C, D\), bias .*, got Tensor"),
    (lambda: step(X, X, HEAD, (HEAD[0],), HEAD), TypeError, r"head_y: expected \(weight \(C, D\), bias .*, got a tuple of 1"),
    (lambda: step(X, X, HEAD, (HEAD[0].T, None), HEAD), ValueError, r"head_y weight: .*\(4, 3\), got \(3, 4\)"),
    (lambda: step(X, X, HEAD, HEAD, (HEAD[0][:3], None)), ValueError, r"head_mix weight: .*\(4, 3\), got \(3, 3\)"),
    (lambda: step(X, X, (HEAD[0], X[0]), HEAD, HEAD), ValueError, r"head_x bias: expected shape \(4,\), got \(3,\)"),
    (lambda: step(X, X, (HEAD[0], 0.0), HEAD, HEAD), TypeError, r"head_x bias: expected a tensor \(C,\), got float"),
    (lambda: step(X, X, HEAD, HEAD, (HEAD[0].half(), None)), TypeError, r"head_mix weight: expected the dtype of x"),
    (lambda: step(X, X, HEAD, HEAD, (HEAD[0].to("meta"), None)), ValueError, r"head_mix weight: expected the device of x"),
    (lambda: step(target=[0, 1]), TypeError, r"target: expected an int64 tensor \(B,\), got list"),
    (lambda: step(target=T.int()), TypeError, r"target: expected int64 class indices, got torch\.int32"),
    (lambda: step(target=T.float()), TypeError, r"target: expected int64 class indices, got torch\.float32"),
    (lambda: step(target=T[:1]), ValueError, r"target: expected shape \(2,\), got \(1,\)"),
    (lambda: step(target=T.to("meta")), ValueError, r"target: expected the device of x, cpu, got meta"),
    (lambda: step(weight=torch.ones(2)), ValueError, r"weight: expected a float or shape \(\), got \(2,\)"),
    (lambda: step(label_smoothing=1.5), ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1\.5"),
    (lambda: step(label_smoothing="0"), TypeError, r"label_smoothing: expected a number in \[0, 1\], got str"),
    (lambda: step(ignore_index=0.5), TypeError, r"ignore_index: expected an integer, got float"),
    (lambda: step(group="world"), TypeError, r"group: expected a ProcessGroup or None, got str"),
    (lambda: probe(x=X[0]), ValueError, r"x: expected shape \(B, D\), got \(3,\)"),
    (lambda: probe(y=torch.ones(2, 4)), ValueError, r"y: expected the shape of x, \(2, 3\), got \(2, 4\)"),
    (lambda: probe(X, X, LOGITS[:1], LOGITS), ValueError, r"logits_x: expected 2 rows, as x has, got shape \(1, 4\)"),
    (lambda: probe(X, X, LOGITS, X), ValueError, r"logits_y: expected the shape of logits_x, \(2, 4\), got \(2, 3\)"),
    (lambda: probe(head=HEAD), TypeError, r"head: expected a callable \(B, D\) -> \(B, C\), got tuple"),
    (lambda: probe(weight=torch.ones(2)), ValueError, r"weight: expected a float or shape \(\), got \(2,\)"),
    (lambda: probe(group=0), TypeError, r"group: expected a ProcessGroup or None, got int"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message[:48] for *_, message in WRONG])
def test_wrong_argument(call: Callable[[], Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(*_: Any) -> None:
        pytest.fail("a kernel ran on bad input")

    namespace = kernels(torch.device("cpu"))
    for name in KERNELS:
        monkeypatch.setattr(namespace, name, ran)
    with pytest.raises(error, match=f"^{message}") as caught:
        call()
    assert type(caught.value) is error


@pytest.mark.parametrize(("shift", "message"), [(1, "got 4 in row 1"), (-1, "got -1 in row 0")])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_label_out_of_range(backend: str, shift: int, message: str) -> None:
    """The kernels check labels when they read them: a check beforehand costs 6 µs per step."""
    if not ik.backends()[backend].available:
        pytest.skip(str(ik.backends()[backend]))
    with ik.use_backend(backend), pytest.raises(ValueError, match=rf"^target: expected labels in \[0, 4\), {message}"):
        step(target=T + shift)
    with ik.use_backend(backend):
        assert step(target=T + shift, ignore_index=T[0 if shift < 0 else 1].item() + shift).loss.isfinite()


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (torch.nn.Identity(), ValueError, r"head: expected an output of the shape of logits_x, \(2, 4\), got \(2, 3\)"),
        (lambda z: z.tolist(), TypeError, r"head: expected an output tensor \(B, C\), got list"),
        (lambda z: LOGITS.to_sparse(), TypeError, r"head: expected a dense tensor .*, got torch\.sparse_coo"),
        (lambda z: LOGITS.double(), TypeError, r"head: expected the dtype of logits_x, torch\.float32, got torch\.float64"),
    ],
)
def test_wrong_output_of_a_head(head: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        probe(head=head)


def test_the_second_output_of_a_head_is_checked_too() -> None:
    outputs = iter([LOGITS, None])
    with pytest.raises(TypeError, match=r"^head: expected an output tensor \(B, C\), got NoneType"):
        probe(head=lambda z: next(outputs))


HALF = (
    0.5,
    np.float16(0.5),
    np.float32(0.5),
    np.float64(0.5),
    np.longdouble(0.5),
    Fraction(1, 2),
    Decimal("0.5"),
    np.array(0.5),
)
ONE = (1, np.int8(1), np.int64(1), np.uint32(1))


@pytest.mark.parametrize("number", [*HALF, *ONE], ids=lambda number: type(number).__name__)
def test_every_real_number_is_a_number(number: Any) -> None:
    value = float(number)
    assert torch.equal(mixup(X, 2 - X, number), mixup(X, 2 - X, value))
    assert torch.equal(ik.normalize(X, eps=number), ik.normalize(X, eps=value))
    assert torch.equal(step(weight=number).kl, step(weight=value).kl)
    assert torch.equal(step(label_smoothing=number).losses, step(label_smoothing=value).losses)
    assert torch.equal(probe(weight=number).kl, probe(weight=value).kl)


def test_tensors_of_one_number() -> None:
    assert torch.equal(ik.normalize(X, eps=torch.tensor(0.5)), ik.normalize(X, eps=0.5))
    assert torch.equal(step(label_smoothing=torch.tensor(0.5)).losses, step(label_smoothing=0.5).losses)


@pytest.mark.parametrize("index", [np.int64(3), np.int32(3), np.uint8(3)], ids=lambda number: type(number).__name__)
def test_every_integer_is_an_integer(index: Any) -> None:
    assert torch.equal(step(ignore_index=index).losses, step(ignore_index=3).losses)
    pairs = [(np.int64(0), index - 2)]
    own = ik.linear_probe_rebalance_pairs([X, X], [HEAD, HEAD], [HEAD], T, 0.5, pairs=pairs)
    assert torch.equal(own.kl, ik.linear_probe_rebalance_pairs([X, X], [HEAD, HEAD], [HEAD], T, 0.5).kl)


@pytest.mark.parametrize(
    "value",
    [True, np.True_, np.array(True), torch.tensor(True), 1j, np.complex64(1), "1", None, [0.5], np.array([0.5])],
    ids=repr,
)
def test_what_is_no_real_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="weight: expected a float"):
        mixup(weight=value)
    for option in ("label_smoothing", "ignore_index"):
        with pytest.raises(TypeError, match=f"{option}: expected"):
            step(**{option: value})
    with pytest.raises(TypeError, match="eps: expected a float"):
        ik.normalize(X, eps=value)


@pytest.mark.parametrize("value", [np.float32("nan"), np.longdouble("inf"), Decimal("Infinity"), Fraction(10**400)], ids=repr)
def test_a_number_that_is_not_finite_is_refused(value: Any) -> None:
    for call in (lambda: mixup(weight=value), lambda: ik.normalize(X, eps=value), lambda: step(label_smoothing=value)):
        with pytest.raises(ValueError, match="expected"):
            call()
