"""Standard output and error: in encodings that lack some characters, and after their reader has ended."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import sys
from typing import Any

#: Exit code of a command whose output has no reader left, by the convention of shells: 128 + SIGPIPE.
UNREAD = 141
#: Name of the error handler of `ascii_instead`, for `str.encode`.
ASCII = "iprm.ascii"
#: What is written instead of a character that an encoding lacks. Other characters are written as \\xNN, \\uNNNN or \\UNNNNNNNN.
REPLACED = {"λ": "lambda", "ω": "omega", "θ": "theta", "Σ": "sum", "α": "alpha", "ρ": "rho"}
REPLACED |= {
    "±": "+-",
    "×": "x",
    "·": ".",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "²": "^2",
}
REPLACED |= {"°": " degrees", "“": '"', "”": '"', "‘": "'", "’": "'", "─": "-", "━": "-", "╸": "-", "╺": "-", "•": "*"}
REPLACED |= {"│": "|", "┃": "|"} | dict.fromkeys("┏┓┗┛┡┩┳┻╇┴┬┼├┤└┘┌┐", "+")


def ascii_instead(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of an encoding: replaces one character by `REPLACED`, or else by its escape sequence. A byte of a file name
    that is not in the encoding of names (PEP 383) is written as that byte."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter, after = error.object[error.start], error.start + 1
    if "\udc80" <= letter <= "\udcff":
        return bytes([ord(letter) - 0xDC00]), after
    return REPLACED.get(letter) or letter.encode("ascii", "backslashreplace").decode("ascii"), after


codecs.register_error(ASCII, ascii_instead)


def write_any_text() -> None:
    """From now on, no character makes writing to standard output or error fail: see `ascii_instead`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ASCII)


def printable(text: str) -> str:
    """The text as standard output shows it after `write_any_text`. A character may become several."""
    encoding = getattr(sys.stdout, "encoding", None)
    return text.encode(encoding, ASCII).decode(encoding, "surrogateescape") if encoding else text


def has_readers() -> bool:
    """False if standard output or error is a pipe whose reader has ended."""
    if not hasattr(select, "poll"):  # Windows, where a broken pipe is assumed to be one of these
        return False
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, or not a file
            poll.register(stream.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def drop(*streams: Any) -> None:
    """From now on, what is written to these streams is lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, or not a file
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
