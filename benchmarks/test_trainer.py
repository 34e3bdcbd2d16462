"""Times training by `iprm fit` beside a bare loop in PyTorch, and in it an epoch of IPRM beside one of concatenation.

All versions train the same model from the same weights on the same batches, in turn in one process. They are compared before
they are timed: the weights after a run of the trainer and after the bare loop are bit-identical.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import rich
import torch
from iprm.data.datasets.av_digits import AvDigits
from iprm.data.datasets.digits import Digits
from iprm.data.module import MultimodalData
from iprm.data.split import Split
from iprm.training.callbacks.best_checkpoint import BestCheckpoint
from iprm.training.callbacks.csv_logger import RunLog
from iprm.training.callbacks.progress import RunProgress
from iprm.training.callbacks.run_state import RunState
from iprm.training.checkpoint import AtomicCheckpointIO
from iprm.training.classifier import FusionClassifier
from iprm.training.lightning import quiet_lightning
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

#: The folder of recordings for the epochs of av-digits.
RECORDINGS = os.environ.get("IPRM_RECORDINGS")
EPOCHS = 4  # per run; the first is not timed
TURNS = 8  # runs per version
THREADS = [1, 2]
#: Targets: a step in the trainer over a step of the bare loop, and an epoch of iprm over one of concat.
BAR_STEP, BAR_EPOCH = 1.15, 1.03


class Epoch(NamedTuple):
    """Seconds of one epoch: of its training steps, and of all of it with validation, checkpoints and logs. By the clock, and
    of the processor, on which other processes of the machine have less effect."""

    steps: float
    whole: float
    steps_cpu: float
    whole_cpu: float


class Moment(NamedTuple):
    wall: float
    cpu: float

    @staticmethod
    def now() -> Moment:
        return Moment(time.perf_counter(), time.process_time())


def epoch_of(began: Moment, stepped: Moment, ended: Moment) -> Epoch:
    return Epoch(stepped.wall - began.wall, ended.wall - began.wall, stepped.cpu - began.cpu, ended.cpu - began.cpu)


class Clock(L.Callback):
    """Times the epochs of a run."""

    def __init__(self) -> None:
        self.began: list[Moment] = []
        self.stepped: list[Moment] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began.append(Moment.now())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == trainer.num_training_batches - 1:
            self.stepped.append(Moment.now())

    def epochs(self) -> list[Epoch]:
        """All epochs but the first, a warm-up, and the last, because an epoch ends where the next one begins."""
        return [epoch_of(*moments) for moments in zip(self.began, self.stepped, self.began[1:], strict=False)][1:]


class Minimal(L.LightningModule):
    """The model in a minimal LightningModule."""

    def __init__(self, model: FusionClassifier) -> None:
        super().__init__()
        self.encoders, self.fusion = model.encoders, model.fusion
        self.learning_rate, self.momentum, self.weight_decay = model.learning_rate, model.momentum, model.weight_decay

    def forward(self, inputs: Mapping[str, Tensor], target: Tensor) -> Any:
        return self.fusion(encoded(self.encoders, inputs), target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(*batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


def encoded(encoders: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features, with images in the memory format of the shipped configurations."""

    def placed(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    return {name: encoder(placed(inputs[name])) for name, encoder in encoders.items()}


Run = Callable[[FusionClassifier, MultimodalData, Path], list[Epoch]]


def bare(model: FusionClassifier, data: MultimodalData, folder: Path) -> list[Epoch]:
    """A bare training loop, with loss and accuracy on the validation split."""
    train, val = data.splits["train"], data.splits["val"]
    encoders, fusion, optimiser = model.encoders, model.fusion, sgd(model)
    epochs = []
    for epoch in range(EPOCHS):
        began = Moment.now()
        model.train()
        order = torch.from_numpy(np.random.default_rng([data.seed, epoch]).permutation(len(train)))
        for rows in order.split(data.batch_size):
            target = train.target.index_select(0, rows)
            features = encoded(encoders, {name: x.index_select(0, rows) for name, x in train.inputs.items()})
            optimiser.zero_grad()
            fusion(features, target).loss.backward()
            optimiser.step()
        stepped = Moment.now()
        validate(model, val, data.batch_size)
        epochs.append(epoch_of(began, stepped, Moment.now()))
    return epochs[1:]


def validate(model: FusionClassifier, split: Split, batch_size: int) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    loss = correct = torch.zeros(())
    with torch.inference_mode():
        for start in range(0, len(split), batch_size):
            rows = slice(start, start + batch_size)
            features = encoded(model.encoders, {name: x[rows] for name, x in split.inputs.items()})
            target = split.target[rows]
            output = model.fusion(features, target)
            loss = loss + output.loss * len(target)
            correct = correct + (output.logits.argmax(1) == target).sum()
    return float(loss) / len(split), float(correct) / len(split)


def minimal(model: FusionClassifier, data: MultimodalData, folder: Path) -> list[Epoch]:
    """Lightning without the callbacks, loggers and checkpoints of `iprm fit`."""
    clock = Clock()
    runner = L.Trainer(callbacks=[clock], logger=False, enable_checkpointing=False, **quiet(folder, bar=False))
    runner.fit(Minimal(model), datamodule=data)
    return clock.epochs()


def by_trainer(bar: bool) -> Run:
    """The trainer as `iprm fit` configures it."""

    def run(model: FusionClassifier, data: MultimodalData, folder: Path) -> list[Epoch]:
        clock = Clock()
        # the bar is drawn into /dev/null, so that the time of a terminal is not counted
        with Path(os.devnull).open("w") as nowhere:
            shown = [RunProgress(console_kwargs={"file": nowhere, "force_terminal": True})] if bar else []
            log = RunLog(folder)
            events = TensorBoardLogger(log.save_dir, log.name, log.version, default_hp_metric=False)
            runner = L.Trainer(
                callbacks=[*shown, BestCheckpoint(), RunState(), clock],
                logger=[log, events],
                plugins=[AtomicCheckpointIO()],
                **quiet(folder, bar),
            )
            runner.fit(model, datamodule=data)
            rich.reconfigure()  # Lightning's bar replaces rich's global console
        return clock.epochs()

    return run


def quiet(folder: Path, bar: bool) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "default_root_dir": folder,
        "enable_model_summary": False,
        "enable_progress_bar": bar,
    }


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=model.learning_rate, momentum=model.momentum, weight_decay=model.weight_decay)


def classifier(data: MultimodalData, method: str) -> FusionClassifier:
    L.seed_everything(0, verbose=False)
    return FusionClassifier(data.inputs, data.num_classes, method, decay_at=1.0, channels_last=True)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_run(run: Run, data: MultimodalData, method: str) -> tuple[FusionClassifier, list[Epoch]]:
    model = classifier(data, method)
    with tempfile.TemporaryDirectory(prefix="iprm-") as folder, quiet_lightning():
        return model, run(model, data, Path(folder))


def in_turn(runs: Mapping[str, tuple[Run, str]], data: MultimodalData, turns: int) -> dict[str, list[list[Epoch]]]:
    """The epochs of every run of each version. Each turn begins with another version."""
    names = list(runs)
    found: dict[str, list[list[Epoch]]] = {name: [] for name in names}
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(one_run(runs[name][0], data, runs[name][1])[1])
    return found


def figures(found: Mapping[str, list[list[Epoch]]], base: str) -> dict[str, dict[str, Any]]:
    """For each part of an epoch and each version: median milliseconds; 20th percentile, median and 80th percentile of the
    ratio to the base in the same turn; and the ratio of the fastest epochs, on which a busy machine has least effect."""

    def turns(name: str, part: int) -> list[float]:
        return [statistics.median(epoch[part] for epoch in run) for run in found[name]]

    def fastest(name: str, part: int) -> float:
        return min(epoch[part] for run in found[name] for epoch in run)

    def of(name: str, part: int) -> dict[str, Any]:
        own, other = turns(name, part), turns(base, part)
        tenths = statistics.quantiles([a / b for a, b in zip(own, other, strict=True)], n=10, method="inclusive")
        return {
            "ms": 1e3 * statistics.median(own),
            "ratio": [tenths[1], tenths[4], tenths[7]],
            "fastest": fastest(name, part) / fastest(base, part),
        }

    return {kind: {name: of(name, part) for name in found} for part, kind in enumerate(Epoch._fields)}


def said(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per part of an epoch."""

    def one(name: str, figure: Mapping[str, Any]) -> str:
        low, median, high = figure["ratio"]
        return f"{name} {figure['ms']:.1f} ms x{median:.3f} ({low:.3f} to {high:.3f}; fastest x{figure['fastest']:.3f})"

    return "".join(f"\n    {kind}: " + ", ".join(one(*named) for named in found.items()) for kind, found in kinds.items())


@pytest.mark.parametrize("number", THREADS)
def test_a_step_in_the_trainer(record: Callable[..., None], number: int) -> None:
    runs: dict[str, Run] = {"bare": bare, "lightning": minimal, "trainer": by_trainer(False), "trainer, bar": by_trainer(True)}
    data = Digits()
    with threads(number):
        models = {name: one_run(run, data, "iprm")[0] for name, run in runs.items()}
        for model in models.values():
            torch.testing.assert_close(model.encoders.state_dict(), models["bare"].encoders.state_dict(), rtol=0, atol=0)
            torch.testing.assert_close(model.fusion.state_dict(), models["bare"].fusion.state_dict(), rtol=0, atol=0)
        found = in_turn({name: (run, "iprm") for name, run in runs.items()}, data, TURNS)
    steps = len(data.train_dataloader())
    kinds = figures(found, "bare")
    line = f"digits, {number} thread(s), epochs of {steps} steps: {said(kinds)}"
    record("the trainer over a bare loop", line, threads=number, steps=steps, figures=kinds, bar=BAR_STEP)


@pytest.mark.parametrize("name", ["digits", "av-digits"])
def test_an_epoch_of_iprm(record: Callable[..., None], name: str) -> None:
    if name == "av-digits" and not RECORDINGS:
        pytest.skip("IPRM_RECORDINGS names no folder of recordings")
    data = AvDigits(RECORDINGS) if name == "av-digits" else Digits()
    runs = {method: (by_trainer(False), method) for method in ("concat", "iprm")}
    with threads(1):
        found = in_turn(runs, data, TURNS)
    kinds = figures(found, "concat")
    line = f"{name}, one thread: {said(kinds)}"
    record("an epoch of iprm over one of concat", line, data=name, threads=1, figures=kinds, bar=BAR_EPOCH)
