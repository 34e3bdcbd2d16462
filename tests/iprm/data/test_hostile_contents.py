"""Data files of anyone that hold all they declare: letters, types, names and caches that no reader may trust."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_arrays import CONTENTS, archive, npy, twice, whole
from hostile_recordings import NAMES, RATE, wav
from iprm.data import make_data
from iprm.data.datasets import recordings
from iprm.data.datasets.spectrogram import LogMel
from iprm.data.quality import check
from iprm.encoders.description import InputSpec
from iprm.errors import InputError
from iprm.inference.inputs import find_samples


def read(path: Path) -> Any:
    return make_data("features", path=str(path)).splits


@pytest.mark.parametrize("kind", CONTENTS)
def test_an_array_of_another_type_or_of_no_letters_is_refused(tmp_path: Path, kind: str) -> None:
    name, content, message = CONTENTS[kind]
    with pytest.raises(InputError) as refused:
        read(archive(tmp_path / "f.npz", whole() | {name: content}))
    assert message in str(refused.value)
    assert str(tmp_path / "f.npz") in str(refused.value)


@pytest.mark.parametrize("name", ["x_audio", "y"])
def test_an_array_that_occurs_twice_is_refused(tmp_path: Path, name: str) -> None:
    path = twice(tmp_path / "f.npz", f"{name}.npy", whole()[f"{name}.npy"])
    with pytest.raises(InputError, match=f"f.npz: it has several arrays '{name}', expected one"):
        read(path)


@pytest.mark.parametrize("kind", ["<m8[s]", "<M8[s]", "<c8"])
def test_samples_of_durations_are_no_numbers(tmp_path: Path, kind: str) -> None:
    (tmp_path / "audio.npy").write_bytes(npy(np.zeros((5, 4), kind)))
    with pytest.raises(InputError, match=r"audio.npy: expected numbers, got (timedelta64|datetime64|complex)"):
        find_samples(tmp_path, {"audio": InputSpec((4,))})


@pytest.mark.parametrize(("count", "refused"), [(30, False), (31, False), (64, False), (65, True), (3000, True)])
def test_many_modalities_are_warned_of_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, refused: bool
) -> None:
    labels = whole()["y.npy"]
    path = archive(tmp_path / "f.npz", {"y.npy": labels} | {f"x_{k}.npy": npy(np.eye(60, 1)) for k in range(count)})
    if refused:
        with pytest.raises(InputError, match=f"f.npz: expected at most 64 modalities, got {count}"):
            read(path)
        return
    assert len(read(path)["train"].inputs) == count
    warned = [f"{count} modalities have {count * (count - 1) // 2} pairs" in message for message in caplog.messages]
    assert any(warned) == (count > 30)


def test_a_check_of_wide_features_takes_little_more_than_they_do(tmp_path: Path) -> None:
    """It took 3.7 times as much: minima and maxima of every split in float64."""
    width = 10**6
    wide = {"x_audio.npy": npy(np.arange(6 * width, dtype=np.int8).reshape(6, width)), "y.npy": npy(np.arange(6) % 2)}
    path = archive(tmp_path / "f.npz", wide | {"split.npy": npy(np.arange(6) // 2)})
    data = make_data("features", path=str(path))
    splits = data.inspect([])
    tracemalloc.start()
    check("f.npz", splits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 6 * width


# recordings


def folder(path: Path) -> Path:
    path.mkdir()
    for digit in range(10):
        wav(path / f"{digit}_ann_0.wav")
    return path


def load(path: Path, faults: list[str] | None = None) -> recordings.Recordings:
    return recordings.load_recordings(path, LogMel(RATE), path.parent / "cache", faults)


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_of_a_recording_is_read_or_named(tmp_path: Path, kind: str) -> None:
    name, readable = NAMES[kind]
    path = folder(tmp_path / "recordings")
    wav(path / os.fsdecode(name))
    faults: list[str] = []
    assert len(load(path, faults).digits) == 10 + readable
    if readable:
        assert faults == []
        assert len(load(path).digits) == 11
    else:
        assert [": a foreign file" in fault for fault in faults] == [True]
        with pytest.raises(InputError, match=": a foreign file"):
            load(path)


def test_a_folder_whose_name_is_not_utf_8_is_read(tmp_path: Path) -> None:
    path = folder(tmp_path / os.fsdecode(b"n\xff"))
    first = load(path).spectrograms
    assert np.array_equal(load(path).spectrograms, first)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("kind", ["pipe", "link", "link to nothing", "folder"])
def test_what_is_no_file_is_no_place_for_a_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    path = folder(tmp_path / "recordings")
    first = load(path).spectrograms
    (cache,) = (tmp_path / "cache").iterdir()
    cache.unlink()
    (tmp_path / "thesis.txt").write_text("years")
    if kind == "pipe":
        os.mkfifo(cache)
    elif kind == "folder":
        cache.mkdir()
    else:
        cache.symlink_to(tmp_path / ("thesis.txt" if kind == "link" else "absent"))
    caplog.clear()
    assert np.array_equal(load(path).spectrograms, first)
    assert f"{cache}: the spectrograms cannot be cached: expected a file" in caplog.messages[-1]
    assert (tmp_path / "thesis.txt").read_text() == "years"
    assert not (tmp_path / "absent").exists()
