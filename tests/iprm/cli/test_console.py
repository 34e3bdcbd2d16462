"""Tables on the terminal: at any width no name and no digit is lost, and every part names its rows."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import sys
import termios

import pytest
from iprm.cli.console import available_width, print_table
from iprm.compare.table import Table
from rich.cells import cell_len

VIEWS = ("front", "rear", "left", "right", "lidar", "radar")
METHODS = ("unimodal-front", "concat", "iprm-one-pass")


def accuracies(views=VIEWS, methods=METHODS) -> Table:
    """A different number in every cell."""
    head = ["method", "accuracy", *(f"{view}\nhead" for view in views), "s/epoch"]
    rows = [
        [method, *(f"{10 * row + column}.{row}±{column}.5" for column, _ in enumerate(head[1:]))]
        for row, method in enumerate(methods)
    ]
    return Table("six views: 3 seeds", head, rows, frozenset({1}))


def printed(capsys, table: Table, **options) -> list[list[str]]:
    """The lines of each part of the table, without the title."""
    print_table(table, **options)
    title, *parts = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert title == table.title
    return [part.splitlines() for part in parts]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140, None], ids=str)
@pytest.mark.parametrize("views", [VIEWS[:2], VIEWS[:3], VIEWS, [f"m{k}" for k in range(12)]], ids=len)
def test_every_part_names_its_rows_and_no_number_is_lost(capsys, monkeypatch, width, views):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    table = accuracies(views)
    parts = printed(capsys, table)
    assert max(cell_len(line) for part in parts for line in part) <= (width or 1000)
    found = {}
    for part in parts:
        *_, rule = (place for place, line in enumerate(part) if "──" in line)
        body = "\n".join(part[rule + 1 :])
        names = [name for name in METHODS if name in body.replace("\n", "")] or re.findall(r"^\S+", body, re.MULTILINE)
        assert names, part
        found |= dict.fromkeys(re.findall(r"[\d.]+±[\d.]+", body))
    assert set(found) == {cell for row in table.rows for cell in row[1:]}
    assert (width is not None) or len(parts) == 1, "a pipe has no width"
    if width and width >= 60:
        assert all([line.split()[0] for line in part[-3:]] == list(METHODS) for part in parts)


def test_what_fits_the_terminal_is_one_part(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert len(printed(capsys, accuracies())) == 1


def test_names_wider_than_the_terminal_are_folded_and_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    name = "unimodal-" + "a_very_long_name_of_a_modality_" * 3
    parts = printed(capsys, accuracies(VIEWS[:2], (name, "sum")))
    for part in parts:
        assert max(map(len, part)) <= 60
        assert name in "".join(line.split()[0] for line in part if not line.startswith("─"))


def test_a_head_wider_than_the_terminal_is_folded_and_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    head = "a_very_long_name_of_a_modality_that_goes_on"
    (*_, lines) = printed(capsys, Table("t", ["method", "accuracy", head], [["sum", "10.0", "12.5"]]))
    assert max(map(len, lines)) <= 40
    assert head in "".join(line.split()[-1] for line in lines if not line.startswith("─"))


def test_letters_of_two_cells_are_counted_as_two(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    for part in printed(capsys, accuracies(["音声", "映像"], ["unimodal-音声", "sum"])):
        assert max(map(cell_len, part)) <= 30


def test_names_are_no_markup_and_no_emoji(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    ((*_, row),) = printed(capsys, Table("t", ["a"], [["[bold]:smile:[/bold]"]]))
    assert row == "[bold]:smile:[/bold]"


@pytest.mark.parametrize("names", [1, 2])
def test_the_first_columns_that_name_a_row_are_repeated(capsys, monkeypatch, names):
    monkeypatch.setenv("COLUMNS", "35")
    table = Table("t", ["modality", "split", "shape", "missing"], [["audio", "train", "(3, 224, 224)", "1234567890"]])
    parts = printed(capsys, table, names=names, left=3)
    assert len(parts) == 2
    assert all(part[-1].split()[:names] == ["audio", "train"][:names] for part in parts)


def test_without_columns_the_width_is_that_of_the_terminal_and_a_pipe_has_none(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    primary, secondary = os.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 72, 0, 0))
    with os.fdopen(primary), os.fdopen(secondary, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert available_width() == 72
        fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
        assert available_width() == 80, "a terminal that has no size"
    for other in (io.StringIO(), None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", other)
            assert available_width() is None


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_columns_stay_aligned_in_an_encoding_that_lacks_letters(monkeypatch, encoding):
    monkeypatch.delenv("COLUMNS", raising=False)
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
        print_table(Table("", ["method", "λ", "n"], [["iprm", "0.40±0.01", "–"], ["sum", "–", "1"]]))
        sys.stdout.flush()
        _, _, iprm, total = raw.getvalue().decode(encoding).splitlines()[:4]
    assert len(iprm) == len(total)
    assert iprm.replace("|", " ").split() == [
        "iprm",
        "0.40+-0.01" if encoding == "ascii" else "0.40±0.01",
        "–" if encoding == "cp1252" else "-",
    ]
