"""geodesic_mixup and batch_kl, forward and backward, against their formulas in eager and compiled torch, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import iprm_kernels as ik


def mixup_formula(x: Tensor, y: Tensor) -> Tensor:
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    theta = torch.acos((x * y).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6))
    return (torch.sin(0.3 * theta) * x + torch.sin(0.7 * theta) * y) / torch.sin(theta)


def kl_formula(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(p, 1), F.log_softmax(q, 1)
    return (log_p.exp() * (log_p - log_q)).sum()


def medians(versions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in versions}
    for step in range(repeats + 3):
        for name, run in versions.items():
            start = time.perf_counter()
            run()
            if step >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def main() -> None:
    cases = [
        ("geodesic_mixup", lambda x, y: ik.geodesic_mixup(x, y, 0.3), mixup_formula, [(64, 512), (1024, 512), (8192, 1024)]),
        ("batch_kl", ik.batch_kl, kl_formula, [(64, 31), (8192, 31), (8192, 1000)]),
    ]
    for name, ours, formula, shapes in cases:
        compiled = torch.compile(formula)
        for shape in shapes:
            x, y = (torch.randn(shape, requires_grad=True) for _ in range(2))
            grad = torch.randn_like(formula(x, y))
            torch.testing.assert_close(ours(x, y), formula(x, y), rtol=1e-4, atol=1e-4)  # no timing of a wrong result
            versions = {
                label: lambda run=run: torch.autograd.grad(run(x, y), (x, y), grad)  # noqa: B023
                for label, run in (("eager", formula), ("compiled", compiled), ("ours", ours))
            }
            took = medians(versions, max(11, min(300, 10_000_000 // (shape[0] * shape[1]))))
            print(
                f"{name} {shape}: {took['eager'] / took['ours']:.2f}x eager, {took['compiled'] / took['ours']:.2f}x compiled; "
                + ", ".join(f"{label} {value:.0f} us" for label, value in took.items())
            )


if __name__ == "__main__":
    main()
