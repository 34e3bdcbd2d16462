"""User errors, and suggestions of the closest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An invalid user input. The message names the argument, what was expected and what was given.

    The command line prints only the message, without a traceback, and exits with code 2.
    """


def closest(name: str, known: Iterable[str]) -> str | None:
    """The entry of `known` closest to `name`, or None if none is similar."""
    by_folded = {entry.casefold().replace("-", "_"): entry for entry in known}
    matches = difflib.get_close_matches(str(name).casefold().replace("-", "_"), by_folded, n=1, cutoff=0.5)
    return by_folded[matches[0]] if matches else None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Error message for an unknown name: ``unknown dataset 'digit': did you mean 'digits'? (known: ...)``."""
    known = list(known)
    match = closest(name, known)
    hint = f"did you mean {match!r}? " if match else ""
    return f"unknown {kind} {name!r}: {hint}(known: {', '.join(sorted(known))})"
