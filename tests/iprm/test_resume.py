"""A run that is killed goes on to the very bits of one that never was."""

from __future__ import annotations

import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command import iprm
from feature_files import arrays, save
from forked import run_forked
from torch import Tensor

RUN = Path("runs/fit/version_0")
EPOCHS, STEPS = 5, 15  # 39 rows in batches of 13
KILLED_AT = sorted(random.Random(4).sample(range(STEPS), 10))


def fit(folder: Path, *more: str, signal_step: int = -1, number: int = signal.SIGKILL) -> tuple[Path, list[str]]:
    """The command that trains in a folder, and sends itself a signal before a step."""
    folder.mkdir()
    save(folder, arrays())
    data = ("--data", "feature_files.NoisyFeatures", "--data.path", "features.npz")
    told = ("--data.signal_step", str(signal_step), "--data.signal_number", str(int(number)))
    settings = ("--trainer.max_epochs", str(EPOCHS), "--trainer.enable_progress_bar", "false", "--state.every_n_steps", "2")
    return folder, ["fit", *data, *told, *settings, *more]


def resume(folder: Path, *more: str) -> tuple[Path, list[str]]:
    return folder, ["resume", str(RUN), "--data.signal_step", "-1", *more]


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
    """What a run leaves: the leaves of its last states, but that paths name its folder, and metrics.csv."""
    found: dict[str, Any] = {"metrics": (folder / RUN / "metrics.csv").read_text()}
    for path in sorted((folder / RUN / "states").glob("*.ckpt")):
        for name, leaf in leaves(torch.load(path, weights_only=True)).items():
            place = str(folder.resolve())
            found[f"{path.name}{name.replace(place, '')}"] = leaf.replace(place, "") if isinstance(leaf, str) else leaf
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same in both, bit by bit."""

    def same(a: Any, b: Any) -> bool:
        return a.equal(b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b

    return [name for name in one.keys() | other.keys() if not (name in one and name in other and same(one[name], other[name]))]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """Runs of all the tests below: one left alone, ten killed and resumed, and others."""
    place = tmp_path_factory.mktemp("resume")
    killed = [
        command
        for step in KILLED_AT
        for command in (fit(place / f"killed{step}", signal_step=step), resume(place / f"killed{step}"))
    ]
    codes = run_forked(place, [fit(place / "alone"), *killed])
    assert codes == [0] + [-signal.SIGKILL, 0] * len(KILLED_AT)
    return place


@pytest.mark.parametrize("step", KILLED_AT)
def test_a_killed_run_resumes_to_the_same_bits(ran, step):
    expected = left(ran / "alone")
    assert len(expected) > 100
    assert difference(left(ran / f"killed{step}"), expected) == []
