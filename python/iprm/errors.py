"""User errors, suggestions of the closest known name, and checks of options and numbers."""

from __future__ import annotations

import decimal
import difflib
import inspect
import math
import numbers
import sys
from collections.abc import Iterable, Mapping
from typing import Any


class InputError(ValueError):
    """An invalid user input. The message names the argument, what was expected and what was given.

    The command line prints only the message, without a traceback, and exits with code 2. Each argument is a line of its own.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class UnreadableError(InputError):
    """A file that cannot be read, for a reason other than its content: permission, the disk, memory."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The entry of `known` closest to `name`, or None if none is similar."""
    by_folded = {entry.casefold().replace("-", "_"): entry for entry in known}
    matches = difflib.get_close_matches(str(name).casefold().replace("-", "_"), by_folded, n=1, cutoff=0.5)
    return by_folded[matches[0]] if matches else None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Error message for an unknown name: ``unknown dataset 'digit': did you mean 'digits'? (known: ...)``."""
    known = list(known)
    match = closest(name, known)
    hint = f": did you mean {match!r}?" if match else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(sorted(known))})"


def counted(count: int, what: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def check_options(owner: str, given: Iterable[str], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Checks the names of options of `owner` against the parameters that accept them.

    Raises:
        InputError: an option is unknown (the message suggests the closest), or a required one is missing.
    """
    known = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for option in given:
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            what = unknown(f"option of {owner}", option, known)
            raise InputError(what if known else f"{owner} has no options, got {option!r}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in given:
            raise InputError(f"{owner} needs the option {name!r}")


def plain_number(value: Any) -> int | float | None:
    """A real number of Python or numpy as an int or a float, as checkpoints hold it; None for any other value.

    Numbers are int, float, `fractions.Fraction`, `decimal.Decimal`, numpy's integers and floating-point numbers, and arrays and
    tensors of one of these without dimensions. Booleans are none.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        return float(value) if isinstance(value, (numbers.Real, decimal.Decimal)) else None
    except OverflowError:  # of a fraction
        return math.inf


def plain_values(value: Any) -> Any:
    """`value` with every number of numpy, at any depth of mappings and sequences, as a number of Python."""
    if isinstance(value, Mapping):
        return {name: plain_values(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_values, value)) if type(value) in (list, tuple) else value
    if getattr(getattr(value, "dtype", None), "kind", "") == "b" and getattr(value, "shape", None) == ():
        return bool(value)
    number = plain_number(value)
    return value if number is None else number


def check_number(name: str, value: Any, highest: float = math.inf) -> int | float:
    """Returns `value` as a number of Python.

    Raises:
        InputError: it is no finite number in [0, highest]; see `plain_number`.
    """
    number = plain_number(value)
    if number is None or not 0 <= number <= min(highest, sys.float_info.max):
        span = "from 0 up" if highest == math.inf else f"from 0 to {highest:g}"
        raise InputError(f"{name}: expected a number {span}, got {value!r}")
    return number


def check_whole(name: str, value: Any, lowest: int = 0, highest: float = math.inf) -> int:
    """Returns `value` as an int.

    Raises:
        InputError: it is no whole number in [lowest, highest], of Python or numpy.
    """
    number = plain_number(value)
    if not isinstance(number, int) or not lowest <= number <= highest:
        span = f"{lowest} up" if highest == math.inf else f"{lowest} to {highest}"
        raise InputError(f"{name}: expected a whole number from {span}, got {value!r}")
    return number


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """Returns the one of `allowed` that equals `value`; raises InputError if none does."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool) or value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return allowed[allowed.index(value)]
