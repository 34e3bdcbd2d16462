"""Every public function with every wrong argument: the exception names argument, expectation and what came, before a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import iprm_kernels as ik
from iprm_kernels.backends import KERNELS, kernels

X = torch.ones(2, 3)
META = torch.ones(2, 3, device="meta")
KL = torch.ones(2)


def mixup(x: Any = X, y: Any = X, weight: Any = 0.5, **options: Any) -> Any:
    return ik.geodesic_mixup(x, y, weight, **options)


def kl(p: Any = X, q: Any = X, **options: Any) -> Any:
    return ik.batch_kl(p, q, **options)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ik.normalize([1.0]), TypeError, r"x: expected a tensor \(\.\.\., D\), got list"),
    (lambda: ik.normalize(X.int()), TypeError, r"x: expected float16, .*, got torch\.int32"),
    (lambda: ik.normalize(torch.tensor(1.0)), ValueError, r"x: expected shape \(\.\.\., D\) .*, got \(\)"),
    (lambda: ik.normalize(torch.ones(2, 0)), ValueError, r"x: .*at least 1, got \(2, 0\)"),
    (lambda: ik.normalize(X, eps=0.0), ValueError, r"eps: expected a positive finite number, got 0\.0"),
    (lambda: ik.normalize(X, eps=float("nan")), ValueError, r"eps: expected a positive finite number, got nan"),
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
