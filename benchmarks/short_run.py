"""Runs a few small head steps and mixtures on every GPU backend, for compute-sanitizer, which slows kernels a thousandfold.

usage: compute-sanitizer --tool memcheck python short_run.py

warm_cache.py compiles the Triton kernels of the same steps without a GPU.
"""

from __future__ import annotations

import itertools

import torch

import iprm_kernels as ik

#: Batch, width, classes: rows without vector loads and products by our kernels; products by torch.
SHAPES = ((33, 65, 6), (9, 48, 200))
DTYPES = (torch.float32, torch.bfloat16)


def step(batch: int, width: int, classes: int, dtype: torch.dtype, *, pair_only: bool, device: str = "cuda") -> None:
    """One step forward and backward of two modalities, and unless the backend has kernels for that alone, one of three, and one
    mixture and KL."""
    x, y, z = (torch.randn(batch, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    modules = [torch.nn.Linear(width, classes, device=device, dtype=dtype) for _ in range(6)]
    heads = [(module.weight, module.bias) for module in modules]
    target = torch.arange(batch, device=device) % classes
    result = ik.linear_probe_rebalance(x, y, *heads[:3], target, 0.5)
    if pair_only:
        result.loss.backward()
        return
    three = ik.linear_probe_rebalance_pairs([x, y, z], heads[:3], heads[3:], target, 0.5)
    mixed = ik.geodesic_mixup(x, y, result.strength[0])
    (result.loss + three.loss + mixed.float().square().sum() + ik.batch_kl(result.logits_x, result.logits_mix)).backward()


def main() -> None:
    for backend in ("triton", "cuda"):
        status = ik.backends()[backend]
        if not status.available:
            print(status)
            continue
        with ik.use_backend(backend):
            for shape, dtype in itertools.product(SHAPES, DTYPES):
                step(*shape, dtype, pair_only=backend == "cuda")
        torch.cuda.synchronize()
        print(f"{backend}: done")


if __name__ == "__main__":
    main()
