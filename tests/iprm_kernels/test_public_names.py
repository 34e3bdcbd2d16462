"""The public names of `iprm_kernels`, and that `iprm` uses no others."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import iprm
import pytest
import torch
from torch import Tensor, nn

import iprm_kernels as ik

PUBLIC = set(ik.__all__)
MODULES = {name for name in PUBLIC if inspect.ismodule(getattr(ik, name))}


def used_names(tree: ast.AST) -> Iterator[str]:
    """Names that a file takes from iprm_kernels, by import or as an attribute; names in public modules as module.name."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "iprm_kernels":
                    aliases[alias.asname or alias.name] = ""
                elif alias.name.startswith("iprm_kernels."):
                    yield alias.name.removeprefix("iprm_kernels.")
        elif (
            isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "iprm_kernels" and not node.level
        ):
            module = node.module.removeprefix("iprm_kernels").removeprefix(".")
            for alias in node.names:
                yield f"{module}.{alias.name}" if module else alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield node.attr


def is_public(name: str) -> bool:
    head, _, rest = name.partition(".")
    return head in PUBLIC and (not rest or (head in MODULES and not rest.startswith("_") and hasattr(getattr(ik, head), rest)))


def test_iprm_uses_public_names_alone() -> None:
    used = {}
    for file in Path(iprm.__file__).parent.rglob("*.py"):
        used |= dict.fromkeys(used_names(ast.parse(file.read_text())), file.name)
    assert "linear_probe_rebalance" in used
    assert {name: file for name, file in used.items() if not is_public(name)} == {}


@pytest.mark.parametrize(
    "line", ["from iprm_kernels.registration import below", "from iprm_kernels import reference", "import iprm_kernels.kernels",
             "import iprm_kernels as ik; ik.head", "from iprm_kernels.collectives import _resolve_process_group"],
)  # fmt: skip
def test_a_private_name_is_found(line: str) -> None:
    assert not all(map(is_public, used_names(ast.parse(line))))


def test_every_public_name_is_documented() -> None:
    for name in PUBLIC - {"__version__"}:
        assert inspect.getdoc(getattr(ik, name)), name
    for module in MODULES:
        for name, function in inspect.getmembers(getattr(ik, module), inspect.isfunction):
            if function.__module__ == f"iprm_kernels.{module}" and not name.startswith("_"):
                assert inspect.getdoc(function), f"{module}.{name}"


class EveryOperator(nn.Module):
    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        kl = torch.stack([ik.batch_kl(x, y), ik.batch_kl(y, x, reduction="mean")])
        strength = ik.strength_weights(kl)
        return ik.normalize(x), ik.geodesic_mixup(x, y, weight), kl, strength, ik.batch_kl(x, y, reduction="none")


def test_an_exported_program_needs_torch_alone() -> None:
    inputs = (torch.randn(5, 7), torch.randn(5, 7), torch.tensor(0.3))
    program = torch.export.export(EveryOperator(), inputs).run_decompositions(ik.decompositions())
    operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert operators
    assert {operator.namespace for operator in operators} == {"aten"}
    with ik.use_backend("reference"):
        torch.testing.assert_close(program.module()(*inputs), EveryOperator()(*inputs))
