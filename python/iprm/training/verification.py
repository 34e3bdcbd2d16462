"""Verifies the kernels of a training run at its first use of a GPU, so that they can serve it."""

from __future__ import annotations

import os
import sys
from typing import Any

import lightning as L
import torch

import iprm_kernels as ik
from iprm.environment import VARIABLE, device_name

from .classifier import FusionClassifier

#: Precision of a trainer -> the types of its features and of what autocast leaves wide. In others plain torch serves.
TYPES: dict[Any, tuple[torch.dtype, ...]] = {
    "32-true": (torch.float32,),
    "bf16-mixed": (torch.bfloat16, torch.float32),
    "16-mixed": (torch.float16, torch.float32),
    "bf16-true": (torch.bfloat16, torch.float32),
    "16-true": (torch.float16, torch.float32),
    "64-true": (torch.float64,),
}


def verify_kernels(trainer: L.Trainer, model: FusionClassifier, rows: int) -> None:
    """Verifies and times, once per GPU model, the operators that this run calls, in its types and size: see
    `iprm_kernels.verify_backends`. It takes less than a minute; what passes serves the run, and plain torch the rest.

    Does nothing on a CPU, for a method without operators, with IPRM_KERNELS_BACKEND, or if the verdict is kept already.

    Args:
        rows: B, the batch size of a process.
    """
    device, fusion = trainer.strategy.root_device, model.fusion
    dtypes = TYPES.get(trainer.precision, ())
    if device.type != "cuda" or not fusion.operators or not dtypes or os.environ.get(VARIABLE):
        return
    shown = trainer.local_rank == 0
    line = _Line(f"verifying the kernels on {device_name(device)}, once, in less than a minute") if shown else None
    step = (rows, min(fusion.widths.values()), fusion.num_classes)
    found = ik.verify_backends(device, operators=fusion.operators, dtypes=dtypes, step=step, progress=line)
    if not found.outcomes or not shown:
        return
    failed = [outcome for outcome in found.outcomes if outcome.reason and not outcome.refused]
    passed = sum(not outcome.reason for outcome in found.outcomes)
    print(f"kernels: {passed} checks passed, {len(failed)} failed; verdict: {found.kept}", file=sys.stderr)
    for outcome in failed:
        print(f"  {outcome.backend} {' '.join(outcome.check.case)}: {outcome.reason}", file=sys.stderr)


class _Line:
    """Prints what runs, beside the number of checks; the title before the first."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __call__(self, ended: int, total: int, what: str) -> None:
        if self.title:
            print(self.title, file=sys.stderr)
            self.title = ""
        print(f"  {ended}/{total} {what}", file=sys.stderr)
