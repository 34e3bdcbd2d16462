"""Errors that are the user's to mend, and the words that help: the closest name to one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, what was expected and what came.

    The command line prints the message alone, without a traceback, and leaves with exit code 2.
    """


def closest(name: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that `name` most likely meant, or None where nothing is near."""
    by_folded = {entry.casefold().replace("-", "_"): entry for entry in known}
    matches = difflib.get_close_matches(str(name).casefold().replace("-", "_"), by_folded, n=1, cutoff=0.5)
    return by_folded[matches[0]] if matches else None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: ``unknown dataset 'digit': did you mean 'digits'? (known: ...)``."""
    known = list(known)
    match = closest(name, known)
    hint = f"did you mean {match!r}? " if match else ""
    return f"unknown {kind} {name!r}: {hint}(known: {', '.join(sorted(known))})"
