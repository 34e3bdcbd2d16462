"""What is hostile in folders of runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_folders import diagnostics


def written(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda run: (run / name).write_bytes(data)


def recorded(**values: Any) -> Callable[[Path], Any]:
    """diagnostics.json with other values."""
    record = diagnostics(("video", "audio"), 4, True, "iprm") | values
    return written("diagnostics.json", json.dumps(record))


def angle(**values: Any) -> Callable[[Path], Any]:
    return recorded(angles=[{"pair": ["a", "b"], "counts": [1, 2], "mean": 1.1, "undirected": 0} | values])


def sparse(name: str) -> Callable[[Path], Any]:
    """A file of 16 GB, none of which is on the disk."""

    def write(run: Path) -> None:
        with (run / name).open("wb") as file:
            file.truncate(2**34)

    return write


def _removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def linked(name: str, target: str) -> Callable[[Path], Any]:
    def link(run: Path) -> None:
        _removed(run / name)
        (run / name).symlink_to(target)

    return link


def pipe(run: Path) -> None:
    (run / "metrics.csv").unlink()
    os.mkfifo(run / "metrics.csv")


def links(run: Path) -> None:
    """A chain of links, the last of which leads out of the run."""
    linked("metrics.csv", "first")(run)
    linked("first", "second")(run)
    linked("second", "../thesis.txt")(run)


#: Links out of a run beside `own`, a run of the user, and thesis.txt.
LINKS: dict[str, Callable[[Path], Any]] = {
    "a file": linked("metrics.csv", "../thesis.txt"),
    "a file of another run": linked("diagnostics.json", "../own/metrics.csv"),
    "a file that does not exist": linked("metrics.csv", "../profile"),
    "the checkpoints of another run": linked("checkpoints", "../own/checkpoints"),
    "its own name in another folder": linked("checkpoints", "../got-before"),
    "a file by a chain": links,
    "an absolute path": linked("metrics.csv", "/dev/null"),
    "a link in a folder": linked("checkpoints/best-epoch=1-step=6.ckpt", "../../thesis.txt"),
    "the folder above": linked("more", ".."),
}
#: Parts of a run that are neither files nor folders.
NO_FILES: dict[str, Callable[[Path], Any]] = {"a pipe": pipe}


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10)
)
HEADS = ",".join(f"val_accuracy_m{k}" for k in range(300))
KINDS = ",".join(f"k{k}x_a" for k in range(2000))

VALUES = "config.yaml cannot be read: ValueError: expected values of at most"
#: 40 keys of 9,000 letters, each above the next.
KEYS = "{" + f"? {'k' * 9000} : {{" * 40 + ",".join(f"k{k}: 1" for k in range(5000)) + "}" * 41

#: What is done to a run -> what its page says.
RUNS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "aliases of aliases": (written("config.yaml", LAUGHS), "config.yaml cannot be read: ValueError: expected a file without"),
    "mappings of aliases": (
        written("config.yaml", "a: &a {x: 1}\nb: &b {<<: *a, y: *a}\nc: {<<: *b}\n"),
        "config.yaml cannot be read: ValueError: expected a file without aliases",
    ),
    "YAML of depth": (written("config.yaml", "[" * 10**6), "config.yaml cannot be read: "),
    "YAML of many values": (written("config.yaml", "a: [" + "1," * 10**6 + "1]"), "config.yaml cannot be read: ValueError"),
    "YAML of 16 GB": (sparse("config.yaml"), "config.yaml cannot be read: ValueError: expected at most 4194304 bytes"),
    "YAML of a class": (
        written("config.yaml", "model: !!python/object/apply:os.system ['true']"),
        "config.yaml cannot be read: ConstructorError",
    ),
    "a number of many digits": (written("config.yaml", f"model: {{method: 0x{'f' * 9_000}}}"), "a very large number"),
    "names of any length": (written("config.yaml", f"model: {{method: {'m' * 9000}, {'k' * 1000}: 1}}"), "mmm…"),
    "a number of base 60": (written("config.yaml", f"model: {{method: 1{':1' * 10**6}}}"), f"{VALUES} 10000 letters"),
    "a value of a megabyte": (written("config.yaml", f"model: {{method: {'m' * 10**6}}}"), f"{VALUES} 10000 letters"),
    "a key of a megabyte": (written("config.yaml", f'? "{"k" * 10**6}"\n: {{a: 1}}'), f"{VALUES} 10000 letters"),
    "a long key above many": (
        written("test.json", json.dumps({"k" * 400_000: {str(k): 1 for k in range(8000)}})),
        "",
    ),
    "long keys above many": (written("config.yaml", KEYS), ""),
    "JSON of depth": (written("diagnostics.json", "[" * 10**6), "diagnostics.json cannot be read: RecursionError"),
    "JSON of 16 GB": (sparse("diagnostics.json"), "diagnostics.json cannot be read: ValueError: expected at most"),
    "bytes that are no text": (written("diagnostics.json", b"\xff\xfe" * 100), "diagnostics.json cannot be read: Unicode"),
    "infinite counts": (
        recorded(class_counts=[float("inf")] * 4),
        "diagnostics.json cannot be read: ValueError: class_counts: expected counts from 0 up, got inf",
    ),
    "counts that are no numbers": (
        recorded(class_counts=[float("nan")] * 4),
        "diagnostics.json cannot be read: ValueError: class_counts: expected counts",
    ),
    "counts beyond a double": (
        recorded(class_counts=[10**400] * 4),
        "diagnostics.json cannot be read: ValueError: class_counts: expected counts from 0 up",
    ),
    "half a sample": (
        recorded(class_counts=[0.5] * 4),
        "diagnostics.json cannot be read: ValueError: class_counts: expected counts from 0 up, got 0.5",
    ),
    "3e9 classes": (
        recorded(num_classes=3e9),
        "diagnostics.json cannot be read: ValueError: expected 4 classes as in class_counts, got 3000000000.0",
    ),
    "names of some classes": (
        recorded(classes=["a"]),
        "diagnostics.json cannot be read: ValueError: expected 4 classes as in class_counts, got 4 and 1 names",
    ),
    "an infinite epoch": (
        recorded(weights={"from": "best", "epoch": float("inf")}),
        "diagnostics.json cannot be read: ValueError: epoch: expected counts",
    ),
    "an angle of 1e308": (
        angle(mean=1e308),
        "diagnostics.json cannot be read: ValueError: angle: expected a number from 0 to 3.14159, got 1e+308",
    ),
    "negative angles": (
        angle(counts=[-1, 2]),
        "diagnostics.json cannot be read: ValueError: angles: expected counts from 0 up, got -1",
    ),
    "a million bins": (
        angle(counts=[0] * 10**6),
        "diagnostics.json cannot be read: ValueError: angles: expected one number of bins from 1 to 1000",
    ),
    "a strength of 1e308": (
        recorded(strength=[{"pair": ["a", "b"], "omega": [[1e308] * 4, [0] * 4]}]),
        "diagnostics.json cannot be read: ValueError: strength: expected a number from 0 to 1, got 1e+308",
    ),
    "an environment of depth": (
        recorded(versions=json.loads('{"a":' * 500 + "1" + "}" * 500)),
        "diagnostics.json cannot be read: ValueError: expected at most 50 levels",
    ),
    "letters that are none": (recorded(method="\ud800", modalities=["\ud800", "b"]), ""),
    "a line of 16 GB": (sparse("metrics.csv"), "metrics.csv cannot be read: ValueError: expected lines of at most"),
    "a quote without end": (written("metrics.csv", 'epoch,val_loss\n0,"' + "1\n" * 10**6), "metrics.csv cannot be read: Error"),
    "a million columns": (
        written("metrics.csv", ",".join(["epoch", *["x"] * 400_000]) + "\n"),
        "metrics.csv cannot be read: ValueError: expected at most 16384 columns",
    ),
    "more cells than columns": (written("metrics.csv", "epoch,val_loss\n0,1" + ",2" * 10**5 + "\n"), ""),
    "300 heads": (
        written("metrics.csv", f"epoch,{HEADS}\n0{',0.5' * 300}\n"),
        "metrics.csv has 300 heads: those after the first 128 are left out.",
    ),
    "2,000 kinds of measures": (written("metrics.csv", f"epoch,{KINDS}\n0{',0.5' * 2000}\n"), "Shown: the first 12 of 2000."),
    "cells of NUL": (written("metrics.csv", "epoch,val_loss\n0,\0\n1,0.5\n"), ""),
    "a pipe": (pipe, "No metrics.csv: no epoch has ended yet."),
    "a device": (linked("metrics.csv", "/dev/zero"), "No metrics.csv: no epoch has ended yet."),
    "a link to itself": (linked("config.yaml", "config.yaml"), "No config.yaml"),
    "a link to a folder": (linked("diagnostics.json", "/proc"), "No diagnostics.json"),
    "a reason of 16 GB": (sparse("failed.txt"), "failed.txt cannot be read: ValueError: expected at most 16777216 bytes"),
    "a reason of a megabyte": (written("failed.txt", "r" * 2**20), "rrr…"),
}
