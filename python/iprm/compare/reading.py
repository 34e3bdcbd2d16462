"""Reads the files of a run, which may come from anyone: their sizes, depths and numbers are bounded."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Course = dict[int, float]  # epoch -> value

#: Most bytes of a file that is read as a whole; JSON takes up to 25 times as many in memory.
MOST_BYTES = 2**24
#: Most bytes of such files of all runs, which take up to 7 s; and bytes of JSON that take as long as one of YAML.
MOST_BYTES_OF_ALL, YAML_BYTES = 2**25, 8
#: Most values, and most levels, of a YAML file, which takes up to 200 bytes of memory for each of its bytes.
MOST_NODES, MOST_LEVELS = 20_000, 50
#: Most letters of a value of a YAML file: PyYAML converts digits of base 60, as in 1:30, in a time quadratic in their number.
LONGEST_VALUE = 10_000
#: Longest text of a setting or a name, and longest dotted name, of which the rest is cut.
LONGEST, LONGEST_NAME = 200, 500
#: Most columns and heads of metrics.csv, and bytes of a line. 100 modalities have 15,000 columns.
MOST_COLUMNS, MOST_HEADS, LONGEST_LINE = 2**14, 128, 2**20
#: Most cells of the metrics.csv of all runs, which take 5 s; and letters that count as one more cell.
MOST_CELLS, LETTERS_OF_A_CELL = 2**23, 64
LARGEST = 1e30
#: Prefixes of columns of the accuracy of a head.
HEADS = ("val_accuracy_", "train_accuracy_")


class Budget:
    """What may still be read of all runs of a report. cells: of metrics.csv; bytes: of other files, each byte of YAML as
    `YAML_BYTES`."""

    def __init__(self) -> None:
        self.cells, self.bytes = MOST_CELLS, MOST_BYTES_OF_ALL


def read(path: Path, parse: Callable[[str], Any], missing: list[str], budget: Budget | None = None) -> Any:
    """The parsed content of the file; or None, with a message in `missing`."""
    budget, each = budget or Budget(), YAML_BYTES if parse is read_yaml else 1
    left, most = budget.bytes // each, min(MOST_BYTES, MOST_BYTES_OF_ALL // each)
    try:
        with path.open("rb") as file:
            content = file.read(min(most, left) + 1)
        if len(content) > most:
            raise ValueError(f"expected at most {most} bytes")
        if len(content) > left:
            raise ValueError(f"the files of all runs take more than {MOST_BYTES_OF_ALL // each} bytes")
        budget.bytes -= each * len(content)
        return parse(content.decode())
    except Exception as error:  # the content may be anything
        missing.append(unreadable(path, error))
        return None


def unreadable(path: Path, error: Exception) -> str:
    return f"{path.name} cannot be read: {type(error).__name__}: {' '.join(text(error).split())}"


def read_json(content: str) -> dict[str, Any]:
    """Dotted name -> value of a JSON file."""
    return flattened(json.loads(content))


def read_yaml(content: str) -> dict[str, Any]:
    """Dotted name -> value of a YAML file. Aliases are refused: each may stand for many values, of which each is an alias.

    Raises:
        ValueError: the file has aliases, a value longer than `LONGEST_VALUE`, or more than `MOST_NODES` or `MOST_LEVELS`.
        yaml.YAMLError: the file is no YAML.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    level = 0
    for nodes, event in enumerate(yaml.parse(content, Loader=loader)):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("expected a file without aliases")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_VALUE:
            raise ValueError(f"expected values of at most {LONGEST_VALUE} letters")
        if nodes > MOST_NODES or level > MOST_LEVELS:
            raise ValueError(f"expected at most {MOST_NODES} values in {MOST_LEVELS} levels")
    return flattened(yaml.load(content, Loader=loader))


def flattened(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested mappings as dotted name -> value; empty mappings are values.

    Raises:
        AttributeError: `content` is no mapping.
        ValueError: there are more than `MOST_NODES` or `MOST_LEVELS`.
    """
    found = dict(itertools.islice(_leaves(content, "", 0), MOST_NODES + 1))
    if len(found) > MOST_NODES:
        raise ValueError(f"expected at most {MOST_NODES} values")
    return found


def _leaves(content: Mapping[Any, Any], prefix: str, level: int) -> Iterator[tuple[str, Any]]:
    if level > MOST_LEVELS:
        raise ValueError(f"expected at most {MOST_LEVELS} levels")
    for key, value in content.items():
        name = text(f"{prefix}{text(key)}", LONGEST_NAME)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.", level + 1)
        else:
            yield name, value


def text(value: Any, most: int = LONGEST) -> str:
    """The value as text that can be encoded, cut after `most` letters."""
    try:
        shown = str(value)
    except ValueError:  # an integer of more than 4300 digits
        shown = "a very large number"
    return shown[:most].encode("utf-8", "backslashreplace").decode() + ("…" if len(shown) > most else "")


def number(cell: Any) -> float | None:
    """The number; None if it is not finite, or beyond `LARGEST`, which no metric reaches and no axis can show."""
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < LARGEST else None


def read_courses(path: Path, missing: list[str], budget: Budget | None = None) -> dict[str, Course]:
    """metric -> epoch -> its last finite value, of metrics.csv. An incomplete last line is left out, and so is what follows
    the first line that cannot be read."""
    courses: dict[str, Course] = {}
    budget = budget or Budget()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(_lines(path, file, missing, budget))
            columns = _columns(path, next(rows, []), missing)
            place = columns.pop("epoch", None)
            budget.cells -= len(columns)
            for row in rows:
                budget.cells -= 1 + len(row)
                if budget.cells < 0:
                    missing.append(f"All {path.name} have more than {MOST_CELLS} cells: later epochs are left out.")
                    break
                epoch = number(row[place]) if place is not None and place < len(row) else None
                if epoch is None or abs(epoch) >= 2**31:
                    continue
                key = int(epoch)
                for name, column in columns.items():
                    if column < len(row) and (cell := row[column]) and (value := number(cell)) is not None:
                        courses.setdefault(name, {})[key] = value
    except Exception as error:  # the content may be anything
        missing.append(unreadable(path, error))
    if not courses:
        missing.append(f"{path.name} holds no epoch yet.")
    return courses


def _lines(path: Path, file: Any, missing: list[str], budget: Budget) -> Iterator[str]:
    """The complete lines of the file."""
    while line := file.readline(LONGEST_LINE):
        budget.cells -= len(line) // LETTERS_OF_A_CELL
        if line.endswith("\n"):
            yield line
        elif len(line) == LONGEST_LINE:
            raise ValueError(f"expected lines of at most {LONGEST_LINE} letters")
        else:
            missing.append(f"The last line of {path.name} is incomplete and left out.")


def _columns(path: Path, names: list[str], missing: list[str]) -> dict[str, int]:
    """The name of each column but "step" -> its place."""
    if len(names) > MOST_COLUMNS:
        raise ValueError(f"expected at most {MOST_COLUMNS} columns")
    columns = {name if len(name) <= LONGEST else text(name): place for place, name in enumerate(names) if name != "step"}
    heads = dict.fromkeys(name.removeprefix(prefix) for name in columns for prefix in HEADS if name.startswith(prefix))
    if len(heads) > MOST_HEADS:
        missing.append(f"{path.name} has {len(heads)} heads: those after the first {MOST_HEADS} are left out.")
        beyond = {prefix + head for head in list(heads)[MOST_HEADS:] for prefix in HEADS}
        columns = {name: place for name, place in columns.items() if name not in beyond}
    return columns


def is_file(path: Path) -> bool:
    """Whether a file is there, and not a pipe or device; False if that cannot be known."""
    return os.path.isfile(path)
