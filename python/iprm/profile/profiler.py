"""Where the time of a training batch goes: a Lightning profiler that assigns every moment to one stage.

Stages nest: time belongs to the innermost open stage, and to `REST` if none is open, so that the stages of a batch add up to
its wall time. A stage may occur any number of times per batch. Stages are opened by Lightning's actions, calls of encoders
and fusion module, backward passes (`torch.autograd.backward` and `grad`) and optimiser steps. In a backward pass, the gradient
of an encoder's features ends the stage of the head, or of another encoder: autograd visits the nodes in reverse order.

On a GPU every border synchronises. Stages then do not overlap as they do in an ordinary run, which takes less time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from iprm.errors import InputError

DATA = "data"
DEVICE = "to the device"
HEAD_FORWARD, HEAD_BACKWARD = "head forward", "head backward"
#: Stages of a step that is one CUDA graph, in which modules cannot be distinguished.
GRAPH_FORWARD, GRAPH_BACKWARD = "encoders and head forward", "encoders and head backward"
OPTIMISER = "optimiser"
METRICS = "metrics and checks"
REST = "Lightning and the rest"

#: Lightning's actions, by the last part of their names, and their stages; any other hook "on_..." is `REST`.
STAGE_OF = {
    "train_dataloader_next": DATA,
    "batch_to_device": DEVICE,
    **dict.fromkeys(("on_before_batch_transfer", "on_after_batch_transfer"), DEVICE),
    "training_step": METRICS,  # without the modules, backward passes and optimiser steps inside
    "optimizer_zero_grad": OPTIMISER,
    "configure_gradient_clipping": OPTIMISER,
    "optimizer_step": OPTIMISER,  # without the closure, which is the training step and the backward pass
}
#: Batches before the first measured one, in which memory pools, threads and caches are created.
WARM_UP = 5


def forward_of(modality: str) -> str:
    return f"{modality} encoder forward"


def backward_of(modality: str) -> str:
    return f"{modality} encoder backward"


@dataclass(frozen=True)
class Profile:
    """Means of the measured batches, in seconds."""

    stages: dict[str, float]  #: name -> seconds per batch
    batches: int  #: number of measured batches
    rows: int  #: per batch and process
    epoch_batches: int | None  #: None for data without a length
    validation: float | None  #: one pass over the validation split with its metrics; None without validation
    synchronised: bool  #: every border waited for the GPU

    @property
    def seconds(self) -> float:
        """Wall time of a batch."""
        return math.fsum(self.stages.values())

    @property
    def epoch(self) -> float | None:
        """Seconds of an epoch: its batches and the validation."""
        return None if self.epoch_batches is None else self.epoch_batches * self.seconds + (self.validation or 0.0)


class StageProfiler(Profiler):
    """Measures batches of a fit, and then stops the fit after a last validation. The Trainer must have no limits of its own::

        profiler = StageProfiler(steps=50)
        trainer = L.Trainer(profiler=profiler, max_epochs=-1)
        with profiler.attached(trainer, model):
            trainer.fit(model, datamodule=data)
        profiler.result()

    The last batch of an epoch, which may have fewer rows, is left out: a compiled model may be compiled anew for it.

    Args:
        steps: number of batches to measure.
        warm_up: number of batches before the first measured one.
        now: the clock, in seconds.
    """

    def __init__(self, steps: int, *, warm_up: int = WARM_UP, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.steps, self.warm_up, self._now = steps, warm_up, now
        self._device: torch.device | None = None  # to synchronise
        self._open: list[str] = []  # stages, innermost last
        self._border = 0.0  # time of the last change of stages
        self._batch: defaultdict[str, float] | None = None  # seconds of the current batch by stage
        self._total: defaultdict[str, float] = defaultdict(float)  # of all measured batches
        self._seen = self._measured = self._rows = 0  # batches; rows of the largest
        self._validation_began: float | None = None
        self._validations: list[float] = []

    @contextlib.contextmanager
    def attached(self, trainer: L.Trainer, model: Any) -> Iterator[None]:
        """Within the context, encoders and fusion module of `model`, backward passes and optimiser steps open stages."""
        self._trainer, device = trainer, trainer.strategy.root_device
        self._device = None if device.type == "cpu" else device
        whole = bool(model.graphed is not None) and device.type == "cuda"
        forward = [GRAPH_FORWARD] if whole else [*map(forward_of, model.encoders), HEAD_FORWARD]
        backward = [GRAPH_BACKWARD] if whole else [HEAD_BACKWARD, *map(backward_of, model.encoders)]
        self._names = [DATA, DEVICE, *forward, *backward, OPTIMISER, METRICS, REST]
        self._stage_of = STAGE_OF | ({"training_step": GRAPH_FORWARD} if whole else {})
        with contextlib.ExitStack() as stack:
            for name in ("backward", "grad"):
                call = functools.partial(self._inside, backward[0], getattr(torch.autograd, name))
                stack.enter_context(mock.patch.object(torch.autograd, name, call))
            stack.callback(register_optimizer_step_pre_hook(lambda *_: self._push(OPTIMISER)).remove)
            stack.callback(register_optimizer_step_post_hook(lambda *_: self._pop()).remove)
            if not whole:  # a replayed graph calls no module
                for modality, encoder in model.encoders.items():
                    stack.enter_context(_calls(encoder, functools.partial(self._encoder, modality)))
                stack.enter_context(_calls(model.fusion, self._fusion))
            yield

    def result(self) -> Profile:
        """The means of the measured batches.

        Raises:
            InputError: the fit ended before any batch was measured.
        """
        if not self._measured:
            raise InputError("nothing was measured: the training ended during its first batches")
        batches, passes = self._trainer.num_training_batches, self._validations
        return Profile(
            stages={name: self._total[name] / self._measured for name in self._names},
            batches=self._measured,
            rows=self._rows,
            epoch_batches=int(batches) if math.isfinite(batches) else None,
            validation=math.fsum(passes) / len(passes) if passes else None,
            synchronised=self._device is not None,
        )

    # batches and validations

    def start(self, action_name: str) -> None:
        hook = action_name.rpartition(".")[2]
        if hook == "train_dataloader_next" and self._batch is None:
            self._begin_batch()
        elif hook == "on_validation_model_zero_grad":  # the first action of a validation
            self._validation_began = self._time()
        if stage := self._opened_by(hook):
            self._push(stage)

    def stop(self, action_name: str) -> None:
        hook = action_name.rpartition(".")[2]
        if self._opened_by(hook):
            self._pop()
        if hook == "on_train_batch_end" and action_name.startswith("[LightningModule]"):  # after those of callbacks
            self._end_batch()
        elif hook == "run_training_epoch" and self._validation_began is not None:
            self._validations.append(self._time() - self._validation_began)
            self._validation_began = None

    def _opened_by(self, hook: str) -> str | None:
        return self._stage_of.get(hook) or (REST if hook.startswith("on_") else None)

    def _begin_batch(self) -> None:
        self._batch, self._border = defaultdict(float), self._time()

    def _end_batch(self) -> None:
        self._cut()
        batch, self._batch = self._batch, None
        self._seen += 1
        last = self._trainer.is_last_batch and self._trainer.num_training_batches > 1
        if batch is not None and self._seen > self.warm_up and not last:
            for stage, seconds in batch.items():
                self._total[stage] += seconds
            self._measured += 1
            if self._measured == self.steps:
                self._trainer.should_stop = True
        if not self._trainer.is_last_batch:  # the next batch begins at this border
            self._batch = defaultdict(float)

    # stages

    def _time(self) -> float:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()  # a capture cannot wait
        if self._device is not None and not capturing:
            torch.accelerator.synchronize(self._device)
        return self._now()

    def _cut(self) -> None:
        """Adds the time since the last border to the innermost open stage."""
        if self._batch is not None:
            now = self._time()
            self._batch[self._open[-1] if self._open else REST] += now - self._border
            self._border = now

    def _push(self, stage: str) -> None:
        self._cut()
        self._open.append(stage)

    def _pop(self) -> None:
        self._cut()
        self._open.pop()

    def _inside(self, stage: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._push(stage)
        try:
            return call(*args, **kwargs)
        finally:
            self._pop()

    def _encoder(self, modality: str, call: Callable[..., Tensor], *inputs: Any, **kwargs: Any) -> Tensor:
        features = self._inside(forward_of(modality), call, *inputs, **kwargs)
        if features.requires_grad:
            features.register_hook(lambda gradient: self._enter(backward_of(modality)))
        return features

    def _fusion(self, call: Callable[..., Any], features: Any, *args: Any, **kwargs: Any) -> Any:
        if self._batch is not None:
            self._rows = max(self._rows, len(next(iter(features.values()))))
        return self._inside(HEAD_FORWARD, call, features, *args, **kwargs)

    def _enter(self, stage: str) -> None:
        """The running backward pass enters another stage."""
        self._cut()
        self._open[-1:] = [stage]


@contextlib.contextmanager
def _calls(module: nn.Module, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Calls of `module` become ``wrapper(call, *inputs)``.

    torch's private attribute is where `Module.compile` puts its compiled call; forward hooks would be compiled with the module.
    """
    compiled = module._compiled_call_impl
    module._compiled_call_impl = functools.partial(wrapper, compiled or module._call_impl)
    try:
        yield
    finally:
        module._compiled_call_impl = compiled
