"""Direct calls of the registered operators with arguments that are wrong in one to three places, each named before it runs."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import direct_calls
import torch
from torch import Tensor

#: Sizes beyond any memory: smaller ones would be served, by tensors that expand one element, in hours.
HUGE = [2**40, 2**45, 2**61, 2**62]


def _shrink(t: Tensor, draw: random.Random) -> None:
    """The storage no longer holds the elements, as FSDP leaves a parameter."""
    storage = t.untyped_storage()
    storage.resize_(draw.choice([0, storage.nbytes() // 2, max(storage.nbytes() - 1, 0)]))


def _another_size(t: Tensor, draw: random.Random) -> Tensor:
    shape = list(t.shape)
    if not shape:
        return t.new_zeros(draw.choice([(1,), (0,), (1, 1)]))
    shape[draw.randrange(len(shape))] = draw.choice([0, 1, 2, 7, 64])
    return t.new_zeros(shape)


def _resized(t: Tensor, draw: random.Random) -> Tensor:
    """One dimension longer or shorter by one."""
    shape = list(t.shape) or [1]
    dimension = draw.randrange(len(shape))
    shape[dimension] = max(0, shape[dimension] + draw.choice([-1, 1]))
    return t.new_zeros(shape)


def _huge(t: Tensor, draw: random.Random) -> Tensor:
    """One element for all, or none at all."""
    shape: list[int] = [draw.choice([1, 3]) for _ in t.shape] or [1]
    shape[draw.randrange(len(shape))] = draw.choice(HUGE)
    if len(shape) > 1 and draw.random() < 0.5:
        shape[draw.randrange(len(shape))] = draw.choice([0, *HUGE])
    return t.new_zeros(0).as_strided(shape, [1] * len(shape)) if 0 in shape else t.new_zeros([1] * len(shape)).expand(shape)


def _strided(t: Tensor, draw: random.Random) -> Tensor:
    """Strides of 0, of 1, or huge ones that a size of 1 or 0 makes harmless."""
    base = t.new_zeros(4096)
    strides = [draw.choice([0, 1, 2, 5]) if size > 1 else draw.choice([0, 1, *HUGE]) for size in t.shape]
    return base.as_strided(t.shape, strides, draw.choice([0, 1, 17]))


def _unaligned(t: Tensor, draw: random.Random) -> Tensor:
    count = t.numel()
    if count == 0:
        return t
    return torch.frombuffer(bytearray(count * t.element_size() + 1), dtype=t.dtype, count=count, offset=1).view(t.shape)


def _of_values(t: Tensor, draw: random.Random) -> Tensor:
    """The same tensor with values that no forward pass computes: labels out of range, NaN, statistics below zero."""
    if not t.dtype.is_floating_point:
        return t.fill_(draw.choice([-1, 10**6, 2**62, -(2**63)])) if t.dtype == torch.int64 else t
    return t.fill_(draw.choice([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-45, 6e4]))


def _one_type(t: Tensor, draw: random.Random) -> Tensor:
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64]
    return t.detach().clone().to(draw.choice([*types, torch.uint8, torch.float8_e4m3fn]))


def _elsewhere(t: Tensor, draw: random.Random) -> Tensor:
    kinds: list[Callable[[], Tensor]] = [
        lambda: t.detach().to("meta"),
        lambda: t.detach().to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], dtype=t.dtype),
        lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        lambda: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.qint8),
        lambda: t.detach().float().to_mkldnn(),
        lambda: t._lazy_clone(),
    ]
    return draw.choice(kinds)()


TENSORS: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "another size": _another_size,
    "one more or less": _resized,
    "huge": _huge,
    "a number": lambda t, draw: t.new_zeros(()),
    "a dimension more": lambda t, draw: t[None],
    "flat": lambda t, draw: t.reshape(-1),
    "transposed": lambda t, draw: t.T if t.dim() == 2 else t,
    "every other": lambda t, draw: t.new_zeros((*t.shape, 2)).select(-1, 0),
    "of other strides": _strided,
    "one element for all": lambda t, draw: t.new_zeros((1,) * t.dim()).expand(t.shape),
    "unaligned": _unaligned,
    "of other values": _of_values,
    "of another type": _one_type,
    "elsewhere": _elsewhere,
    "empty": lambda t, draw: t.new_zeros(draw.choice([(0,), (0, 0), (3, 0), (0, 5)])),
    "a parameter": lambda t, draw: torch.nn.Parameter(t.detach()) if t.dtype.is_floating_point else t,
}
NUMBERS: dict[type, list[Any]] = {
    float: [0.0, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, 1e-12],
    int: [0, 1, 2, 3, 4, -1, -100, 2**31, 2**62, 2**63 - 1, -(2**63)],
    bool: [True, False],
    str: ["", "sum", "none", "default", "0"],
}


def _in_list(value: list[Any], draw: random.Random) -> list[Any]:
    kind = draw.choice(["shorter", "longer", "empty", "replaced", "repeated"])
    value = list(value)
    if kind == "shorter":
        return value[:-1]
    if kind == "empty":
        return []
    if kind == "repeated" or not value:
        return value * 2
    if kind == "longer":
        return [*value, draw.choice(value)]
    place = draw.randrange(len(value))
    if isinstance(value[place], int) and not isinstance(value[place], bool):
        value[place] = draw.choice(NUMBERS[int])
    elif draw.random() < 0.3:
        value[place] = None
    return value


def spoiled(arguments: list[Any], draw: random.Random, storages: bool) -> tuple[list[Any], list[str]]:
    """The arguments with one to three faults, and what they are; a fault that torch itself refuses to make is left out.

    storages: one of them may be a storage cut short, which torch itself would read beyond its end."""
    arguments, faults = list(arguments), []
    for place in draw.sample(range(len(arguments)), min(len(arguments), draw.choice([1, 1, 1, 2, 3]))):
        value = arguments[place]
        inside = None
        if isinstance(value, list) and value and draw.random() < 0.7:
            inside = draw.randrange(len(value))
            value = value[inside]
        tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
        if isinstance(value, Tensor):
            kind = draw.choice([*TENSORS, "another argument"])
            try:
                new: Any = draw.choice(tensors) if kind == "another argument" else TENSORS[kind](value, draw)
            except (RuntimeError, TypeError, ValueError, NotImplementedError, OverflowError):
                continue  # torch itself refuses to make a tensor with this fault, such as a sparse one of this dtype
        elif isinstance(value, list):
            kind, new = "another list", _in_list(value, draw)
        elif value is None:
            kind, new = "a tensor", draw.choice(tensors)
        else:
            kind, new = "another value", draw.choice(NUMBERS[type(value)])
        if inside is None:
            arguments[place] = new
        else:
            arguments[place] = [*arguments[place][:inside], new, *arguments[place][inside + 1 :]]
        faults.append(f"argument {place}{'' if inside is None else f'[{inside}]'} {kind}")
    if storages and draw.random() < 0.15:  # after all other faults, which read their tensors
        tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if type(t) is Tensor and _resizable(t)]
        if tensors:
            place = draw.randrange(len(tensors))
            with contextlib.suppress(RuntimeError):  # a storage that torch does not resize
                _shrink(tensors[place], draw)
                faults.append(f"tensor {place} without its storage")
    return arguments, faults


def _resizable(t: Tensor) -> bool:
    return t.layout == torch.strided and t.device.type == "cpu" and not t.is_nested and t.untyped_storage().resizable()


def told(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(told, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    strides = tuple(value.stride()) if value.layout == torch.strided and not value.is_nested else value.layout
    return f"{str(value.dtype).removeprefix('torch.')}{[*value.shape] if not value.is_nested else 'nested'}@{strides}"


def run(seed: int, before: Callable[[str], None]) -> str:
    """One call, fixed by its seed, of an operator drawn from the registration. `before` gets its description.

    Returns: "served", or the type of the error it raised."""
    draw = random.Random(seed)
    name = draw.choice(direct_calls.registered())
    before(f"{name}, seed {seed}: its arguments")
    memory = direct_calls.Memory(draw)
    sizes = direct_calls.Sizes.drawn(draw)
    arguments, faults = direct_calls.valid_arguments(name, memory, sizes), ["no fault"]
    if draw.random() < 0.9:
        arguments, faults = spoiled(arguments, draw, storages=name.startswith("iprm_cpp"))
    before(f"{name}({', '.join(map(told, arguments))}), seed {seed}, {sizes}: {'; '.join(faults)}")
    outcome = "served"
    with contextlib.ExitStack() as stack:
        if draw.random() < 0.5:
            stack.enter_context(torch.no_grad())
        try:
            direct_calls.overload(name)(*arguments)
        except Exception as error:
            if faults == ["no fault"]:
                raise
            outcome = type(error).__name__
    if not any("without its storage" in fault or "another argument" in fault for fault in faults):
        memory.assert_guards()
    return outcome


def run_alone(report: Path, first: int, count: int, timeout: float = 600) -> int | None:
    """The exit code of `run_batch` in a process of its own; negative if a signal ended it.

    It is forked from this process: a server as in `forked` would import Lightning and iprm first."""
    process = multiprocessing.get_context("fork").Process(target=run_batch, args=(report, first, count))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def run_batch(report: Path, first: int, count: int) -> None:
    """Calls of the seeds from `first` on. `report` names the call that is running; at the end it holds the outcomes as JSON."""
    torch.set_num_threads(1)
    outcomes: dict[str, int] = {}
    with report.open("w") as file, report.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

        def before(call: str) -> None:
            file.seek(0)
            file.truncate()
            file.write(call)
            file.flush()

        for seed in range(first, first + count):
            try:
                outcome = run(seed, before)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        before(json.dumps(outcomes))
    os._exit(0)
