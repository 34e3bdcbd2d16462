"""The figures of a profile: what is made of the steps that were measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from iprm.errors import InputError

#: How often differences are drawn anew to find how far the cost of measuring is known.
DRAWS = 1000


@dataclass(frozen=True)
class Spread:
    """Seconds: the median, and two quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], low: float = 0.2, high: float = 0.8) -> Spread:
        return cls(*(float(value) for value in np.quantile(seconds, (0.5, low, high))))


@dataclass(frozen=True)
class Stage:
    """A stage of a step: its seconds a step (quantiles 0.2 and 0.8) and their mean, its part of the step's wall time, and its
    seconds an epoch (None where the data have no length). These two come from the mean: medians do not add up."""

    name: str
    step: Spread
    mean: float
    share: float
    epoch: float | None


@dataclass(frozen=True)
class Profile:
    """What was measured, in seconds."""

    stages: tuple[Stage, ...]
    step: Spread  #: wall time of the measured steps
    unmeasured: Spread  #: wall time of as many steps between them, at whose borders nothing was read
    cost: Spread  #: what measuring adds to a step: the median difference of neighbours, and its 90 % interval
    rows: int  #: of a step, of this process
    batches: float  #: of a step, on average: those whose gradients it adds
    epoch_batches: int | None
    validation: float | None  #: one pass over the validation split, its metrics included; None without one
    between: float | None  #: from an epoch's end to the next one's first batch; None where no second epoch was begun
    synchronised: bool  #: every border has waited for the device

    @property
    def steps_of_epoch(self) -> float | None:
        """Seconds of all steps of an epoch."""
        return _total(stage.epoch for stage in self.stages)

    @property
    def epoch(self) -> float | None:
        """Seconds of an epoch: its steps, validation, and what is between two."""
        return _total((self.steps_of_epoch, self.validation or 0.0, self.between or 0.0))


def _total(seconds: Iterable[float | None]) -> float | None:
    values = list(seconds)
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


@dataclass
class Step:
    """A step as it goes on: seconds by stage, and, once it is over, in all."""

    began: float
    measured: bool
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: int = 0
    batches: int = 0
    complete: bool = False  # the optimiser has stepped
    last: bool = False  # of several in its epoch
    seconds: float = 0.0


def _cost(steps: Sequence[Step]) -> Spread:
    """The median difference between measured steps and the others next to them, with the 90 % interval of the bootstrap.

    Other work on the machine slows down neighbours alike, and would drown the difference of two medians.
    """
    differences, last = [], None
    for step in steps:
        if last is None or last.measured is step.measured:
            last = step
        else:
            differences.append(step.seconds - last.seconds if step.measured else last.seconds - step.seconds)
            last = None
    drawn = np.random.default_rng(0).choice(differences, (DRAWS, len(differences)))
    return replace(Spread.of(np.median(drawn, axis=1), 0.05, 0.95), median=float(np.median(differences)))


def summary(
    finished: Sequence[Step],
    stages: Sequence[str],
    *,
    epoch_batches: int | None,
    validations: Sequence[float],
    between: Sequence[float],
    synchronised: bool,
) -> Profile:
    """The figures of steps that have ended, but the last of an epoch.

    Args:
        finished: measured steps and others.
        stages: in the order of a step.
        epoch_batches: of one epoch; None if its data have no length.
        validations: seconds of each pass over the validation split.
        between: seconds between epochs.
        synchronised: every border has waited for the device.

    Raises:
        InputError: no step was measured.
    """
    whole = [step for step in finished if not step.last]
    measured, others = ([step for step in whole if step.measured is wanted] for wanted in (True, False))
    if not measured or not others:
        raise InputError("nothing was measured: the training ended during its first steps")
    total, batches = sum(step.seconds for step in measured), sum(step.batches for step in measured)

    def stage(name: str) -> Stage:
        seconds = [step.stages[name] for step in measured]
        epoch = None if epoch_batches is None else sum(seconds) / batches * epoch_batches
        return Stage(name, Spread.of(seconds), sum(seconds) / len(seconds), sum(seconds) / total, epoch)

    return Profile(
        stages=tuple(stage(name) for name in stages),
        step=Spread.of([step.seconds for step in measured]),
        unmeasured=Spread.of([step.seconds for step in others]),
        cost=_cost(whole),
        rows=max(step.rows for step in measured),
        batches=batches / len(measured),
        epoch_batches=epoch_batches,
        validation=float(np.median(validations)) if validations else None,
        between=float(np.median(between)) if between else None,
        synchronised=synchronised,
    )
