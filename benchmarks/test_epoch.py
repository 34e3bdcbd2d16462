"""Times one epoch at the shapes of CREMA-D (encoders, heads, optimiser) with sum fusion, with the released step and with ours.

On a GPU the encoders are ResNet-18 on spectrograms (1 x 257 x 1004) and two frames (3 x 224 x 224) at batch 64; on a CPU
they are narrower, and their inputs smaller. The paper (Yang, Wu, Jiang, IJCAI 2025) reports 57.03 s per epoch of IPRM, and
55.08 s of joint training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import baselines
import pytest
import torch
from timing import DEVICE, Version, ours, wait
from torch import Tensor, nn

import iprm_kernels as ik

transformers = pytest.importorskip("transformers", reason="the encoders are transformers'")

CLASSES, SAMPLES = 6, 6698


class Setting(NamedTuple):
    batch: int
    hidden: list[int]
    spectrogram: tuple[int, ...]
    frames: tuple[int, ...]
    steps: int  # per timing
    rounds: int


SETTING = (
    Setting(64, [64, 128, 256, 512], (1, 257, 1004), (2, 3, 224, 224), 10, 10)
    if DEVICE == "cuda"
    else Setting(64, [8, 16, 32, 512], (1, 65, 126), (2, 3, 56, 56), 2, 8)
)


class Encoder(nn.Module):
    """ResNet-18, averaged over frames."""

    def __init__(self, channels: int, hidden: list[int]) -> None:
        super().__init__()
        config = transformers.ResNetConfig(
            num_channels=channels, embedding_size=hidden[0], hidden_sizes=hidden, depths=[2, 2, 2, 2], layer_type="basic"
        )
        self.net = transformers.ResNetModel(config)

    def forward(self, images: Tensor) -> Tensor:
        """(B, F, channels, H, W) -> (B, D)"""
        batch, frames = images.shape[:2]
        return self.net(images.flatten(0, 1)).pooler_output.view(batch, frames, -1).mean(1)


def fused(*arguments: Any) -> Tensor:
    return ik.linear_probe_rebalance(*arguments).loss


def training_step(loss: Callable[..., Tensor]) -> Version:
    torch.manual_seed(0)
    encoders = [Encoder(1, SETTING.hidden), Encoder(3, SETTING.hidden)]
    heads = [nn.Linear(SETTING.hidden[-1], CLASSES) for _ in range(3)]
    model = nn.ModuleList([*encoders, *heads]).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    spectrograms = torch.randn(SETTING.batch, 1, *SETTING.spectrogram, device=DEVICE)
    frames = torch.randn(SETTING.batch, *SETTING.frames, device=DEVICE)
    target = torch.randint(CLASSES, (SETTING.batch,), device=DEVICE)
    weight = torch.tensor(0.5, device=DEVICE)

    def run() -> None:
        optimizer.zero_grad()
        x, y = encoders[0](spectrograms), encoders[1](frames)
        loss(x, y, *((head.weight, head.bias) for head in heads), target, weight).backward()
        optimizer.step()

    return run


def test_epoch(record: Callable[..., None]) -> None:
    versions = {
        "naive": training_step(baselines.naive),
        "released": training_step(baselines.released),
        **ours(training_step(fused)),
    }
    steps = -(-SAMPLES // SETTING.batch)
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for turn in range(-1, SETTING.rounds):  # interleaved; the first turn is a warm-up
        for name, run in versions.items():
            taken = _seconds(run, SETTING.steps) / SETTING.steps * steps
            if turn >= 0:
                seconds[name].append(taken)
    found = {name: (statistics.mean(taken), statistics.stdev(taken)) for name, taken in seconds.items()}
    ratios = {
        name: statistics.median(mine / naive for mine, naive in zip(taken, seconds["naive"], strict=True))
        for name, taken in seconds.items()
    }
    line = ", ".join(
        f"{name} {mean:.2f} ± {deviation:.2f} s (x{ratios[name]:.3f})" for name, (mean, deviation) in found.items()
    )
    record("an epoch of CREMA-D's size", line, seconds=found, ratios=ratios, setting=SETTING._asdict())


def _seconds(run: Version, steps: int) -> float:
    wait()
    begin = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return time.perf_counter() - begin
