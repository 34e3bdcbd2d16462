"""Where the time of a training step goes: a Lightning profiler that tells the stages of a step apart.

Time is cut at borders: what has passed since the last border belongs to the stage that ends there, and to `REST` where no stage
does. The stages of a step therefore add up to its wall time. Borders are Lightning's own actions, calls of encoders and fusion
module, and in the backward pass the gradients of the features: autograd runs what was computed last first, hence all of the
head before any encoder, and one encoder after the other.

On a GPU every border waits for it. Stages then do not overlap, as they do in a run that nobody measures, so every measured step
has a sibling that is timed as a whole, with one wait at its end: the difference is what measuring costs.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn

from iprm.training.classifier import FusionClassifier

from .result import Profile, Step, summary

DATA = "data"
DEVICE = "to the device"
HEAD_FORWARD, HEAD_BACKWARD = "head forward", "head backward"
#: Of steps that are one CUDA graph, in which modules cannot be told apart.
GRAPH_FORWARD, GRAPH_BACKWARD = "encoders and head forward", "encoders and head backward"
OPTIMISER = "optimiser"
METRICS = "metrics and guard"
REST = "Lightning and the rest"

#: Lightning's actions, by the last part of their names, and the stage that each of them is.
STAGE_OF = {
    "train_dataloader_next": DATA,
    "batch_to_device": DEVICE,
    "training_step": METRICS,  # less what the modules take
    "optimizer_zero_grad": OPTIMISER,
    "configure_gradient_clipping": OPTIMISER,
    "optimizer_step": OPTIMISER,  # what comes after clipping: the closure runs before it
}
#: Steps before any is measured: memory pools, threads and caches are made in the first.
WARM_UP = 5


def forward_of(modality: str) -> str:
    return f"{modality} encoder forward"


def backward_of(modality: str) -> str:
    return f"{modality} encoder backward"


class Instrument(Profiler):
    """Measures a fit and stops it when that is done, after a last validation. For the ``profiler`` of a Trainer without limits
    of its own::

        instrument = Instrument(steps=50)
        trainer = L.Trainer(profiler=instrument, max_epochs=-1)
        instrument.attach(trainer, model)
        trainer.fit(model, datamodule=data)
        instrument.result()

    A step is one of the optimiser, with all batches whose gradients it adds. An epoch's last, which may have fewer rows, is
    left out: a compiled model may be compiled anew for it. Measured steps and their unmeasured siblings alternate in an order
    drawn at random, so that neither are always, say, an epoch's first. All processes of a run draw and stop alike.

    Args:
        steps: how many to measure.
        warm_up: steps before the first.
        now: the clock, in seconds.
    """

    def __init__(self, steps: int, *, warm_up: int = WARM_UP, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.steps, self.warm_up = steps, warm_up
        self._now = now
        self._device: torch.device | None = None  # to wait for
        self._finished: list[Step] = []  # after the warm-up
        self._begun = 0
        self._counts: Counter[bool] = Counter()  # of finished steps, measured or not
        self._random = random.Random(0)
        self._pair: list[bool] = []  # what is left of it
        self._step: Step | None = None
        self._border = 0.0  # when the last one was
        self._backward = ""  # the stage of the backward pass that is going on
        self._validations: list[float] = []
        self._between: list[float] = []
        self._validation_began: float | None = None
        self._epoch_ended: float | None = None

    def attach(self, trainer: L.Trainer, model: FusionClassifier) -> None:
        """Puts borders around the encoders and the fusion module of `model`, for one fit of `trainer`."""
        self._trainer, self._modalities = trainer, tuple(model.encoders)
        device = trainer.strategy.root_device
        self._device = None if device.type == "cpu" else device
        # a capture must not wait, and what a captured graph replays calls no module
        self._whole = model.graphed is not None and device.type == "cuda"
        model.driver.run = self._counted(model.driver.run)
        if self._whole:
            return
        for modality, encoder in model.encoders.items():
            _wrap_calls(encoder, functools.partial(self._encoder, modality))
        _wrap_calls(model.fusion, self._fusion)

    def result(self) -> Profile:
        """What was measured.

        Raises:
            InputError: no step was.
        """
        batches = self._trainer.num_training_batches
        return summary(
            self._finished,
            self._stages(),
            epoch_batches=int(batches) if math.isfinite(batches) else None,
            validations=self._validations,
            between=self._between,
            synchronised=self._device is not None,
        )

    def _stages(self) -> list[str]:
        """All stages in the order of a step."""
        passes = [GRAPH_FORWARD, GRAPH_BACKWARD]
        if not self._whole:
            passes = [*map(forward_of, self._modalities), HEAD_FORWARD, HEAD_BACKWARD, *map(backward_of, self._modalities)]
        return [DATA, DEVICE, *passes, OPTIMISER, METRICS, REST]

    # borders

    def start(self, action_name: str) -> None:
        hook = _hook(action_name)
        if hook == "train_dataloader_next":
            self._begin_step()
        elif hook == "on_validation_model_zero_grad":  # what Lightning does first of a validation
            self._validation_began = self._end_step()
        elif hook == "on_after_backward":  # Lightning has its action "backward" include what comes before and after
            self._cut(self._backward)
            self._backward = REST
        elif hook == "on_before_optimizer_step":
            self._cut(OPTIMISER)  # 16-mixed has divided the gradients by its scale
        elif hook in STAGE_OF:
            self._cut(REST)

    def stop(self, action_name: str) -> None:
        hook = _hook(action_name)
        if hook in STAGE_OF:
            self._cut(STAGE_OF[hook])
            if hook == "optimizer_step" and self._step:
                self._count(self._step)
        elif hook == "on_before_backward":
            self._cut(REST)
            self._backward = GRAPH_BACKWARD if self._whole else HEAD_BACKWARD
        elif hook in ("on_after_backward", "on_before_optimizer_step"):
            self._cut(REST)
        elif hook == "run_training_epoch":
            self._end_epoch()

    def _time(self) -> float:
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
        return self._now()

    def _cut(self, stage: str) -> None:
        """The time since the last border was this stage's."""
        if self._step is not None and self._step.measured:
            now = self._time()
            self._step.stages[stage] += now - self._border
            self._border = now

    def _begin_step(self) -> None:
        if self._step is not None and not self._step.complete:
            self._cut(REST)  # and on to its next batch
            return
        now = self._end_step()
        if self._epoch_ended is not None:
            self._between.append(now - self._epoch_ended)
            self._epoch_ended = None
        self._begun += 1
        self._step, self._border = Step(now, self._is_measured()), now

    def _end_step(self) -> float:
        """Ends the step that goes on, if there is one, and returns the time."""
        now = self._time()
        step, self._step = self._step, None
        if step is not None and step.complete and self._begun > self.warm_up:
            if step.measured:
                step.stages[REST] += now - self._border
            step.seconds = now - step.began
            self._finished.append(step)
        return now

    def _end_epoch(self) -> None:
        self._epoch_ended = self._end_step()
        if self._validation_began is not None:
            self._validations.append(self._epoch_ended - self._validation_began)
            self._validation_began = None

    def _is_measured(self) -> bool:
        """Whether the step that begins is to be, as drawn for each pair of steps."""
        if self._begun <= self.warm_up:
            return False
        if not self._pair:
            self._pair = [True, False]
            self._random.shuffle(self._pair)
        return self._pair.pop()

    def _count(self, step: Step) -> None:
        """Notes that the optimiser has stepped, and stops the fit where that was the last step."""
        trainer = self._trainer
        step.complete = True
        step.last = trainer.is_last_batch and trainer.num_training_batches > trainer.accumulate_grad_batches
        if self._begun <= self.warm_up or step.last:
            return
        self._counts[step.measured] += 1
        if min(self._counts[True], self._counts[False]) >= self.steps:
            trainer.should_stop = True

    # modules

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`Driver.run`, of a batch that is counted."""

        def step(inputs: Any, target: Tensor) -> Any:
            self._cut(METRICS)
            result = call(inputs, target)
            if self._whole:
                self._cut(GRAPH_FORWARD)
            if self._step is not None:
                self._step.rows += len(target)
                self._step.batches += 1
            return result

        return step

    def _encoder(self, modality: str, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        features = call(*inputs)
        self._cut(forward_of(modality))
        if self._step is not None and self._step.measured and features.requires_grad:
            features.register_hook(functools.partial(self._begin_backward, modality))
        return features

    def _fusion(self, call: Callable[..., Any], *features: Any) -> Any:
        output = call(*features)
        self._cut(HEAD_FORWARD)
        return output

    def _begin_backward(self, modality: str, gradient: Tensor) -> None:
        """Autograd comes to this encoder: what it has done until now was the head's, or another encoder's."""
        self._cut(self._backward)
        self._backward = backward_of(modality)


def _wrap_calls(module: nn.Module, wrapper: Callable[..., Any]) -> None:
    """Calls of `module` become ``wrapper(call, *inputs)``.

    This attribute is where `Module.compile` puts its compiled call. Hooks of the module would be compiled with it.
    """
    call = module._compiled_call_impl or module._call_impl
    module._compiled_call_impl = functools.partial(wrapper, call)


@functools.cache
def _hook(action: str) -> str:
    """The last part of an action's name."""
    return action.rpartition(".")[2]
