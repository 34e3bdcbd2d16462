"""Lines and tables on the terminal, by Rich."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable

from iprm.compare.table import Table
from iprm.streams import printable

#: Fewest cells of a column whose text is folded, however narrow the terminal is.
NARROWEST = 8


def plain_console() -> Console:
    """Prints text as it is: without markup, styles and line breaks of its own."""
    return Console(width=1_000_000, highlight=False, markup=False, emoji=False, soft_wrap=True)


def available_width() -> int | None:
    """Cells of a line: $COLUMNS, or else those of the terminal; None if the output is a pipe or a file."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80  # a pseudo-terminal may have no size
    except (AttributeError, OSError, ValueError):
        return None


def print_table(table: Table, *, names: int = 1, left: int = 1, ruled: Collection[int] = ()) -> None:
    """Prints a table, never cut: what does not fit beside the first columns follows below, beside the first columns again.
    Text is folded where a single column is wider than the terminal, numbers never.

    Args:
        names: number of first columns that name the row.
        left: number of first columns that are aligned to the left.
        ruled: indices of rows with a line below them.
    """
    head, *rows = [[printable(cell) for cell in line] for line in (table.head, *table.rows)]
    width = available_width()
    widths = _widths(head, rows, names, width)
    console = plain_console()
    if table.title:
        console.print(f"{table.title}\n")
    for part in _parts(widths, names, width):
        shown = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        for column in part:
            justify = "left" if column < left else "right"
            shown.add_column(head[column], justify=justify, width=widths[column], overflow="fold")  # type: ignore[arg-type]
        for place, row in enumerate(rows):
            style = "bold" if place in table.bold else None
            shown.add_row(*(row[column] for column in part), style=style, end_section=place in ruled)
        console.print(shown, "")


def _widths(head: Sequence[str], rows: Sequence[Sequence[str]], names: int, width: int | None) -> list[int]:
    """Cells of each column: those of its widest line, or fewer for names and heads that do not fit a line of `width` cells."""
    heads = [_cells(cell) for cell in head]
    bodies = [max((_cells(row[column]) for row in rows), default=0) for column in range(len(head))]
    widths = [max(pair) for pair in zip(heads, bodies, strict=True)]
    if width is None:
        return widths
    rest = width - sum(widths[1:names]) - names  # for the first column and one of numbers
    widths[0] = min(widths[0], max(NARROWEST, rest - max(bodies[names:], default=0)))
    most = max(NARROWEST, rest - widths[0])
    return widths[:names] + [max(body, min(own, most)) for own, body in zip(widths[names:], bodies[names:], strict=True)]


def _cells(text: str) -> int:
    return max(cell_len(line) for line in text.split("\n"))


def _parts(widths: Sequence[int], names: int, width: int | None) -> list[list[int]]:
    """The columns of each part of a table: the first `names`, and as many of the others as fit, at least one."""
    first = list(range(names))
    parts = [first[:]]
    for column in range(names, len(widths)):
        used = sum(widths[k] + 1 for k in parts[-1])
        if width is not None and used + widths[column] > width and len(parts[-1]) > names:
            parts.append(first[:])
        parts[-1].append(column)
    return parts
