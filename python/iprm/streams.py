"""Standard output and error: text of others, encodings that lack some characters, and readers that have ended; and text that
a spreadsheet would compute."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import re
import select
import sys
from typing import Any

#: Exit code of a command whose output has no reader left, by the convention of shells: 128 + SIGPIPE.
UNREAD = 141
#: Name of the error handler of `ascii_instead`, for `str.encode`.
ASCII = "iprm.ascii"
#: Characters that a terminal obeys: controls, which begin escape sequences, line separators, and marks of writing direction.
OBEYED = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: Beginnings of a cell that a spreadsheet takes for a formula, in two widths.
FORMULA = re.compile("[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]")
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


def printable(text: str, keep: str = "\n") -> str:
    """The text as standard output shows it after `write_any_text`, with every character that a terminal would obey, except
    those of `keep`, as its escape sequence: ``\\x1b``. A character may become several."""
    text = OBEYED.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode("ascii"), text)
    encoding = getattr(sys.stdout, "encoding", None)
    return text.encode(encoding, ASCII).decode(encoding, "surrogateescape") if encoding else text


def say(line: str, *, error: bool = False) -> None:
    """Prints one line, which may hold names from files of others, on standard output or error."""
    print(printable(line, keep=""), file=sys.stderr if error else sys.stdout)


class PrintableFormatter(logging.Formatter):
    """Formats log records, whose messages may hold names from files of others."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would compute, such as ``=1+2``, follows an apostrophe. Numbers, also as
    text, are unchanged."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


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
