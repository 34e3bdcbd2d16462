"""The contents of the folder of a run of `iprm fit`, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RUN = Path("runs/fit/version_0")


def leaves(content: Any, path: str = "") -> dict[str, Any]:
    """Every tensor and plain value of a checkpoint, by its path."""
    if isinstance(content, Mapping):
        parts = content.items()
    elif isinstance(content, (list, tuple)):
        parts = enumerate(content)
    else:
        return {path: content}
    return {key: leaf for name, part in parts for key, leaf in leaves(part, f"{path}/{name}").items()}


def left(folder: Path) -> dict[str, Any]:
    """The leaves of the last states and the best checkpoint of a run, and metrics.csv."""
    found: dict[str, Any] = {"metrics": (folder / RUN / "metrics.csv").read_text()}
    for path in sorted([*(folder / RUN / "states").glob("*.ckpt"), *(folder / RUN / "checkpoints").glob("*.ckpt")]):
        found |= leaves(torch.load(path, weights_only=True), path.name)
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of entries that are not bit-identical in both."""

    def same(a: Any, b: Any) -> bool:
        return a.equal(b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b

    return [name for name in one.keys() | other.keys() if not (name in one and name in other and same(one[name], other[name]))]
