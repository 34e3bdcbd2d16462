"""Imported packages are declared, with an upper bound beside private names; a source distribution holds what its tests need."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: Folder -> the requirements of what it holds.
DECLARED = {
    "iprm_kernels": PROJECT["dependencies"],
    "python/iprm": [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["vision"]],
    "tests": [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["vision"], *EXTRAS["dev"]],
    "benchmarks": [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["vision"], *EXTRAS["dev"]],
}
OURS = {"iprm", "iprm_kernels", "setup", "conftest"}
OURS |= {path.stem for folder in ("tests/support", "benchmarks") for path in (ROOT / folder).iterdir()}


def trees(folder: str) -> Iterator[ast.Module]:
    for path in (ROOT / folder).rglob("*.py"):
        yield ast.parse(path.read_text(encoding="utf-8"))


def imported(folder: str) -> set[str]:
    """The packages that a folder imports anywhere, also within functions."""
    found = set()
    for node in (node for tree in trees(folder) for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found - OURS - sys.stdlib_module_names


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


@pytest.mark.parametrize("folder", DECLARED)
def test_what_is_imported_is_declared(folder):
    provided = importlib.metadata.packages_distributions()
    found = imported(folder)
    assert "torch" in found
    declared = names(DECLARED[folder])
    undeclared = {name for name in found if not declared & set(map(normal, provided.get(name, [name])))}
    assert undeclared == set()


# private names


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.Module, package: str) -> set[str]:
    """Dotted names of a package with a private part, as a module uses them."""
    modules = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", chain := ast.unparse(node)):
            first, _, rest = chain.partition(".")
            if modules.get(first, "").partition(".")[0] == package:
                found.add(f"{modules[first]}.{rest}")
    return {name for name in found if any(map(private, name.split(".")))}


TORCH = sorted(
    {name for folder in ("iprm_kernels", "python/iprm") for tree in trees(folder) for name in private_names(tree, "torch")}
)


def value(name: str) -> Any:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def test_the_private_names_of_torch_are_found():
    assert {"torch._C.DispatchKey", "torch._foreach_mul_", "torch.autograd.forward_ad._current_level"} <= set(TORCH)
    assert 15 < len(TORCH) < 40


@pytest.mark.parametrize("name", TORCH)
def test_this_torch_has_a_private_name_that_is_used(name):
    """A torch without one would fail in the middle of an operator."""
    value(name)


@pytest.mark.parametrize("package", ["torch", "lightning", "jsonargparse"])
def test_a_package_whose_private_names_are_used_has_an_upper_bound_that_allows_the_version_here(package):
    (requirement,) = {r for r in DECLARED["python/iprm"] if re.match(rf"{package}[^\w-]", r)}
    lowest, bound = (tuple(map(int, re.search(rf"{sign}([\d.]+)", requirement)[1].split("."))) for sign in (">=", "<"))
    version = tuple(map(int, re.match(r"\d+\.\d+", importlib.metadata.version(package))[0].split(".")))
    assert lowest <= version < bound


# the source distribution


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs the repository")
def test_a_source_distribution_holds_every_file_of_the_repository(tmp_path):
    pytest.importorskip("setuptools")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    tracked = {name for name in listed if name and (ROOT / name).exists()}
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)], cwd=source, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert tracked - held == {".gitignore", ".ci/run"} & tracked
    generated = {name for name in held - tracked if not re.search(r"PKG-INFO$|\.egg-info/|^setup\.cfg$", name)}
    assert generated == set()
