"""Optimisers and learning rate schedules from plain settings, and how a resumed run applies new settings."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from iprm.errors import InputError, check_number, check_whole, plain_values, unknown

from .checkpoint import MOST_COUNTED

#: Settings of an optimiser or schedule: {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}, or a class path alone.
Settings = Mapping[str, Any]

OPTIMIZER: dict[str, Any] = {
    "class_path": "torch.optim.SGD",
    "init_args": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
}
LR_SCHEDULER: dict[str, Any] = {"class_path": "iprm.training.optim.StepAtFraction", "init_args": {}}


#: Upper bounds of arguments that torch does not check for NaN, infinity or meaningless values; the lower bound is 0.
BOUNDS = {"lr": math.inf, "weight_decay": math.inf, "momentum": 1.0}


class StepAtFraction(LambdaLR):
    """Multiplies the learning rates by `gamma` once, after a fraction of all epochs.

    Args:
        optimizer: the optimiser to schedule.
        epochs: number of epochs of the run; `iprm fit` fills it in.
        fraction: from 0 to 1; the rates change after ``max(1, round(fraction · epochs))`` epochs.
        gamma: from 0 up.
    """

    def __init__(self, optimizer: Optimizer, epochs: int | None = None, fraction: float = 0.7, gamma: float = 0.1) -> None:
        epochs = _number_of(epochs)
        fraction, gamma = check_number("fraction", fraction, 1), check_number("gamma", gamma)
        last = max(1, round(fraction * epochs))
        super().__init__(optimizer, lambda epoch: gamma if epoch >= last else 1.0)


class WarmupCosine(LambdaLR):
    """Raises the learning rates linearly over the first epochs, then lowers them along half a cosine::

        lr(e) = lr · (e + 1) / (w + 1)                                            for e < w
        lr(e) = lr · (floor + (1 - floor) · (1 + cos(π (e - w) / (epochs - w))) / 2)   from then on

    Args:
        optimizer: the optimiser to schedule.
        epochs: number of epochs of the run; `iprm fit` fills it in.
        warmup_epochs: w, from 0 to below `epochs`.
        floor: final rate as a fraction of the base rate, from 0 to 1.
    """

    def __init__(self, optimizer: Optimizer, epochs: int | None = None, warmup_epochs: int = 0, floor: float = 0.0) -> None:
        epochs = _number_of(epochs)
        warmup, floor = check_number("warmup_epochs", warmup_epochs, epochs - 1), check_number("floor", floor, 1)

        def factor(epoch: int) -> float:
            if epoch < warmup:
                return (epoch + 1) / (warmup + 1)
            part = min(1.0, (epoch - warmup) / (epochs - warmup))
            return floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2

        super().__init__(optimizer, factor)


def checked(kind: str, base: type, settings: Settings | str) -> tuple[type, dict[str, Any]]:
    """The class and the arguments that settings name.

    Raises:
        InputError: there is no such class, or it is not a subclass of `base`.
    """
    if isinstance(settings, str):
        settings = {"class_path": settings}
    path, arguments = settings.get("class_path"), plain_values(dict(settings.get("init_args") or {}))
    if not isinstance(path, str) or not settings.keys() <= {"class_path", "init_args"}:
        raise InputError(f"{kind}: expected a class_path and init_args, got {dict(settings)!r}")
    home = "torch.optim.lr_scheduler" if base is LRScheduler else "torch.optim"
    module, _, name = (path if "." in path else f"{home}.{path}").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        classes = {n: c for n, c in vars(importlib.import_module(home)).items() if isinstance(c, type) and issubclass(c, base)}
        known = [n for n, cls in classes.items() if cls is not base and not n.startswith("_")]
        raise InputError(unknown(kind, path, [f"{home}.{n}" for n in known] if "." in path else known)) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{kind}: expected a subclass of {base.__name__}, got {path}")
    return found, arguments


def make_optimizer(groups: Iterable[dict[str, Any]], settings: Settings | str) -> Optimizer:
    """The optimiser of parameter groups. A group may override any argument, and may have ``lr_scale``, a factor of its rate.

    Raises:
        InputError: the optimiser cannot be made from these settings.
    """
    cls, arguments = checked("optimizer", Optimizer, settings)
    for name, highest in BOUNDS.items():
        if name in arguments:
            check_number(f"optimizer.{name}", arguments[name], highest)
    groups = list(groups)
    try:
        optimizer = cls([{name: x for name, x in group.items() if name != "lr_scale"} for group in groups], **arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer {cls.__name__}: {error}") from error
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        if "lr_scale" in group:
            own["lr"] = own["lr"] * group["lr_scale"]
    return optimizer


def make_scheduler(optimizer: Optimizer, settings: Settings | str, epochs: int | None) -> LRScheduler | None:
    """The learning rate schedule of an optimiser, stepped after every epoch. Classes of this module receive `epochs`; without
    a number of epochs, `StepAtFraction` is None, a constant rate.

    Raises:
        InputError: the schedule cannot be made from these settings, or needs a number of epochs and `epochs` is None.
    """
    cls, arguments = checked("lr_scheduler", LRScheduler, settings)
    if cls in (StepAtFraction, WarmupCosine) and arguments.get("epochs") is None:
        if cls is StepAtFraction and epochs is None:
            return None
        arguments["epochs"] = epochs
    try:
        return cls(optimizer, **arguments)
    except InputError as error:
        raise InputError(f"lr_scheduler: {error}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"lr_scheduler {cls.__name__}: {error}") from error


def check_scheduler(optimizer: Optimizer, settings: Settings | str, epochs: int | None) -> None:
    """Checks that a learning rate schedule can be made and stepped. `optimizer` is changed.

    Raises:
        InputError: see `make_scheduler`; or the first step divides by zero.
    """
    try:
        scheduler = make_scheduler(optimizer, settings, epochs)
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a schedule that is stepped before the optimiser
                scheduler.step()
    except ArithmeticError as error:
        cls, arguments = checked("lr_scheduler", LRScheduler, settings)
        given = ", ".join(f"{name} {value}" for name, value in arguments.items())
        raise InputError(f"lr_scheduler {cls.__name__}: {type(error).__name__}: {error}; with {given}") from error


def check_methods(scheduler: LRScheduler) -> None:
    """Raises InputError if a restored state, whose entries become attributes of the schedule, has replaced a method."""
    for name, value in vars(scheduler).items():
        if callable(getattr(type(scheduler), name, None)) and not callable(value):
            raise InputError(f"the checkpoint's lr_schedulers have an entry {name!r}, the name of a method")


class Configured:
    """The settings that an optimiser and its schedule were made with, to be applied again after a state is restored.

    Restoring a state overwrites the settings of every parameter group with those of the run that saved it. `apply` replaces
    them by the settings of this run. The current rate of a group is scaled by the ratio of the new to the saved initial rate.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        self._entries = dict(vars(scheduler)) if scheduler else {}

    def check(self) -> None:
        """Checks a restored state, whose entries have become those of parameter groups and attributes of the schedule.

        Raises:
            InputError: a group has no learning rate; or an entry of the schedule is of another type.
        """
        for group in self.optimizer.param_groups:
            for name in {"lr", *(group.keys() & {"initial_lr"})}:
                check_number(f"the checkpoint's {name} of the optimizer", group.get(name))
        for name, value in vars(self.scheduler).items() if self.scheduler else ():
            if name == "last_epoch":
                check_whole("the checkpoint's last_epoch of lr_schedulers", value, 0, MOST_COUNTED)
            elif name in self._entries and not _alike(value, self._entries[name]):
                raise InputError(f"the checkpoint's lr_schedulers have a {name} of {value!r}, expected {self._entries[name]!r}")

    def apply(self) -> None:
        """Call after restoring a state; without a restored state this changes nothing."""
        initial = [group.get("initial_lr", group["lr"]) for group in self.groups]
        if self.scheduler is not None:
            self.scheduler.base_lrs = list(initial)
        for place, (group, configured, rate) in enumerate(zip(self.optimizer.param_groups, self.groups, initial, strict=True)):
            saved, present = group.get("initial_lr"), group["lr"]
            group.update(configured)
            if isinstance(self.scheduler, LambdaLR):  # a function of the epoch: a changed number of epochs takes effect
                group["lr"] = rate * self.scheduler.lr_lambdas[place](self.scheduler.last_epoch)
            elif saved is not None:
                group["lr"] = present if saved == rate else present * (rate / saved) if saved else rate
            elif isinstance(self.scheduler, ReduceLROnPlateau):
                group["lr"] = present


def _alike(value: Any, other: Any) -> bool:
    """Whether both are numbers, or a value is of the type of another that is not None."""
    if isinstance(other, (int, float)):
        return isinstance(value, (int, float))
    return other is None or isinstance(value, type(other))


def _number_of(epochs: int | None) -> int:
    if epochs is None:
        raise InputError("epochs: a run bounded by steps or time has no number of epochs; give one, or another schedule")
    return check_whole("epochs", epochs)
