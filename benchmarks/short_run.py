"""A few small head steps and mixtures by every GPU backend, for compute-sanitizer, under which a kernel takes a thousandfold.

usage: compute-sanitizer --tool memcheck python short_run.py
"""

from __future__ import annotations

import torch

import iprm_kernels as ik


def step(batch: int, width: int, classes: int, dtype: torch.dtype) -> None:
    """One step forward and backward, and one mixture and KL."""
    x, y = (torch.randn(batch, width, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    heads = [torch.nn.Linear(width, classes, device="cuda", dtype=dtype) for _ in range(3)]
    target = torch.arange(batch, device="cuda") % classes
    result = ik.linear_probe_rebalance(x, y, *((head.weight, head.bias) for head in heads), target, 0.5)
    mixed = ik.geodesic_mixup(x, y, result.strength[0])
    (result.loss + mixed.float().square().sum() + ik.batch_kl(result.logits_x, result.logits_mix)).backward()


def main() -> None:
    for backend in ("triton", "cuda"):
        status = ik.backends()[backend]
        if not status.available:
            print(status)
            continue
        with ik.use_backend(backend):
            for shape in ((5, 7, 3), (33, 64, 6), (70, 129, 31), (9, 48, 200)):
                for dtype in (torch.float32, torch.bfloat16):
                    step(*shape, dtype)
        torch.cuda.synchronize()
        print(f"{backend}: done")


if __name__ == "__main__":
    main()
