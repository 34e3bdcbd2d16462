"""Lines and tables on the terminal, by Rich."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


def wide_console() -> Console:
    """A console that wraps and styles no text, and is wider than any table: a narrower terminal wraps their lines itself."""
    return Console(width=1000, highlight=False, markup=False, soft_wrap=True)


def table(*columns: str, left: int = 1) -> Table:
    """A table without rows. The first `left` columns are aligned to the left, the others to the right."""
    found = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for place, column in enumerate(columns):
        found.add_column(column, justify="left" if place < left else "right")
    return found
