"""Trains a fusion module in real processes, each on its part of the joint batches, and returns the results of every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import run_on_ranks
from iprm.data.loading import JointBatches
from iprm.distributed import rank
from iprm.methods import build
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

CLASSES, WIDTH = 5, 12


class Model(nn.Module):
    """Encoders without batch normalisation, which would see only part of a batch, and a fusion method."""

    def __init__(self, method: str, modalities: tuple[str, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.checkpointed = False
        self.encoders = nn.ModuleDict({name: nn.Sequential(nn.Linear(7, WIDTH), nn.Tanh()) for name in modalities})
        self.fusion = build(method, WIDTH, CLASSES, modalities, **options).fusion

    def forward(self, inputs: dict[str, Tensor], target: Tensor) -> Any:
        return (
            checkpoint(self._whole, inputs, target, use_reentrant=False) if self.checkpointed else self._whole(inputs, target)
        )

    def _whole(self, inputs: dict[str, Tensor], target: Tensor) -> Any:
        return self.fusion({name: encoder(inputs[name]) for name, encoder in self.encoders.items()}, target)

    def replace_heads(self) -> None:
        """Puts perceptrons in the place of the mixture heads, so that no head step is fused."""
        for name in self.fusion.mix_heads:
            self.fusion.mix_heads[name] = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def train(
    processes: int,
    steps: int = 50,
    rows: int = 59,
    joint: int = 16,
    method: str = "iprm",
    modalities: tuple[str, ...] = ("sound", "image"),
    options: dict[str, Any] | None = None,
    ignored: float = 0.0,
    sharded: bool = False,
    apart: bool = False,
    replaced: bool = False,
    checkpointed: bool = False,
) -> list[dict[str, Any]]:
    """Results of this process in each step: loss, gradients, ω, λ, and the sizes of the all-reduced tensors.

    joint: rows per joint batch; the last one of an epoch has `rows` % `joint`. ignored: fraction of labels that are -100.
    sharded: use FSDP2 instead of DistributedDataParallel. apart: each process starts with a λ of its own; that of rank 0 holds.
    replaced: of the heads, those of the mixtures. checkpointed: encoders and fusion are recomputed in the backward pass.
    """
    torch.manual_seed(0)
    model = Model(method, modalities, options or {})
    if replaced:
        model.replace_heads()
    model.double()
    model.checkpointed = checkpointed
    if apart:
        model.fusion.weight += 0.25 * rank()
    inputs = {name: torch.randn(rows, 7, dtype=torch.float64) for name in modalities}
    target = torch.randint(CLASSES, (rows,))
    target[torch.rand(rows) < ignored] = -100
    runner = _distributed(model, sharded) if dist.is_initialized() else model
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    batches = JointBatches(rows, joint // processes, shuffle=True, seed=3)
    sums: list[int] = []
    added = dist.all_reduce

    def counting(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        sums.append(values.numel())
        return added(values, *args, **kwargs)

    dist.all_reduce = counting
    course: list[dict[str, Any]] = []
    while len(course) < steps:
        for own in batches:
            sums.clear()
            optimiser.zero_grad()
            out = runner({name: x[own] for name, x in inputs.items()}, target[own])
            out.loss.backward()
            optimiser.step()
            weight = getattr(model.fusion, "weight", None)
            course.append(
                {
                    "rows": len(own),
                    "loss": out.loss.detach(),
                    "gradients": [whole(parameter.grad) for parameter in model.parameters()],
                    "strength": out.strength,
                    "weight": weight if weight is None or isinstance(weight, nn.Parameter) else weight.clone(),
                    "sums": list(sums),
                }
            )
        batches.set_epoch(batches.epoch + 1)
    dist.all_reduce = added
    return course[:steps]


def _distributed(model: Model, sharded: bool) -> nn.Module:
    if not sharded:
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.encoders.values(), model.fusion, model):
        fully_shard(module, mesh=mesh)
    return model


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def run_processes(folder: Path, processes: int, **options: Any) -> list[list[dict[str, Any]]]:
    """Results of each of several real processes."""
    return run_on_ranks(folder, processes, _train, processes, options)


def _train(processes: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    return train(processes, **options)
