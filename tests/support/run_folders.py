"""Folders as `iprm fit` writes them, without training anything."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def course(modalities: Sequence[str], epochs: int, mixes: bool) -> list[dict[str, float]]:
    """Two rows per epoch, as Lightning's CSVLogger writes them: validation, then training with λ and ω."""
    heads = [*modalities, *(["mix"] if mixes else [])]
    pairs = list(itertools.combinations(modalities, 2)) if mixes else []
    rows = []
    for epoch in range(epochs):
        grown = 1 - math.exp(-(epoch + 1) / 5)
        validation = {"val_accuracy": 0.9 * grown, "val_loss": 3 - 2 * grown}
        training = {"train_accuracy": 0.95 * grown, "train_loss": 3 - 2.2 * grown}
        for place, head in enumerate(heads):
            validation[f"val_accuracy_{head}"] = (0.8 - 0.1 * place) * grown
            training[f"train_accuracy_{head}"] = (0.85 - 0.1 * place) * grown
        for number, (first, second) in enumerate(pairs):
            omega = 0.3 + 0.5 * number / len(pairs) + 0.01 * grown
            pair = "" if len(pairs) == 1 else f"_{first}_{second}"
            training[f"weight{pair}"] = omega + 0.002
            training[f"strength{pair}_{first}"] = omega
            training[f"strength{pair}_{second}"] = 1 - omega
        rows += [{"epoch": epoch, "step": 10 * epoch + 9, **values} for values in (validation, training)]
    return rows


def diagnostics(modalities: Sequence[str], classes: int, mixes: bool, method: str) -> dict[str, Any]:
    """Confusion of a model that is right in 5 of 6 samples, and otherwise predicts the next class."""
    pairs = [list(pair) for pair in itertools.combinations(modalities, 2)]
    every = range(classes)
    angles = [0] * 12 + [6 * classes] + [0] * 23
    omega = [0.2 + 0.6 * k / classes for k in every]
    return {
        "weights": {"from": "best", "epoch": 2, "monitor": "val_accuracy", "value": 0.8333},
        "method": method,
        "modalities": list(modalities),
        "num_classes": classes,
        "rows": 6 * classes,
        "class_counts": [6] * classes,
        "confusion": {
            "target": [*every, *every],
            "prediction": [*every, *((k + 1) % classes for k in every)],
            "count": [5] * classes + [1] * classes,
        },
        "angles": [{"pair": pair, "counts": angles, "mean": 1.1, "undirected": 0} for pair in pairs],
        "strength": [
            {"pair": pair, "kl": [[1.0] * classes, [2.0] * classes], "omega": [omega, [1 - w for w in omega]]}
            for pair in (pairs if mixes else [])
        ],
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "platform": "Linux-of-the-tests",
        "device": "cpu: x86_64",
        "precision": "32-true",
        "backends": {"cpu": "cpp"},
    }


def write_metrics(path: Path, rows: Sequence[dict[str, float]]) -> None:
    names = sorted({name for row in rows for name in row} - {"epoch", "step"})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["epoch", "step", *names])
        writer.writeheader()
        writer.writerows(rows)


def write_run(
    folder: Path,
    *,
    method: str = "iprm",
    seed: int = 0,
    modalities: Sequence[str] = ("video", "audio"),
    classes: int = 4,
    epochs: int = 5,
    data: str = "iprm.data.datasets.features.Features",
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run that has ended. The order of the modalities is not that of the alphabet."""
    mixes = method.startswith("iprm")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/epoch=4-step=49.ckpt").touch()
    config = {
        "seed_everything": seed,
        "trainer": {"max_epochs": epochs},
        "model": {"method": method, "learning_rate": 0.01, **(settings or {})},
        "data": {"class_path": data, "init_args": {"batch_size": 64}},
    }
    (folder / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + yaml.safe_dump(config), encoding="utf-8")
    write_metrics(folder / "metrics.csv", course(modalities, epochs, mixes))
    (folder / "diagnostics.json").write_text(json.dumps(diagnostics(modalities, classes, mixes, method)), encoding="utf-8")
    return folder


def write_test(run: Path, seconds: float | None = 0.5, **metrics: float) -> None:
    """What `iprm compare` adds to the folder of a run."""
    (run / "test.json").write_text(json.dumps({"metrics": metrics, "seconds_per_epoch": seconds, "splits": {}}))


def write_comparison(
    folder: Path,
    methods: Sequence[str] = ("concat", "iprm"),
    seeds: Sequence[int] = (0, 1),
    modalities: Sequence[str] = ("video", "audio"),
    **options: Any,
) -> Path:
    """A comparison whose runs have ended. The accuracy of the first method is 50 %, 51 %, ..., of the next ten more."""
    for place, method in enumerate(methods):
        own = (method.removeprefix("unimodal-"),) if method.startswith("unimodal-") else tuple(modalities)
        for seed in seeds:
            run = write_run(folder / method / f"seed={seed}", method=method, seed=seed, modalities=own, **options)
            accuracy = 0.5 + 0.1 * place + 0.01 * seed
            heads = {f"accuracy_{name}": accuracy / 2 for name in own}
            write_test(run, accuracy=accuracy, map=accuracy + 0.1, macro_f1=accuracy - 0.1, **heads)
    settings = {"data": "features", "methods": list(methods), "seeds": list(seeds)}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder
