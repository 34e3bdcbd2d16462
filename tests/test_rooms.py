"""The import graph: no circle of files in either package, and in `iprm` no import from a room above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"iprm": ROOT / "python/iprm", "iprm_kernels": ROOT / "iprm_kernels"}
#: The rooms of `iprm` in floors: a file imports from its own room and from floors below.
FLOORS = (
    {"errors", "names", "distributed", "environment", "files", "locks", "memory", "streams"},
    {"encoders", "configs"},
    {"fusion", "data"},
    {"methods"},
    {"training"},
    {"inference", "compare", "profile"},
    {"report"},
    {"cli"},
    {"__main__"},
)


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file; a package has the name of its folder."""
    folder = PACKAGES[package]
    found = {}
    for file in folder.rglob("*.py"):
        parts = [package, *file.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports anywhere, also within functions and for types alone."""
    known = modules(package)
    return {name: set(_imported(name, file, known)) - {name} for name, file in known.items()}


def _imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    home = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield from [submodule] if submodule in known else [source] if source in known else []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_itself_by_way_of_others(package):
    graph = imports(package)
    assert sum(map(len, graph.values())) > 20, "the imports were found"
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_room_imports_from_above():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    graph = {name: names for name, names in imports("iprm").items() if name != "iprm"}  # which names what is public
    upward = []
    for name, names in graph.items():
        room = name.split(".")[1]
        for other in (other.split(".")[1] for other in names if other != "iprm"):
            if other != room and floor[other] >= floor[room] > 0:
                upward.append(f"{name} imports from {other}")
    assert upward == []


def test_iprm_kernels_imports_nothing_of_iprm():
    for file in PACKAGES["iprm_kernels"].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "iprm" for name in names), file
