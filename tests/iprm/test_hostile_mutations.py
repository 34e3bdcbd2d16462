"""Files made by changing valid and hostile ones: each is read or refused, in time and memory, and a damaged checkpoint is never
believed."""

from __future__ import annotations

import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_results
import hypothesis
import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from feature_files import arrays
from hostile_arrays import CONTENTS, DECLARED, archive, npy, twice, whole
from hostile_checkpoints import HOSTILE
from hostile_recordings import RATE, RECORDINGS, wav
from hostile_runs import RUNS
from html_page import report
from iprm.compare.runs import read_runs
from iprm.data import make_data
from iprm.data.datasets import recordings
from iprm.data.datasets.spectrogram import LogMel
from iprm.data.npz import map_array
from iprm.errors import InputError
from iprm.training.checkpoint import AtomicCheckpointIO, read_checkpoint
from mutations import mutated, mutated_archive, mutated_text
from run_folders import write_run

#: Bytes of the largest seed: larger hostile files are not changed, since reading them takes seconds.
LARGEST = 2**16
#: KiB that this process may grow by while it reads all of them.
GROWTH = 600 * 1024


def count() -> int:
    """Files per kind: 100, in `make fuzz` 600, in its weekly run 2400."""
    return hypothesis.settings.default.max_examples


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    def late(*_: Any) -> None:
        pytest.fail("a file took more than 10 s of a core")

    before, previous = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGPROF, late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH


def small(paths: Iterator[Path]) -> list[bytes]:
    """The contents of the files, each made anew, that are small enough to be seeds."""
    return [path.read_bytes() for path in paths if path.is_file() and 0 < path.stat().st_size <= LARGEST]


def each(kind: str, seeds: list[bytes], change: Callable[..., bytes]) -> Iterator[bytes]:
    """Changed files, of which each has 10 s; one that fails is written beside the test's other files."""
    for number in range(count()):
        draw = random.Random(f"{kind} {number}")
        signal.setitimer(signal.ITIMER_PROF, 10)
        yield change(draw.choice(seeds), seeds, draw)
        hostile_results.EXAMPLES[f"changed {kind}"] += 1


def made(folder: Path, makers: dict[str, Callable[[Path], Any]]) -> Iterator[Path]:
    for number, make in enumerate(makers.values()):
        path = folder / f"0_ann_{number}.seed"
        make(path)
        yield path


def read(path: Path, call: Callable[[], Any]) -> Any:
    """The result of reading a file; None if the file is refused by name."""
    try:
        return call()
    except InputError as error:
        message = str(error)
    assert str(path) in message
    return None


def test_checkpoints(tmp_path: Path) -> None:
    sealed, _ = checkpoint(tmp_path)
    content = torch.load(sealed, weights_only=True)
    AtomicCheckpointIO().save_checkpoint(content, sealed)
    torch.save(content, tmp_path / "plain.ckpt")
    seeds = [sealed.read_bytes(), (tmp_path / "plain.ckpt").read_bytes()] * 4
    seeds += small(made(tmp_path, HOSTILE))
    path = tmp_path / "changed.ckpt"
    for number, changed in enumerate(each("checkpoints", seeds, mutated_archive)):
        path.write_bytes(changed)
        read(path, lambda mapped=bool(number % 2): read_checkpoint(path, mmap=mapped))


def test_damaged_checkpoints_are_not_believed(tmp_path: Path) -> None:
    """Any change of the bytes of a checkpoint with a checksum is refused."""
    path, _ = checkpoint(tmp_path)
    AtomicCheckpointIO().save_checkpoint(torch.load(path, weights_only=True), path)
    original, damaged = path.read_bytes(), tmp_path / "damaged.ckpt"
    for number, changed in enumerate(each("checkpoints with a checksum", [original], mutated)):
        if changed != original:
            damaged.write_bytes(changed)
            with pytest.raises(InputError):
                read_checkpoint(damaged, mmap=bool(number % 2))


def test_archives_of_features(tmp_path: Path) -> None:
    words = np.array(["a", "b", None] * 20, dtype=object)
    labels = whole() | {"y.npy": npy(words, allow_pickle=True)}
    members = [whole(), labels, whole() | {"filenames.npy": npy(words.astype("<U4"))}]
    members += [whole() | {name: content} for content in DECLARED.values() for name in ("x_audio.npy", "y.npy")]
    members += [whole() | {name: content} for name, content, _ in CONTENTS.values()]
    seeds = [archive(tmp_path / "seed.npz", entries).read_bytes() for entries in members]
    seeds.append(twice(tmp_path / "seed.npz", "y.npy", whole()["y.npy"]).read_bytes())
    path = tmp_path / "changed.npz"
    for changed in each("archives of features", seeds, mutated_archive):
        path.write_bytes(changed)
        splits = read(path, lambda: make_data("features", path=str(path)).splits) or {}
        assert all(bool(x.isfinite().all()) for split in splits.values() for x in split.inputs.values())


def test_arrays(tmp_path: Path) -> None:
    seeds = [npy(array) for array in arrays().values()] + list(filter(None, DECLARED.values()))
    path = tmp_path / "changed.npy"
    for changed in each("arrays", seeds, mutated):
        path.write_bytes(changed)
        read(path, lambda: map_array(path))


def test_recordings(tmp_path: Path) -> None:
    wav(tmp_path / "valid.wav")
    seeds = [(tmp_path / "valid.wav").read_bytes()] * 4
    seeds += small(made(tmp_path, {kind: write for kind, (write, _) in RECORDINGS.items()}))
    seeds.append(seeds[0][:36] + b"LIST" + struct.pack("<I", 4) + b"INFO" + seeds[0][36:])
    path = tmp_path / "0_ann_0.wav"
    for changed in each("recordings", seeds, mutated):
        path.write_bytes(changed)
        found = read(path, lambda: recordings._spectrogram(path, LogMel(RATE)))
        if found is not None:
            assert found.shape == (1, 40, 64)
            assert np.isfinite(found).all()


FILES = ("config.yaml", "metrics.csv", "diagnostics.json")


def test_folders_of_runs(tmp_path: Path) -> None:
    """One page in fifty is drawn."""
    run = write_run(tmp_path / "version_0")
    valid = {name: (run / name).read_bytes() for name in FILES}
    report(tmp_path, run)  # imports what draws, which takes seconds
    seeds = {name: [content] * 8 for name, content in valid.items()}
    for number, (harm, _) in enumerate(RUNS.values()):
        other = write_run(tmp_path / f"seeds/version_{number}")
        harm(other)
        for name in FILES:
            seeds[name] += [content for content in small(iter([other / name])) if content != valid[name]]

    def change(content: bytes, _: list[bytes], draw: random.Random) -> bytes:
        name = draw.choice(FILES)
        for other in FILES:
            (run / other).write_bytes(valid[other])
        (run / name).write_bytes(changed := mutated_text(draw.choice(seeds[name]), seeds[name], draw))
        return changed

    for number, _ in enumerate(each("files of runs", [b""], change)):
        read_runs([run])
        if number % 50 == 0:
            assert report(tmp_path, run).rstrip().endswith("</html>")
